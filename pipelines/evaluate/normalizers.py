"""Text normalisers, applied to references and hypotheses when scoring. Predictions stay raw on disk.

"recipe" is the corpus's own text policy, which the model was trained on. "whisper" is Whisper's English normaliser from
the whisper-normalizer package, whose version is part of every score. "none" only folds white space. The Open ASR
Leaderboard's normaliser is a later variant of "whisper" and is in no package: a number under "whisper" is close to the
leaderboard's but not the same.

Known quirks of "whisper", kept as they are: "it's o'clock" becomes "it is 0 clock"; fillers such as "uh" are removed.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

from pipelines.corpora.transcripts import prepare_transcript
from pipelines.errors import EvaluationError
from pipelines.evaluate.predictions import Prediction
from pipelines.recipes.recipe import CorpusSection

NAMES = ("recipe", "whisper", "none")


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """A named text function; `detail` is the version or the settings that make it exact."""

    name: str
    detail: str
    apply: Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One answered utterance with both sides normalised."""

    prediction: Prediction
    reference: str
    hypothesis: str


def make_pairs(predictions: Iterable[Prediction], normalizer: Normalizer) -> list[Pair]:
    """Normalise both sides of every answered utterance; failures are left out."""
    return [
        Pair(prediction=one, reference=normalizer.apply(one.text), hypothesis=normalizer.apply(one.pred_text))
        for one in predictions
        if one.pred_text is not None
    ]


def open_normalizer(name: str, section: CorpusSection) -> Normalizer:
    """Open a normaliser by its name, one of `NAMES`; "recipe" takes the corpus's policy.

    Raises:
        EvaluationError: no such normaliser.
    """
    if name == "recipe":
        detail = ", ".join(f"{key.removeprefix('text_')} {value}" for key, value in text_policy(section).items())
        return Normalizer(name=name, detail=detail, apply=lambda text: prepare_transcript(text, section))
    if name == "none":
        return Normalizer(name=name, detail="white space folded", apply=lambda text: " ".join(text.split()))
    if name == "whisper":
        detail = f"whisper-normalizer {version('whisper-normalizer')}"
        return Normalizer(name=name, detail=detail, apply=_whisper())
    raise EvaluationError(f"no normaliser {name!r}; expected one of {', '.join(NAMES)}")


def text_policy(section: CorpusSection) -> dict[str, str]:
    """Return a corpus section's `text_*` settings, which are all that `prepare_transcript` reads."""
    return {key: str(value) for key, value in section.model_dump().items() if key.startswith("text_")}


@lru_cache(maxsize=1)  # loading its spelling list takes a moment
def _whisper() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    normalize = EnglishTextNormalizer()
    return lambda text: " ".join(normalize(text).split())
