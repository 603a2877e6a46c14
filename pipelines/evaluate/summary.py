"""The summary of an evaluation: every number that a report or a model card may state, and everything that produced it.

Made from predictions and settings alone, so that scoring again (`--rescore`) gives the same summary. What may differ
between two runs of one evaluation is in `timing` and `environments` only.
"""

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipelines.corpora.sources import contamination_notes, source_of
from pipelines.errors import EvaluationError
from pipelines.evaluate.comparison import Comparison, compare
from pipelines.evaluate.confidence import Confidence, measure_confidence
from pipelines.evaluate.error_analysis import Analysis, analyse
from pipelines.evaluate.normalizers import Normalizer, Pair, make_pairs, open_normalizer
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

Loaded = TypeVar("Loaded")
FORMAT = 2
MAX_FAILURES_LISTED = 100
MAX_INCOMPLETE_NAMED = 10
INCOMPLETE = frozenset({"input_truncated", "input_damaged"})  # warnings of recordings that have lost sound


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an evaluation is: written before it starts, compared before it resumes."""

    provider: str
    model: dict[str, Any]  # its identity, as the provider states it
    scored: dict[str, Any]  # the set's identity, see `EvalSet.identity`
    text_policy: dict[str, str] = field(default_factory=dict)  # the recipe's `text_*`, for the normaliser "recipe"
    trained_on: str | None = None  # corpus of the training recipe, if known
    environments: tuple[dict[str, Any], ...] = ()  # where answers were computed; several if it was resumed elsewhere

    @property
    def corpus_name(self) -> str:
        return str(self.scored.get("corpus", "unknown"))

    @property
    def section(self) -> CorpusSection:
        return CorpusSection.model_validate({"path": "unused", **self.text_policy})


@dataclass(frozen=True, kw_only=True)
class Score:
    """Error rates under one normaliser; rates are fractions, None if the references contain no words."""

    normalizer: str
    detail: str
    wer: float | None
    interval: Interval | None
    word_errors: WordErrors
    cer: float | None
    character_errors: CharacterErrors


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """What drafts did in greedy decoding, over the utterances that were decoded with them."""

    utterances: int
    passes_per_utterance: float  # of the decoder
    passes_per_token: float  # that it wrote; 1 without drafts
    accepted_share: float  # of these tokens, those that were drafted


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long it took."""

    audio_s: float  # of the answered utterances
    time_s: float  # wall time of their answers, summed
    # audio_s / time_s of a local system. Reading and decoding files is not included, warm-up is. None for a remote
    # system, whose times are latencies with network and queue.
    rtfx: float | None
    drafts: Drafting | None = None


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Parameters of the intervals and of the probabilities of improvement."""

    replications: int = REPLICATIONS
    seed: int = SEED


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An utterance without an answer."""

    utterance_id: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One evaluation in numbers; `scores[0]` is the headline, and the analysis uses its normaliser."""

    settings: Settings
    scores: tuple[Score, ...]
    analysis: Analysis
    failures: tuple[Failure, ...]
    timing: Timing
    notes: tuple[str, ...]
    comparison: Comparison | None
    confidence: Confidence | None = None
    versions: dict[str, str]
    bootstrap: Bootstrap = Bootstrap()
    format: int = FORMAT

    @property
    def headline(self) -> Score:
        return self.scores[0]

    @property
    def word_errors(self) -> WordErrors:
        """Word errors of the headline."""
        return self.headline.word_errors

    @property
    def name(self) -> str:
        """Name the system for a title, such as "tinyaudio: demo"."""
        model = self.settings.model.get("name") or self.settings.model.get("id")
        return f"{self.settings.provider}: {model}" if model else self.settings.provider


_SETTINGS, _SUMMARY = TypeAdapter(Settings), TypeAdapter(Summary)


def save_settings(path: Path, settings: Settings) -> None:
    write_text(path, _SETTINGS.dump_json(settings, indent=2).decode() + "\n")


def load_settings(path: Path) -> Settings:
    """Read settings.json; errors as `load_summary`."""
    return _load(path, _SETTINGS)


def save_summary(path: Path, summary: Summary) -> None:
    write_text(path, _SUMMARY.dump_json(summary, indent=2).decode() + "\n")


def load_summary(path: Path) -> Summary:
    """Read summary.json.

    Raises:
        EvaluationError: missing, damaged, or of another format.
    """
    return _load(path, _SUMMARY)


def _load(path: Path, adapter: TypeAdapter[Loaded]) -> Loaded:
    if not path.is_file():
        raise EvaluationError(f"{str(path)!r} does not exist; expected the folder of an evaluation")
    try:
        content = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
        found = content.get("format", FORMAT)
        if found != FORMAT:
            raise EvaluationError(f"{str(path)!r} has format {found}; expected {FORMAT}. Score again with --rescore")
        return adapter.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EvaluationError(f"{str(path)!r} is not readable: {where}: {first['msg']}") from error


def summarize(
    settings: Settings,
    predictions: Sequence[Prediction],
    *,
    normalizer: str = "recipe",
    other: tuple[Settings, Sequence[Prediction]] | None = None,
) -> Summary:
    """Score predictions.

    Args:
        predictions: all of them, failures included.
        normalizer: the headline's; "recipe" and "whisper" are always scored as well.
        other: another evaluation of the same set, to compare with.

    Raises:
        EvaluationError: nothing to score, no such normaliser, or another set in `other`.
    """
    if not predictions:
        raise EvaluationError("no predictions to score; expected at least one utterance")
    corpus = settings.corpus_name
    predictions = [replace(one, source=one.source or source_of(corpus, one.utterance_id)) for one in predictions]
    answered = [one for one in predictions if not one.is_failed]
    failed = [one for one in predictions if one.is_failed]

    names = dict.fromkeys([normalizer, "recipe", "whisper"])
    normalizers = [open_normalizer(name, settings.section) for name in names]
    pairs = [make_pairs(answered, each) for each in normalizers]
    comparison = None
    if other is not None:
        comparison = compare(_two_names(settings, other[0]), predictions, other[1], normalizers[0])

    audio_s, time_s = sum(one.duration for one in answered), sum(one.time for one in answered)
    is_remote = any(environment.get("is_remote") for environment in settings.environments)
    encoder = settings.model.get("encoder")
    notes = contamination_notes(
        settings.trained_on,
        encoder.get("id") if isinstance(encoder, dict) else None,
        " ".join(filter(None, (corpus, settings.scored.get("config")))),
    )
    incomplete = [one for one in answered if not INCOMPLETE.isdisjoint(one.warnings)]
    if incomplete:
        ids = [one.utterance_id for one in incomplete]
        more = f" and {len(ids) - MAX_INCOMPLETE_NAMED} more" if len(ids) > MAX_INCOMPLETE_NAMED else ""
        notes = [
            f"{len(ids)} of {len(predictions)} recordings are cut short or damaged, and were scored against their "
            f"whole transcripts: {', '.join(ids[:MAX_INCOMPLETE_NAMED])}{more}.",
            *notes,
        ]
    failures = [Failure(utterance_id=one.utterance_id, error=str(one.error)) for one in failed]
    return Summary(
        settings=settings,
        scores=tuple(_score(each, of_it, len(failed)) for each, of_it in zip(normalizers, pairs, strict=True)),
        analysis=analyse(pairs[0], failed),
        failures=tuple(failures[:MAX_FAILURES_LISTED]),
        timing=Timing(
            audio_s=audio_s,
            time_s=time_s,
            rtfx=audio_s / time_s if time_s and not is_remote else None,
            drafts=_drafting(answered),
        ),
        notes=tuple(notes),
        comparison=comparison,
        confidence=measure_confidence(pairs[0], normalizers[0]),
        versions=code_versions(),
    )


def _drafting(answered: Sequence[Prediction]) -> Drafting | None:
    counts = [(one.num_passes, one.num_tokens, one.num_accepted or 0) for one in answered if one.num_tokens]
    if not counts:
        return None
    passes, tokens, accepted = (sum(numbers) for numbers in zip(*counts, strict=True))
    return Drafting(
        utterances=len(counts),
        passes_per_utterance=passes / len(counts),
        passes_per_token=passes / tokens,
        accepted_share=accepted / tokens,
    )


def _score(normalizer: Normalizer, pairs: Sequence[Pair], failed: int) -> Score:
    references, hypotheses = [pair.reference for pair in pairs], [pair.hypothesis for pair in pairs]
    words = count_word_errors(references, hypotheses, failed)
    characters = count_character_errors(references, hypotheses)
    return Score(
        normalizer=normalizer.name,
        detail=normalizer.detail,
        wer=words.wer if words.words else None,
        interval=wer_interval(references, hypotheses),
        word_errors=words,
        cer=characters.cer if characters.characters else None,
        character_errors=characters,
    )


def _two_names(settings: Settings, other: Settings) -> tuple[str, str]:
    """Name two systems by their models, told apart by provider where the models have one name."""
    mine, theirs = (str(one.model.get("name") or one.model.get("id") or one.provider) for one in (settings, other))
    if mine == theirs:
        mine, theirs = f"{mine} ({settings.provider})", f"{theirs} ({other.provider})"
    return mine, theirs if mine != theirs else f"{theirs}, other"


def code_versions() -> dict[str, str]:
    """Return what scored: our version, our commit if this is a checkout, and the scorers' versions."""
    found = {"tinyaudio": __version__, "python": platform.python_version()}
    found |= {name: version(name) for name in ("jiwer", "kaldialign", "whisper-normalizer")}
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        describe = ["git", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=, with uncommitted changes"]
        try:
            done = subprocess.run(describe, cwd=root, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return found
        if done.returncode == 0:
            found["commit"] = done.stdout.strip()
    return found
