"""Two systems on the same utterances: their word error rates, and how certain the difference is."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.errors import EvaluationError
from pipelines.evaluate.normalizers import Normalizer, make_pairs
from pipelines.evaluate.predictions import Prediction
from pipelines.scoring import count_word_errors, probability_of_improvement


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two systems on the utterances that both answered."""

    name: str
    other_name: str
    utterances: int  # compared
    failed: int  # of both sets, without an answer of one or both systems
    unshared: int  # of one of the two sets only, as with different samples
    wer: float | None  # fraction, over the compared utterances; None if the references contain no words
    other_wer: float | None
    # Share of resamples in which a system has fewer errors (paired bootstrap over utterances, Bisani and Ney 2004); the
    # rest, up to 1, are ties.
    p_better: float
    p_other_better: float
    num_better: int  # utterances on which the first system has fewer errors
    num_worse: int
    num_tied: int


def compare(
    names: tuple[str, str], mine: Sequence[Prediction], other: Sequence[Prediction], normalizer: Normalizer
) -> Comparison:
    """Compare two systems' predictions of the same set, failures included.

    Raises:
        EvaluationError: no utterance that both answered, or one with two different references.
    """
    others = {pair.prediction.utterance_id: pair for pair in make_pairs(other, normalizer)}
    answered = make_pairs(mine, normalizer)
    common = [(one, others[one.prediction.utterance_id]) for one in answered if one.prediction.utterance_id in others]
    if not common:
        raise EvaluationError(f"{names[0]!r} and {names[1]!r} have no utterance in common; expected the same set")
    for one, two in common:
        if one.reference != two.reference:
            raise EvaluationError(
                f"utterance {one.prediction.utterance_id!r} has two references, {one.reference!r} and "
                f"{two.reference!r}; expected the same set"
            )
    references = [one.reference for one, _ in common]
    texts, other_texts = ([pair.hypothesis for pair in side] for side in zip(*common, strict=True))
    counts, other_counts = count_word_errors(references, texts), count_word_errors(references, other_texts)
    differences = [
        count_word_errors([reference], [text]).errors - count_word_errors([reference], [other_text]).errors
        for reference, text, other_text in zip(references, texts, other_texts, strict=True)
    ]
    ids, other_ids = ({one.utterance_id for one in side} for side in (mine, other))
    return Comparison(
        name=names[0],
        other_name=names[1],
        utterances=len(common),
        failed=len(ids & other_ids) - len(common),
        unshared=len(ids ^ other_ids),
        wer=counts.wer if counts.words else None,
        other_wer=other_counts.wer if other_counts.words else None,
        p_better=probability_of_improvement(references, other_texts, texts),
        p_other_better=probability_of_improvement(references, texts, other_texts),
        num_better=sum(difference < 0 for difference in differences),
        num_worse=sum(difference > 0 for difference in differences),
        num_tied=sum(difference == 0 for difference in differences),
    )
