"""Transcription with a trained model: run by `pytest -m slow`, on the demo's trained run.

The run is $TINYAUDIO_TRAINED, else runs/demo (`make demo` makes it). Each test prints the figures that it compares
with its limits.
"""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import jiwer
import numpy as np
import pyarrow.parquet
import pytest
import soundfile

from tinyaudio.model.audio import SAMPLING_RATE, load_audio

ROOT = Path(__file__).parent.parent
JOINED = 10  # utterances
TIMES_S = 0.15  # how far a segment may be from where its speech is known to be
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def run():
    folder = Path(os.environ.get("TINYAUDIO_TRAINED", ROOT / "runs" / "demo"))
    if not (folder / "config.json").is_file():
        pytest.skip(f"needs a trained run, and {str(folder)!r} has no model; `make demo` makes it")
    return folder


@pytest.fixture(scope="module")
def transcriber(run):
    from tinyaudio.transcribe import Transcriber

    return Transcriber.load(run, device="cpu")


@pytest.fixture(scope="module")
def test_set():
    """The demo's whole test split: [(samples, transcript)]."""
    (path,) = (ROOT / "pipelines/demo/corpus").glob("test-0*.parquet")
    return [(load_audio(row["wav"]["bytes"]), row["text"]) for row in pyarrow.parquet.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def joined(test_set):
    """The test set, ten utterances to a recording, 0.6 to 1.5 s of silence between: [(samples, [(start, end)])]."""
    rng = np.random.default_rng(0)
    return [join([samples for samples, _ in ten], rng) for ten in batched_of(test_set)]


def batched_of(items):
    return [items[i : i + JOINED] for i in range(0, len(items), JOINED)]


def join(utterances, rng):
    parts, times, at = [], [], 0
    for samples in utterances:
        pause = np.zeros(int(rng.uniform(0.6, 1.5) * SAMPLING_RATE), np.float32)
        times.append((at / SAMPLING_RATE, (at + len(samples)) / SAMPLING_RATE))
        parts += [samples, pause]
        at += len(samples) + len(pause)
    return np.concatenate(parts), times


def tinyaudio(*words, **options):
    command = [sys.executable, "-m", "tinyaudio", "transcribe", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **options)


def test_command_and_pipeline_write_one_text_at_any_batch_size(run, test_set, tmp_path):
    from transformers import pipeline

    for i, (samples, _) in enumerate(test_set):
        soundfile.write(tmp_path / f"{i:04}.wav", samples, SAMPLING_RATE, subtype="FLOAT")
    asr = pipeline("automatic-speech-recognition", model=str(run), trust_remote_code=True, device="cpu")
    texts = {}
    for batch_size in (1, 4, 16):
        done = tinyaudio(tmp_path, "--json", "-m", run, "--batch-size", batch_size, "--device", "cpu")
        assert done.returncode == 0, done.stderr
        texts["command", batch_size] = [json.loads(line)["text"] for line in done.stdout.splitlines()]
        outputs = asr([samples for samples, _ in test_set], batch_size=batch_size)
        texts["pipeline", batch_size] = [output["text"] for output in outputs]
    wer = jiwer.wer([text for _, text in test_set], texts["command", 1])
    print(f"{len(test_set)} utterances, word error rate {wer:.2%}; differing from the command at batch 1:")
    differing = {way: sum(a != b for a, b in zip(texts["command", 1], texts[way], strict=True)) for way in texts}
    print(differing)
    assert len(texts["command", 1]) == len(test_set)
    assert not any(differing.values()), differing


def test_ten_utterances_in_one_recording_are_those_ten(transcriber, test_set, joined):
    single = [transcript.text for transcript in transcriber.transcribe([samples for samples, _ in test_set])]
    references = [text for _, text in test_set]
    wer_single = jiwer.wer(references, single)
    transcripts = transcriber.transcribe([samples for samples, _ in joined])
    tens = [" ".join(ten) for ten in batched_of(references)]
    wer_joined = jiwer.wer(tens, [transcript.text for transcript in transcripts])
    num_segments = sum(len(transcript.segments) for transcript in transcripts)
    assert num_segments == len(test_set)
    off = [
        abs(found - known)
        for transcript, (_, times) in zip(transcripts, joined, strict=True)
        for segment, edges in zip(transcript.segments, times, strict=True)
        for found, known in zip((segment.start, segment.end), edges, strict=True)
    ]
    print(f"word error rate {wer_single:.2%} one by one, {wer_joined:.2%} joined; {num_segments} segments")
    print(f"edges off by {max(off) * 1000:.0f} ms at most, {np.median(off) * 1000:.0f} ms in the median")
    assert abs(wer_joined - wer_single) < 0.01
    assert max(off) < TIMES_S


@pytest.mark.parametrize("level", [0.001, 0.03, 0.3])
def test_what_is_not_speech_is_empty_or_has_a_warning(transcriber, level):
    t = np.arange(20 * SAMPLING_RATE) / SAMPLING_RATE
    noise = np.random.default_rng(0).standard_normal(len(t))
    chord = sum(np.sin(2 * np.pi * f * t) for f in (262, 330, 392)) / 3
    sounds = {
        "silence": 0 * t,
        "white noise": noise,
        "brown noise": np.cumsum(noise) / np.abs(np.cumsum(noise)).max(),
        "hum": np.sin(2 * np.pi * 60 * t) + 0.3 * np.sin(2 * np.pi * 180 * t),
        "chord": chord,
        "plucked": chord * np.exp(-3 * (t % 0.5)),
        "sweep": np.sin(2 * np.pi * (100 + 100 * t) * t),
        "clicks": (np.arange(len(t)) % 8000 < 20).astype(float),
    }
    for name, sound in sounds.items():
        (transcript,) = transcriber.transcribe([(level * sound).astype(np.float32)])
        print(f"{name} at {level}: {transcript.text!r} {transcript.warnings}")
        assert transcript.warnings
        assert not transcript.text, name


HOUR_SCRIPT = """
import json, re, resource, sys
from pathlib import Path
from tinyaudio.transcribe import Transcriber

def rss():
    return int(re.search("VmRSS:\\\\s+(\\\\d+)", Path("/proc/self/status").read_text())[1])

progress = []
transcriber = Transcriber.load(sys.argv[1], device="cpu")
(transcript,) = transcriber.transcribe(
    [sys.argv[2]], num_beams=1, on_progress=lambda p: progress.append((p.done_s, p.read_s, rss()))
)
print(json.dumps({**transcript.to_dict(), "progress": progress}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_over_an_hour_and_times_are_true(run, test_set, tmp_path):
    """The test set over and over with pauses: bounded memory, progress to the end, every segment where it is known."""
    rng, times, at = np.random.default_rng(1), [], 0
    with soundfile.SoundFile(tmp_path / "hour.wav", "w", SAMPLING_RATE, 1) as file:
        while at < 3600 * SAMPLING_RATE:
            picked = [test_set[i][0] for i in rng.integers(0, len(test_set), JOINED)]
            samples, known = join(picked, rng)
            times += [(at / SAMPLING_RATE + start, at / SAMPLING_RATE + end) for start, end in known]
            at += len(samples)
            file.write(samples)
    command = [sys.executable, "-c", HOUR_SCRIPT, str(run), str(tmp_path / "hour.wav")]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    hour = json.loads(done.stdout)
    done_s, read_s, rss_kb = zip(*hour["progress"], strict=True)
    early = max(kb for kb, seconds in zip(rss_kb, done_s, strict=True) if seconds < 300)
    off = [
        max(abs(segment["start"] - start), abs(segment["end"] - end))
        for segment, (start, end) in zip(hour["segments"], times, strict=True)
    ]
    print(f"{at / SAMPLING_RATE:.0f} s in {time.monotonic() - started:.0f} s; {len(times)} utterances")
    print(
        f"edges off by {max(off) * 1000:.0f} ms at most; memory {early / 1e3:.0f} MB in the first five minutes, ",
        end="",
    )
    print(f"{max(rss_kb) / 1e3:.0f} MB at most, {rss_kb[-1] / 1e3:.0f} MB at the end")
    assert hour["duration"] == pytest.approx(at / SAMPLING_RATE)
    assert max(off) < TIMES_S
    assert all(before <= after for before, after in pairwise(done_s))
    assert done_s[-1] == pytest.approx(at / SAMPLING_RATE)
    assert max(late - early for late, early in pairwise(done_s)) < 300, "progress is reported often"
    assert max(read - done for read, done in zip(read_s, done_s, strict=True)) < 600, "reading ahead is bounded"
    assert max(rss_kb) < 1.1 * early


def test_killed_half_way_leaves_whole_files_and_resumes(run, joined, tmp_path):
    for i, (samples, _) in enumerate(joined):
        soundfile.write(tmp_path / f"{i:02}.wav", samples, SAMPLING_RATE, subtype="FLOAT")
    words = [tmp_path, "-o", tmp_path / "out", "-f", "json,srt", "-m", run, "--skip-existing", "--batch-size", "1"]
    process = subprocess.Popen([sys.executable, "-m", "tinyaudio", "transcribe", *map(str, words)])
    while len(list((tmp_path / "out").glob("*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")}
    assert all(json.loads(data)["error"] is None for name, data in before.items() if name.endswith(".json"))
    again = tinyaudio(*words)
    assert again.returncode == 0, again.stderr
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")}
    print(f"killed with {len(before)} of {len(after)} files there; {again.stderr.splitlines()[-1]}")
    assert len(after) == 2 * len(joined) > len(before)
    assert {name: after[name] for name in before} == before
    assert "skipped (already there)" in again.stderr
