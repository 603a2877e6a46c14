"""`tinyaudio transcribe` as a process: closed streams, interrupts, kills; whole files only, and one line."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("- <&-", 2, "stdin, which is closed"),
        ("TALK >&-", 2, "stdout is closed"),
        ("TALK >/dev/full", 1, "stdout cannot be written: No space left on device"),
        ("nowhere.wav 2>&-", 1, ""),
    ],
)
def test_closed_and_full_streams_are_one_line(checkpoint, talk, words, code, said):
    command = f"{sys.executable} -m tinyaudio transcribe -q --max-new-tokens 4 -m {checkpoint} {words}"
    command = command.replace("TALK", str(talk))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) <= 1


@pytest.mark.slow
def test_interrupt_leaves_with_130_and_whole_files_only(checkpoint, talk, tmp_path):
    """SIGINT to a real process, while the model loads and while it works."""
    many = tmp_path / "many"
    many.mkdir()
    for i in range(600):  # far more than are done by the time two are seen to be
        (many / f"{i:03d}.wav").hardlink_to(talk)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tinyaudio", "transcribe", str(many), "-o", str(out), "-f", "txt,json"]
    command += ["-m", str(checkpoint), "--batch-size", "1", "--skip-existing"]
    for num_wanted in (0, 2):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        if not num_wanted:
            time.sleep(2)
        while num_wanted and len(list(out.glob("*.json"))) < num_wanted:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 130, said
        assert "interrupted" in said.splitlines()[-1]
        assert "Traceback" not in said
        assert all(path.suffix in {".txt", ".json"} for path in out.glob(".*"))
        assert all(json.loads(path.read_text())["error"] is None for path in out.glob("*.json"))
    assert 2 <= len(list(out.glob("*.json"))) < 600


@pytest.mark.slow
def test_reader_that_goes_away_ends_the_run_quietly(checkpoint, talk):
    command = (
        f"{sys.executable} -m tinyaudio transcribe -m {checkpoint} --max-new-tokens 4 {talk} {talk}x --json | true"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_killed_half_way_leaves_whole_files_only_and_goes_on(checkpoint, spoken, tmp_path):
    for i in range(40):
        soundfile.write(tmp_path / f"{i:02d}.wav", np.concatenate([s for s, _ in spoken]), 16_000)
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "tinyaudio",
        "transcribe",
        str(tmp_path),
        "-o",
        str(out),
        "-f",
        "json",
        "-m",
        str(checkpoint),
    ]
    command += ["--skip-existing", "--batch-size", "1"]
    process = subprocess.Popen(command)
    while not (out.exists() and len(list(out.iterdir())) > 3):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    done_by_then = {p.name: p.stat().st_mtime_ns for p in out.glob("*.json")}
    assert all(json.loads((out / name).read_text())["error"] is None for name in done_by_then)
    assert len(done_by_then) < 40
    subprocess.run(command, check=True, timeout=300)
    after = {p.name: p.stat().st_mtime_ns for p in out.glob("*.json")}
    assert len(after) == 40
    assert all(after[name] == when for name, when in done_by_then.items())
