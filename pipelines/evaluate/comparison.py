"""Two systems on the same utterances: the difference, and how sure one may be of it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipelines.errors import EvaluationError
from pipelines.evaluate.error_analysis import Pair
from pipelines.scoring import count_word_errors, probability_of_improvement


@dataclass(frozen=True, kw_only=True)
class Side:
    """One system of two: its answers, and the ids of the utterances that it did not answer."""

    name: str
    pairs: Sequence[Pair]
    failed: Collection[str] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two systems did with the utterances that both answered.

    Args:
        name, other_name: the systems.
        utterances: compared. failed: of both sets, but without an answer of one of the two or of both. unshared: of one
            of the two sets only, as with different samples.
        wer, other_wer: over the compared utterances, fractions; None where the references hold no words.
        p_other_better, p_better: share of resamples in which that system has fewer errors (paired bootstrap over
            utterances, Bisani and Ney 2004); what is missing to 1 are ties.
        num_better, num_worse, num_tied: utterances on which the first has fewer, more, as many errors.
    """

    name: str
    other_name: str
    utterances: int
    failed: int
    unshared: int
    wer: float | None
    other_wer: float | None
    p_better: float
    p_other_better: float
    num_better: int
    num_worse: int
    num_tied: int


def compare(mine: Side, other: Side, *, merge_compounds: bool = False) -> Comparison:
    """Compare answers to the same utterances.

    Raises:
        EvaluationError: no utterance in common, or one with two different references.
    """
    others = {pair.prediction.utterance_id: pair for pair in other.pairs}
    common = [
        (pair, others[pair.prediction.utterance_id]) for pair in mine.pairs if pair.prediction.utterance_id in others
    ]
    if not common:
        raise EvaluationError(f"{mine.name!r} and {other.name!r} have no utterance in common; expected the same set")
    for one, two in common:
        if one.reference != two.reference:
            raise EvaluationError(
                f"utterance {one.prediction.utterance_id!r} has two references, {one.reference!r} and "
                f"{two.reference!r}; expected the same set"
            )
    references = [one.reference for one, _ in common]
    texts, other_texts = ([side.hypothesis for side in sides] for sides in zip(*common, strict=True))
    wers = [count_word_errors(references, said, merge_compounds=merge_compounds) for said in (texts, other_texts)]
    wins = [
        _num_errors(reference, a, merge_compounds) - _num_errors(reference, b, merge_compounds)
        for reference, a, b in zip(references, texts, other_texts, strict=True)
    ]
    asked, other_asked = _asked(mine), _asked(other)
    return Comparison(
        name=mine.name,
        other_name=other.name,
        utterances=len(common),
        failed=len(asked & other_asked) - len(common),
        unshared=len(asked ^ other_asked),
        wer=wers[0].wer if wers[0].words else None,
        other_wer=wers[1].wer if wers[1].words else None,
        p_better=probability_of_improvement(references, other_texts, texts, merge_compounds=merge_compounds),
        p_other_better=probability_of_improvement(references, texts, other_texts, merge_compounds=merge_compounds),
        num_better=sum(difference < 0 for difference in wins),
        num_worse=sum(difference > 0 for difference in wins),
        num_tied=sum(difference == 0 for difference in wins),
    )


def _asked(side: Side) -> set[str]:
    return {pair.prediction.utterance_id for pair in side.pairs} | set(side.failed)


def _num_errors(reference: str, hypothesis: str, merge_compounds: bool) -> int:
    return count_word_errors([reference], [hypothesis], merge_compounds=merge_compounds).errors
