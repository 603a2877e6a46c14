"""Evaluations that are killed end like undisturbed ones, and decode nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from evaluations import NUM_CLIPS, answers, noise_clips, run_eval  # noqa: F401 (a fixture)


def test_a_checkpoint_killed_in_the_middle_decodes_nothing_twice(
    corpus: Path, checkpoint: Path, tmp_path: Path
) -> None:
    command = [str(checkpoint), "--corpus", str(corpus), "--device", "cpu", "--batch-size", "1", "--num-beams", "8"]
    predictions = tmp_path / "killed" / "predictions.jsonl"

    def lines() -> list[str]:
        return predictions.read_text().splitlines(keepends=True) if predictions.exists() else []

    process = [sys.executable, "-m", "tinyaudio", "eval", *command, "--output", tmp_path / "killed"]
    killed = subprocess.Popen(process, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(lines()) < 3:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = [line for line in lines() if line.endswith("\n")]
    assert 3 <= len(before) < NUM_CLIPS
    for name in ("killed", "whole"):
        assert run_eval(*command, "--output", str(tmp_path / name)).exit_code == 0
    assert set(before) <= set(lines()), "with the times of the first process: not decoded again"
    whole, resumed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed"))
    for summary in (whole, resumed):
        del summary["timing"]
    assert whole == resumed
    assert answers(tmp_path / "whole") == answers(tmp_path / "killed")
