"""Twelve clips, and `tinyaudio eval` on them, for the tests of `pipelines.evaluate.stage`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from pipelines.evaluate.predictions import Prediction
from tinyaudio.cli.app import app

NUM_CLIPS = 12


@pytest.fixture(name="corpus")
def noise_clips(tmp_path: Path) -> Path:
    """An audiofolder corpus of noise: utt-0, utt-1, ... in its split `test`, each longer than the last.

    Imported under this name, used as `corpus`.
    """
    split = tmp_path / "corpus" / "test"
    split.mkdir(parents=True)
    rng = np.random.default_rng(1)
    rows = ["file_name,id,text"]
    for i in range(NUM_CLIPS):
        soundfile.write(split / f"{i}.wav", 0.1 * rng.standard_normal(9_000 + 700 * i), 16_000)
        rows.append(f"{i}.wav,utt-{i},a cat and a dog {i}")
    (split / "metadata.csv").write_text("\n".join(rows) + "\n")
    return split.parent


def prediction(i: int, text: str, answer: str | None = None, **changes: Any) -> Prediction:
    """Make the answer to utt-i; None is a failure."""
    values: dict[str, Any] = {"audio_filepath": f"{i}.wav", "duration": 1.5 + i, "time": 0.1, "text": text}
    values |= {"pred_text": answer, "utterance_id": f"utt-{i}", "error": "late" if answer is None else None}
    return Prediction(**{**values, **changes})


def run_eval(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["eval", *arguments])


def numbers(result: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def answers(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return {line["utterance_id"]: line["pred_text"] for line in lines}
