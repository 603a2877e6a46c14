"""Two systems on the same utterances: the difference, and how sure one may be of it."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.error_analysis import Pair
from pipelines.errors import EvaluationError
from pipelines.scoring import count_merging_compounds, count_word_errors, probability_of_improvement


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What two systems did with the utterances that both answered.

    Args:
        name, other_name: the systems.
        utterances: compared. left_out: failed or missing in one of the two.
        wer, other_wer: over the compared utterances, fractions; None where the references hold no words.
        p_other_better, p_better: share of resamples in which that system has fewer errors (paired bootstrap over
            utterances, Bisani and Ney 2004); what is missing to 1 are ties.
        num_better, num_worse, num_tied: utterances on which the first has fewer, more, as many errors.
    """

    name: str
    other_name: str
    utterances: int
    left_out: int
    wer: float | None
    other_wer: float | None
    p_better: float
    p_other_better: float
    num_better: int
    num_worse: int
    num_tied: int


def compare(
    name: str, pairs: Sequence[Pair], other_name: str, other_pairs: Sequence[Pair], *, merge_compounds: bool = False
) -> Comparison:
    """Compare answers to the same utterances.

    Raises:
        EvaluationError: no utterance in common, or one with two different references.
    """
    others = {pair.prediction.utterance_id: pair for pair in other_pairs}
    common = [(pair, others[pair.prediction.utterance_id]) for pair in pairs if pair.prediction.utterance_id in others]
    if not common:
        raise EvaluationError(f"{name!r} and {other_name!r} have no utterance in common; expected the same set")
    for mine, other in common:
        if mine.reference != other.reference:
            raise EvaluationError(
                f"utterance {mine.prediction.utterance_id!r} has two references, {mine.reference!r} and "
                f"{other.reference!r}; expected the same set"
            )
    references = [mine.reference for mine, _ in common]
    mine_texts, other_texts = ([side.hypothesis for side in sides] for sides in zip(*common, strict=True))
    count = count_merging_compounds if merge_compounds else count_word_errors
    wers = [count(references, texts) for texts in (mine_texts, other_texts)]
    wins = [
        count([reference], [a]).errors - count([reference], [b]).errors
        for reference, a, b in zip(references, mine_texts, other_texts, strict=True)
    ]
    return Comparison(
        name=name,
        other_name=other_name,
        utterances=len(common),
        left_out=len({pair.prediction.utterance_id for pair in pairs} | set(others)) - len(common),
        wer=wers[0].wer if wers[0].words else None,
        other_wer=wers[1].wer if wers[1].words else None,
        p_better=probability_of_improvement(references, other_texts, mine_texts, merge_compounds=merge_compounds),
        p_other_better=probability_of_improvement(references, mine_texts, other_texts, merge_compounds=merge_compounds),
        num_better=sum(difference < 0 for difference in wins),
        num_worse=sum(difference > 0 for difference in wins),
        num_tied=sum(difference == 0 for difference in wins),
    )
