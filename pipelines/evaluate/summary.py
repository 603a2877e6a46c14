"""The summary of an evaluation: every number that a report or a model card may state, and everything that made it.

Made from predictions and settings alone, so that scoring again (`--rescore`) gives the same summary as scoring. What
may differ between two runs of one evaluation stands in `timing` and `environments` only.
"""

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipelines.corpora.sources import contamination_notes, source_of
from pipelines.errors import EvaluationError
from pipelines.evaluate.comparison import Comparison, Side, compare
from pipelines.evaluate.error_analysis import Analysis, Pair, analyse
from pipelines.evaluate.normalizers import Normalizer, open_normalizer
from pipelines.evaluate.predictions import Prediction
from pipelines.files import write_text
from pipelines.recipes.recipe import CorpusSection
from pipelines.scoring import (
    REPLICATIONS,
    SEED,
    CharacterErrors,
    Interval,
    WordErrors,
    count_character_errors,
    count_word_errors,
    wer_interval,
)
from tinyaudio.version import __version__

FORMAT = 2
MAX_FAILURES_LISTED = 100


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an evaluation is: written before it starts, compared before it goes on.

    Args:
        provider: the system's kind. model: its identity, as the provider states it.
        scored: the set's identity, see `EvalSet.identity`.
        text_policy: the recipe's `text_*` settings, for the normaliser "recipe".
        trained_on: corpus of the training recipe, if known.
        environments: what answers were computed on; more than one if the evaluation moved.
    """

    provider: str
    model: dict[str, Any]
    scored: dict[str, Any]
    text_policy: dict[str, str] = field(default_factory=dict)
    trained_on: str | None = None
    environments: tuple[dict[str, Any], ...] = ()

    @property
    def corpus_name(self) -> str:
        return str(self.scored.get("corpus", "unknown"))

    @property
    def section(self) -> CorpusSection:
        return CorpusSection.model_validate({"path": "unused", **self.text_policy})


@dataclass(frozen=True, kw_only=True)
class Score:
    """Error rates under one normaliser; rates are fractions, None where the references hold no words."""

    normalizer: str
    detail: str
    merge_compounds: bool
    wer: float | None
    interval: Interval | None
    word_errors: WordErrors
    cer: float | None
    character_errors: CharacterErrors

    @property
    def label(self) -> str:
        """Name the text that was compared."""
        return f"{self.normalizer}, compounds merged" if self.merge_compounds else self.normalizer


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long it took.

    Args:
        audio_s: of the answered utterances. time_s: wall time of their answers, summed.
        rtfx: audio_s / time_s of a local system; reading and decoding of files is not counted, and no warm-up is left
            out. None for a remote one, whose times are latencies with network and queue, and for stored features, whose
            times leave the encoder out.
    """

    audio_s: float
    time_s: float
    rtfx: float | None


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """What intervals and probabilities of improvement were drawn with."""

    replications: int = REPLICATIONS
    seed: int = SEED


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An utterance without an answer."""

    utterance_id: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One evaluation in numbers; `scores[0]` is the headline, and the analysis is under its normaliser."""

    settings: Settings
    scores: tuple[Score, ...]
    analysis: Analysis
    failures: tuple[Failure, ...]
    timing: Timing
    notes: tuple[str, ...]
    comparison: Comparison | None
    versions: dict[str, str]
    bootstrap: Bootstrap = Bootstrap()
    format: int = FORMAT

    @property
    def headline(self) -> Score:
        return self.scores[0]

    @property
    def name(self) -> str:
        """Name the system for people."""
        model = self.settings.model.get("name") or self.settings.model.get("id")
        return f"{self.settings.provider}: {model}" if model else self.settings.provider


class _Format(BaseModel):
    """What a summary of any format says."""

    format: int


_SETTINGS, _SUMMARY = TypeAdapter(Settings), TypeAdapter(Summary)


def save_settings(path: Path, settings: Settings) -> None:
    write_text(path, _SETTINGS.dump_json(settings, indent=2).decode() + "\n")


def load_settings(path: Path) -> Settings:
    """Read settings.json; errors as `load_summary`."""
    loaded: Settings = _load(path, _SETTINGS)
    return loaded


def save_summary(path: Path, summary: Summary) -> None:
    write_text(path, _SUMMARY.dump_json(summary, indent=2).decode() + "\n")


def load_summary(path: Path) -> Summary:
    """Read summary.json.

    Raises:
        EvaluationError: missing, damaged, or of another format.
    """
    summary: Summary = _load(path, _SUMMARY)
    return summary


def _load(path: Path, adapter: TypeAdapter[Any]) -> Any:
    if not path.is_file():
        raise EvaluationError(f"{str(path)!r} does not exist; expected the folder of an evaluation")
    content = path.read_bytes()
    try:
        found = _Format.model_validate_json(content).format if adapter is _SUMMARY else FORMAT
        if found != FORMAT:
            raise EvaluationError(f"{str(path)!r} has format {found}; expected {FORMAT}; score again with --rescore")
        return adapter.validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EvaluationError(f"{str(path)!r} is not readable: {where}: {first['msg']}") from error


