"""Evaluations that are killed end like undisturbed ones, and decode nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from evaluations import NUM_CLIPS, answers, noise_clips  # noqa: F401 (a fixture)

SLOW_SYSTEM = """
import sys, time
from pathlib import Path
from pipelines.evaluate.eval_sets import open_eval_set
from pipelines.evaluate.stage import evaluate
from pipelines.recipes.recipe import CorpusSection

class Slow:
    name = "slow"
    def identity(self): return {"version": 1}
    def environment(self): return {}
    def transcribe(self, clips):
        for clip in clips:
            time.sleep(0.05)
            with open(sys.argv[3], "a") as asked: asked.write(clip.utterance_id + "\\n")
            yield clip.answer(f"a cat and a frog {len(clip.samples)}", time_s=0.05)

evaluate(Slow(), open_eval_set(CorpusSection(path=sys.argv[1]), split="test"), Path(sys.argv[2]))
"""


def test_a_killed_evaluation_ends_like_an_undisturbed_one_and_decodes_nothing_twice(
    corpus: Path, tmp_path: Path
) -> None:
    def start(output: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-c",
            SLOW_SYSTEM,
            str(corpus),
            str(tmp_path / output),
            str(tmp_path / f"{output}.asked"),
        ]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())})

    whole = start("whole")
    killed = start("killed")
    asked = tmp_path / "killed.asked"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (asked.exists() and len(asked.read_text().split()) >= 5):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    logged = len((tmp_path / "killed" / "predictions.jsonl").read_bytes().split(b"\n")) - 1
    assert 4 <= logged < NUM_CLIPS
    assert start("killed").wait(60) == 0
    assert whole.wait(60) == 0
    # the clip in flight when the kill came may be asked for again; none that had an answer on the disk is
    assert len(asked.read_text().split()) <= NUM_CLIPS + 1
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")]
    assert summaries[0] == summaries[1]
    assert answers(tmp_path / "whole") == answers(tmp_path / "killed")


def test_a_checkpoint_killed_in_the_middle_decodes_nothing_twice(
    corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tinyaudio", "eval", str(checkpoint), "--corpus", str(corpus), "--device", "cpu"]
    command += ["--batch-size", "1", "--num-beams", "8", "--output"]
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1"}

    def start(output: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, str(tmp_path / output)], env=environment, stderr=subprocess.DEVNULL)

    def lines(output: str) -> list[str]:
        path = tmp_path / output / "predictions.jsonl"
        return path.read_text().splitlines(keepends=True) if path.exists() else []

    killed = start("killed")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(lines("killed")) < 3:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = [line for line in lines("killed") if line.endswith("\n")]
    assert 3 <= len(before) < NUM_CLIPS
    assert start("killed").wait(120) == 0
    assert start("whole").wait(120) == 0
    assert set(before) <= set(lines("killed")), "with the times of the first process: not decoded again"
    whole, resumed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    for summary in (whole, resumed):
        del summary["timing"]
    assert whole == resumed
    assert answers(tmp_path / "whole") == answers(tmp_path / "killed")
