"""How well the scores of words tell wrong words from right ones, and how often the warnings of the CTC head are right.

A word is wrong if jiwer's alignment of the normalised texts calls it a substitution or an insertion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluate.normalizers import Normalizer, Pair
from pipelines.evaluate.predictions import WordScore
from pipelines.scoring import align_words

NUM_BINS = 10  # of equal width
SCORES = ("probability", "acoustic_score")  # of `WordScore`


@dataclass(frozen=True, kw_only=True)
class Bin:
    """The words with a score from `low` up to `high`."""

    low: float
    high: float
    num_words: int
    num_right: int
    mean_score: float


@dataclass(frozen=True, kw_only=True)
class ScoreQuality:
    """One score of words."""

    name: str  # as in `Word`
    num_words: int  # that have this score
    num_wrong: int  # of these
    # Area under the ROC curve: how often a right word has a higher score than a wrong one, ties by half.
    auc: float | None  # None if all words are right, or none is
    calibration_error: float  # mean distance of a bin's mean score from its share of right words, weighted by words
    bins: tuple[Bin, ...]  # that are not empty


@dataclass(frozen=True, kw_only=True)
class WarningQuality:
    """One warning of the CTC head."""

    code: str  # `unheard`, counted in words, or `missing`, counted in answers
    num_scored: int  # words or answers
    num_warned: int  # of them, warned of
    num_wrong: int  # of those warned of: wrong words, or answers that lack a word
    num_errors: int  # that the warning is for: inserted words, or answers that lack a word
    num_found: int  # of these errors, warned of


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """Scores and warnings of all answers that have them.

    `num_skipped` answers are not counted, since their words have other borders after normalisation.
    """

    scores: tuple[ScoreQuality, ...]
    warnings: tuple[WarningQuality, ...]
    num_skipped: int


def measure_confidence(pairs: Sequence[Pair], normalizer: Normalizer) -> Confidence | None:
    """Compare the scores of words with what jiwer says of them; None if no answer has scores.

    Args:
        pairs: answers, normalised by `normalizer`.
        normalizer: is applied to each scored word alone, since it may drop it or make several words of it.
    """
    scored, split_words, num_skipped = [], [], 0
    for pair in pairs:
        if pair.prediction.words is None:
            continue
        parts = [normalizer.apply(word.word).split() for word in pair.prediction.words]
        if [part for word in parts for part in word] == pair.hypothesis.split():
            scored.append(pair)
            split_words.append(parts)
        else:
            num_skipped += 1
    if not scored and not num_skipped:
        return None
    output = align_words([pair.reference for pair in scored], [pair.hypothesis for pair in scored])
    words: list[WordScore] = []
    kinds: list[str] = []  # of each word: "equal", "substitute" or "insert"
    lacks_words, is_warned = [], []  # of each answer
    for i, (pair, parts) in enumerate(zip(scored, split_words, strict=True)):
        chunks = output.alignments[i] if output else []
        steps = [chunk.type for chunk in chunks for _ in range(chunk.hyp_start_idx, chunk.hyp_end_idx)]
        lacks_words.append(any(chunk.type == "delete" for chunk in chunks))
        is_warned.append("missing" in pair.prediction.warnings)
        first = 0
        for word, part in zip(pair.prediction.words or (), parts, strict=True):
            own = steps[first : first + len(part)]
            first += len(part)
            if own:
                words.append(word)
                kinds.append(next((kind for kind in own if kind != "equal"), "equal"))
    unheard = np.array([word.is_unheard for word in words], bool)
    wrong, inserted = (np.isin(kinds, names) for names in (["substitute", "insert"], ["insert"]))
    return Confidence(
        scores=tuple(_score_quality(name, words, ~wrong) for name in SCORES),
        warnings=(
            _warning_quality("unheard", unheard, wrong, inserted),
            _warning_quality("missing", np.array(is_warned, bool), np.array(lacks_words, bool)),
        ),
        num_skipped=num_skipped,
    )


def _score_quality(name: str, words: Sequence[WordScore], is_right: NDArray[np.bool_]) -> ScoreQuality:
    values: list[float | None] = [getattr(word, name) for word in words]
    has_score = np.array([value is not None for value in values], bool)
    scores, right = np.array([value for value in values if value is not None], float), is_right[has_score]
    places = np.minimum((scores * NUM_BINS).astype(int), NUM_BINS - 1)
    bins = tuple(
        Bin(
            low=place / NUM_BINS,
            high=(place + 1) / NUM_BINS,
            num_words=int(inside.sum()),
            num_right=int(right[inside].sum()),
            mean_score=float(scores[inside].mean()),
        )
        for place in np.unique(places)
        for inside in [places == place]
    )
    return ScoreQuality(
        name=name,
        num_words=len(scores),
        num_wrong=int((~right).sum()),
        auc=area_under_roc(scores, right),
        calibration_error=sum(abs(one.mean_score * one.num_words - one.num_right) for one in bins)
        / max(1, len(scores)),
        bins=bins,
    )


def area_under_roc(scores: NDArray[np.float64], is_right: NDArray[np.bool_]) -> float | None:
    """Compute how often a right word has a higher score than a wrong one, ties by half, from ranks (Mann-Whitney)."""
    num_right, num_wrong = int(is_right.sum()), int((~is_right).sum())
    if not num_right or not num_wrong:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # of equal scores their mean
    return float((ranks[is_right].sum() - num_right * (num_right + 1) / 2) / (num_right * num_wrong))


def _warning_quality(
    code: str, is_warned: NDArray[np.bool_], is_wrong: NDArray[np.bool_], is_error: NDArray[np.bool_] | None = None
) -> WarningQuality:
    is_error = is_wrong if is_error is None else is_error
    return WarningQuality(
        code=code,
        num_scored=len(is_warned),
        num_warned=int(is_warned.sum()),
        num_wrong=int((is_warned & is_wrong).sum()),
        num_errors=int(is_error.sum()),
        num_found=int((is_warned & is_error).sum()),
    )