def summarize(
    settings: Settings,
    predictions: Sequence[Prediction],
    *,
    normalizer: str = "recipe",
    merge_compounds: bool = False,
    other: tuple[Settings, Sequence[Prediction]] | None = None,
) -> Summary:
    """Score predictions.

    Args:
        settings: of the evaluation.
        predictions: all of them, failures included.
        normalizer: the headline's; "recipe" and "whisper" are always scored as well.
        merge_compounds: count "note book" for "notebook" as right, in the headline.
        other: another evaluation of the same set, to compare with.

    Raises:
        EvaluationError: nothing to score, no such normaliser, or another set in `other`.
    """
    if not predictions:
        raise EvaluationError("no predictions to score; expected at least one utterance")
    predictions = [_with_source(one, settings.corpus_name) for one in predictions]
    failed = [one for one in predictions if one.is_failed]
    headline = open_normalizer(normalizer, settings.section)
    pairs = make_pairs(predictions, headline)
    scores = [_score(headline, pairs, len(failed), merge_compounds)]
    for name, merge in (("recipe", False), ("whisper", False)):
        if (name, merge) != (normalizer, merge_compounds):
            other_normalizer = open_normalizer(name, settings.section)
            scores.append(_score(other_normalizer, make_pairs(predictions, other_normalizer), len(failed), merge))
    comparison = None
    if other is not None:
        names = _two_names(settings, other[0])
        sides = [_side(name, each, headline) for name, each in zip(names, (predictions, other[1]), strict=True)]
        comparison = compare(*sides, merge_compounds=merge_compounds)
    return Summary(
        settings=settings,
        scores=tuple(scores),
        analysis=analyse(pairs, failed, merge_compounds=merge_compounds),
        failures=tuple(_failures(predictions)),
        timing=_timing(settings, predictions),
        notes=tuple(_notes(settings)),
        comparison=comparison,
        versions=code_versions(),
    )


def make_pairs(predictions: Sequence[Prediction], normalizer: Normalizer) -> list[Pair]:
    """Normalise both sides of every answered utterance."""
    return [
        Pair(prediction=one, reference=normalizer.apply(one.text), hypothesis=normalizer.apply(one.pred_text))
        for one in predictions
        if one.pred_text is not None
    ]


def _side(name: str, predictions: Sequence[Prediction], normalizer: Normalizer) -> Side:
    failed = {one.utterance_id for one in predictions if one.is_failed}
    return Side(name=name, pairs=make_pairs(predictions, normalizer), failed=failed)


def _with_source(prediction: Prediction, corpus_name: str) -> Prediction:
    if prediction.source is not None:
        return prediction
    return replace(prediction, source=source_of(corpus_name, prediction.utterance_id))


def _score(normalizer: Normalizer, pairs: Sequence[Pair], failed: int, merge_compounds: bool) -> Score:
    references, hypotheses = [pair.reference for pair in pairs], [pair.hypothesis for pair in pairs]
    words = count_word_errors(references, hypotheses, failed, merge_compounds=merge_compounds)
    characters = count_character_errors(references, hypotheses)
    return Score(
        normalizer=normalizer.name,
        detail=normalizer.detail,
        merge_compounds=merge_compounds,
        wer=words.wer if words.words else None,
        interval=wer_interval(references, hypotheses, merge_compounds=merge_compounds),
        word_errors=words,
        cer=characters.cer if characters.characters else None,
        character_errors=characters,
    )


def _two_names(settings: Settings, other: Settings) -> tuple[str, str]:
    names = [str(one.model.get("name") or one.model.get("id") or one.provider) for one in (settings, other)]
    if names[0] == names[1]:
        names = [f"{name} ({one.provider})" for name, one in zip(names, (settings, other), strict=True)]
    return (names[0], names[1]) if names[0] != names[1] else (names[0], f"{names[1]}, other")


def _failures(predictions: Sequence[Prediction]) -> list[Failure]:
    failed = [Failure(utterance_id=one.utterance_id, error=str(one.error)) for one in predictions if one.is_failed]
    return failed[:MAX_FAILURES_LISTED]


def _timing(settings: Settings, predictions: Sequence[Prediction]) -> Timing:
    audio_s = sum(one.duration for one in predictions if not one.is_failed)
    time_s = sum(one.time for one in predictions if not one.is_failed)
    is_remote = any(environment.get("is_remote") for environment in settings.environments)
    is_whole = not is_remote and settings.scored.get("store_fingerprint") is None
    return Timing(audio_s=audio_s, time_s=time_s, rtfx=audio_s / time_s if time_s and is_whole else None)


def _notes(settings: Settings) -> list[str]:
    encoder = settings.model.get("encoder")
    encoder_id = encoder.get("id") if isinstance(encoder, dict) else None
    scored_on = " ".join(filter(None, (settings.corpus_name, settings.scored.get("config"))))
    return contamination_notes(settings.trained_on, encoder_id, scored_on)


def code_versions() -> dict[str, str]:
    """Return what scored: our version, our commit if this is a checkout, and the scorers' versions."""
    found = {"tinyaudio": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in ("jiwer", "kaldialign", "whisper-normalizer")}
    commit = _git("rev-parse", "HEAD")
    if commit:
        is_changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
        found["commit"] = f"{commit}, with uncommitted changes" if is_changed else commit
    return found


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
