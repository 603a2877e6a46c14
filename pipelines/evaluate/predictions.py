"""Predictions: what a system answered, one JSON line per utterance, with reference and answer as raw text.

The first five fields are the Open ASR Leaderboard's, so that its own scorer can read the file; the rest are ours. Text
is never normalised here; that happens when scoring, and can be repeated. A line is either an answer (`pred_text`,
perhaps empty) or a failure (`error`, and `pred_text` is null); a failure is never an empty answer.

Source of the five fields: huggingface/open_asr_leaderboard @ d1e99b2, normalizer/eval_utils.py.
"""

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pipelines.errors import EvaluationError
from pipelines.files import write_text


@dataclass(frozen=True, kw_only=True)
class WordScore:
    """How sure one word of an answer is; as in `tinyaudio.model.transcript.Word`."""

    word: str
    probability: float | None
    acoustic_score: float | None
    is_unheard: bool


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One utterance and what a system made of it; a ValueError for both an answer and an error, or neither."""

    audio_filepath: str  # where the corpus keeps the audio; a name, not a path to open
    duration: float  # seconds of audio
    time: float  # seconds of wall time that the answer took; a batch's time is divided evenly
    text: str  # the reference, as the corpus has it
    pred_text: str | None  # the answer, as the system gave it; None if it failed
    utterance_id: str
    speaker: str | None = None
    sex: str | None = None
    source: str | None = None
    error: str | None = None  # why there is no answer; None if there is one
    warnings: tuple[str, ...] = ()  # codes of the guard, as in `tinyaudio.Transcript.warnings`, or of the provider
    words: tuple[WordScore, ...] | None = None  # of the answer, with their scores; None if the system gives none
    provider_id: str | None = None  # the id under which a paid provider keeps the answer
    num_passes: int | None = None  # what drafts did, as in `tinyaudio.model.transcript.DraftCounts`; None without
    num_tokens: int | None = None
    num_accepted: int | None = None

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


def read_predictions(path: Path) -> list[Prediction]:
    """Read a predictions file, ours or the leaderboard's, whose lines have no id: `audio_filepath` is used instead.

    Raises:
        EvaluationError: no such file, a line that is not a prediction, or two lines for one utterance.
    """
    if not path.is_file():
        raise EvaluationError(f"no predictions at {str(path)!r}; expected the predictions.jsonl of an evaluation")
    found: dict[str, Prediction] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            values: dict[str, Any] = json.loads(line)
            values.setdefault("utterance_id", values.get("audio_filepath"))
            values["warnings"] = tuple(values.get("warnings", ()))
            if values.get("words") is not None:
                values["words"] = tuple(WordScore(**word) for word in values["words"])
            one = Prediction(**{name: value for name, value in values.items() if name in _FIELDS})
        except (TypeError, ValueError, AttributeError) as error:
            raise EvaluationError(
                f"{str(path)!r} line {number} is not a prediction ({error}); "
                "expected JSON with audio_filepath, duration, time, text, pred_text"
            ) from error
        if one.utterance_id in found:
            raise EvaluationError(f"{str(path)!r} line {number}: {one.utterance_id!r} appears twice")
        found[one.utterance_id] = one
    return list(found.values())


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Replace a predictions file in one step."""
    write_text(path, "".join(one.to_line() for one in predictions))


def drop_torn_line(path: Path) -> None:
    """Cut off a last line without its line end, which a killed process leaves behind."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes; the lock ends with this process, however it ends.

    Raises:
        EvaluationError: another process holds it.
    """
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise EvaluationError(
                f"another process evaluates into {str(folder)!r}; wait for it, or name another folder with --output"
            ) from error
        yield
