"""Normalisers: what is done to both sides before words are compared. Predictions stay raw; this happens when scoring.

"recipe" is the corpus's own text policy, the one the model was trained on; "whisper" and "basic" are Whisper's English
and basic normalisers from the whisper-normalizer package, whose version is part of every score; "none" folds white
space only. The Open ASR Leaderboard's normaliser is a later relative of "whisper" and lies in no package: a number
under "whisper" is near the leaderboard's but is not it.

Known quirks of "whisper", kept as they are: "it's o'clock" becomes "it is 0 clock"; fillers such as "uh" are removed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version

from pipelines.corpora.transcripts import prepare_transcript
from pipelines.errors import EvaluationError
from pipelines.recipes.recipe import CorpusSection

NAMES = ("recipe", "whisper", "basic", "none")


@dataclass(frozen=True, kw_only=True)
class Normalizer:
    """A named text function; `detail` is the version or the settings that make it exact."""

    name: str
    detail: str
    apply: Callable[[str], str]


def open_normalizer(name: str, section: CorpusSection) -> Normalizer:
    """Open a normaliser by name.

    Args:
        name: one of `NAMES`.
        section: the corpus, for "recipe".

    Raises:
        EvaluationError: no such normaliser.
    """
    if name == "recipe":
        detail = ", ".join(f"{key.removeprefix('text_')} {value}" for key, value in text_policy(section).items())
        return Normalizer(name=name, detail=detail, apply=lambda text: prepare_transcript(text, section))
    if name == "none":
        return Normalizer(name=name, detail="white space folded", apply=lambda text: " ".join(text.split()))
    if name in ("whisper", "basic"):
        detail = f"whisper-normalizer {version('whisper-normalizer')}"
        return Normalizer(name=name, detail=detail, apply=_whisper() if name == "whisper" else _basic())
    raise EvaluationError(f"no normaliser {name!r}; expected one of {', '.join(NAMES)}")


def text_policy(section: CorpusSection) -> dict[str, str]:
    """Return a corpus section's `text_*` settings: all that `prepare_transcript` looks at."""
    return {key: str(value) for key, value in section.model_dump().items() if key.startswith("text_")}


@lru_cache(maxsize=1)
def _whisper() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    normalize = EnglishTextNormalizer()
    return lambda text: " ".join(normalize(text).split())


@lru_cache(maxsize=1)
def _basic() -> Callable[[str], str]:
    from whisper_normalizer.basic import BasicTextNormalizer

    normalize = BasicTextNormalizer()
    return lambda text: " ".join(normalize(text).split())
