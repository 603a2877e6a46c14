"""Predictions: what a system answered, one JSON line per utterance, raw on both sides.

The first five fields are the Open ASR Leaderboard's, so that its own scorer reads the file; the rest are ours. Text is
never normalised here: scoring does that, and can do it again. A line is either an answer (`pred_text`, perhaps empty)
or a failure (`error`, and `pred_text` is null); a failure is never an empty answer.

Source of the five fields: huggingface/open_asr_leaderboard @ d1e99b2, normalizer/eval_utils.py.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from pipelines.errors import EvaluationError
from pipelines.files import write_text


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One utterance and what a system made of it.

    Args:
        audio_filepath: where the corpus keeps the audio; a name, not something to open.
        duration, time: seconds of audio; seconds of wall time that the answer took (a batch is shared out evenly).
        text: the reference, as the corpus has it. pred_text: the answer, as the system gave it; None if it failed.
        error: why there is no answer; None if there is one.
        warnings: what a guard did to this answer, as `tinyaudio.Transcript.warnings`.
        provider_id: the id under which a paid provider keeps the answer.
    """

    audio_filepath: str
    duration: float
    time: float
    text: str
    pred_text: str | None
    utterance_id: str
    speaker: str | None = None
    sex: str | None = None
    source: str | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    provider_id: str | None = None

    def __post_init__(self) -> None:
        if (self.pred_text is None) == (self.error is None):
            raise ValueError(
                f"{self.utterance_id!r}: pred_text {self.pred_text!r} and error {self.error!r}; expected exactly one"
            )

    @property
    def is_failed(self) -> bool:
        return self.error is not None

    def to_line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


_FIELDS = {field.name for field in fields(Prediction)}
_LEADERBOARD = ("audio_filepath", "duration", "time", "text", "pred_text")


def read_predictions(path: Path) -> list[Prediction]:
    """Read a predictions file, ours or the leaderboard's (its lines have no id; the file path then serves).

    Raises:
        EvaluationError: no such file, a line that is not a prediction, or two lines for one utterance.
    """
    if not path.is_file():
        raise EvaluationError(f"no predictions at {str(path)!r}; expected the predictions.jsonl of an evaluation")
    found: dict[str, Prediction] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        one = _parse(line, f"{str(path)!r} line {number}")
        if one.utterance_id in found:
            raise EvaluationError(f"{str(path)!r} line {number}: {one.utterance_id!r} stands there twice")
        found[one.utterance_id] = one
    return list(found.values())


def _parse(line: str, where: str) -> Prediction:
    try:
        values: dict[str, Any] = json.loads(line)
        values.setdefault("utterance_id", values.get("audio_filepath"))
        values["warnings"] = tuple(values.get("warnings", ()))
        return Prediction(**{name: value for name, value in values.items() if name in _FIELDS})
    except (json.JSONDecodeError, TypeError, ValueError, AttributeError) as error:
        raise EvaluationError(
            f"{where} is not a prediction ({error}); expected JSON with {', '.join(_LEADERBOARD)}"
        ) from error


def drop_torn_line(path: Path) -> None:
    """Cut off a last line without its line end: what a killed process leaves behind."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
            os.fsync(stream.fileno())


class PredictionLog:
    """An open predictions file that grows line by line; a line is on the disk when `add` returns."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def add(self, prediction: Prediction) -> None:
        self._stream.write(prediction.to_line())
        self._stream.flush()
        os.fsync(self._stream.fileno())


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; the claim ends with the process, however it ends.

    Raises:
        EvaluationError: somebody else holds it.
    """
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EvaluationError(
                f"another process evaluates into {str(folder)!r}; wait for it, or name --output"
            ) from error
        yield


@contextmanager
def appending(path: Path) -> Iterator[PredictionLog]:
    """Open a predictions file to add lines to it."""
    with path.open("a", encoding="utf-8", newline="\n") as stream:
        yield PredictionLog(stream)


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Replace a predictions file in one step."""
    write_text(path, "".join(one.to_line() for one in predictions))
