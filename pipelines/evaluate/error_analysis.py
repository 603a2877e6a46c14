"""Where the errors are: alignments, confusions, rates of outputs that went wrong as a whole, and breakdowns.

Works on pairs that are normalised already. Loops and refusals are judged by `tinyaudio.model.guard`, the judge that
decoding uses, on the text as scored; an utterance whose reference reads like that itself is not counted.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jiwer
import kaldialign

from pipelines.evaluate.predictions import Prediction
from pipelines.scoring import Interval, WordErrors, align_words, count_word_errors, wer_interval
from tinyaudio.model.guard import EVENTS, judge

BUCKET_EDGES_S = (2.0, 5.0, 10.0, 20.0)
NUM_WORST, NUM_CONFUSIONS = 20, 20
MOST_ERRORS = 10  # utterances with more are counted with these in the histogram
UNKNOWN = "not stated"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One answered utterance with both sides normalised."""

    prediction: Prediction
    reference: str
    hypothesis: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """One column of an alignment; `kind` is "equal", "substitute", "delete" or "insert"; a missing word is empty.

    Where compounds are merged, one side of an equal column may hold several words.
    """

    kind: str
    reference: str
    hypothesis: str


@dataclass(frozen=True, kw_only=True)
class AlignedPair:
    """One utterance word by word."""

    utterance_id: str
    duration_s: float
    source: str | None
    num_errors: int
    num_words: int
    steps: tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """A kind of error and how often it was made; substitutions have both words."""

    kind: str
    reference: str
    hypothesis: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How many answers went wrong as a whole, out of `answered`.

    Args:
        empty: no word where the reference has some.
        looping, refusing: as `tinyaudio.model.guard.judge` finds them in the text as scored.
        guarded: answers that our guard warned about or repaired; `guard_codes` says how often each way.
        provider_codes: what else a provider said about its answers, such as that another model gave them.
        leading_deletions, trailing_deletions: answers that lack the first (last) word of their reference.
        empty_references: utterances without a word to recognise; every word there is an insertion.
    """

    answered: int
    empty: int
    looping: int
    refusing: int
    guarded: int
    guard_codes: dict[str, int]
    provider_codes: dict[str, int]
    leading_deletions: int
    trailing_deletions: int
    empty_references: int


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Word errors of a part of the set, with its share of hours; failures are counted and in neither."""

    name: str
    hours: float
    word_errors: WordErrors
    interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """All of it, for one set of predictions; `error_histogram[n]` utterances have n errors, the last one n or more."""

    rates: Rates
    error_histogram: tuple[int, ...]
    worst: tuple[AlignedPair, ...]
    confusions: tuple[Confusion, ...]
    breakdowns: dict[str, tuple[Slice, ...]]


def analyse(pairs: Sequence[Pair], failed: Sequence[Prediction] = (), *, merge_compounds: bool = False) -> Analysis:
    """Align all pairs once and say where the errors are.

    Args:
        pairs: what was answered.
        failed: what was not; counted in the breakdowns.
        merge_compounds: "note book" for "notebook" is no error.
    """
    utterances = _aligned(pairs, merge_compounds)
    return Analysis(
        rates=_rates(pairs, utterances),
        error_histogram=_histogram(utterances),
        worst=tuple(_worst(utterances)),
        confusions=tuple(_confusions(utterances)),
        breakdowns=_breakdowns(pairs, failed, merge_compounds),
    )


def align_pair(reference: str, hypothesis: str, *, merge_compounds: bool = False) -> tuple[Step, ...]:
    """Align two normalised texts."""
    if merge_compounds:
        return _merging_steps(reference, hypothesis)
    output = align_words([reference], [hypothesis])
    assert output is not None
    return _steps(output, 0)


def _aligned(pairs: Sequence[Pair], merge_compounds: bool) -> list[AlignedPair]:
    if merge_compounds:
        return [_aligned_pair(pair, _merging_steps(pair.reference, pair.hypothesis)) for pair in pairs]
    output = align_words([pair.reference for pair in pairs], [pair.hypothesis for pair in pairs])
    return [_aligned_pair(pair, _steps(output, i)) for i, pair in enumerate(pairs)] if output else []


def _aligned_pair(pair: Pair, steps: tuple[Step, ...]) -> AlignedPair:
    return AlignedPair(
        utterance_id=pair.prediction.utterance_id,
        duration_s=pair.prediction.duration,
        source=pair.prediction.source,
        num_errors=sum(step.kind != "equal" for step in steps),
        num_words=len(pair.reference.split()),
        steps=steps,
    )


def _merging_steps(reference: str, hypothesis: str) -> tuple[Step, ...]:
    columns = kaldialign.align(reference.split(), hypothesis.split(), "", merge_compounds=True)
    return tuple(Step(kind=_kind(*column), reference=column[0], hypothesis=column[1]) for column in columns)


def _kind(reference: str, hypothesis: str) -> str:
    if not reference or not hypothesis:
        return "delete" if reference else "insert"
    return "equal" if reference.replace(" ", "") == hypothesis.replace(" ", "") else "substitute"


def _steps(output: jiwer.WordOutput, i: int) -> tuple[Step, ...]:
    steps = []
    reference, hypothesis = output.references[i], output.hypotheses[i]
    for chunk in output.alignments[i]:
        left = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        right = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for k in range(max(len(left), len(right))):
            words = (left[k] if k < len(left) else "", right[k] if k < len(right) else "")
            steps.append(Step(kind=chunk.type, reference=words[0], hypothesis=words[1]))
    return tuple(steps)


def _histogram(utterances: Sequence[AlignedPair]) -> tuple[int, ...]:
    counts = Counter(min(one.num_errors, MOST_ERRORS) for one in utterances)
    return tuple(counts[n] for n in range(MOST_ERRORS + 1))


def _worst(utterances: Sequence[AlignedPair]) -> list[AlignedPair]:
    wrong = [one for one in utterances if one.num_errors]
    return sorted(wrong, key=lambda one: (-one.num_errors, -one.num_errors / max(one.num_words, 1), one.utterance_id))[
        :NUM_WORST
    ]


def _confusions(utterances: Sequence[AlignedPair]) -> list[Confusion]:
    """Count errors word by word; jiwer's own count would take a run of errors as one."""
    counts = Counter(
        (step.kind, step.reference, step.hypothesis) for one in utterances for step in one.steps if step.kind != "equal"
    )
    found = [Confusion(kind=k, reference=r, hypothesis=h, count=n) for (k, r, h), n in counts.items()]
    return sorted(found, key=lambda one: (-one.count, one.kind, one.reference, one.hypothesis))[:NUM_CONFUSIONS]


def _rates(pairs: Sequence[Pair], utterances: Sequence[AlignedPair]) -> Rates:
    verdicts = Counter(_verdict(pair) for pair in pairs)
    codes = Counter(code for pair in pairs for code in set(pair.prediction.warnings))
    with_words = [one for one in utterances if one.num_words]
    return Rates(
        answered=len(pairs),
        empty=sum(bool(pair.reference) and not pair.hypothesis for pair in pairs),
        looping=verdicts["repetition"],
        refusing=verdicts["refusal"],
        guarded=sum(not EVENTS.isdisjoint(pair.prediction.warnings) for pair in pairs),
        guard_codes={code: n for code, n in sorted(codes.items()) if code in EVENTS},
        provider_codes={code: n for code, n in sorted(codes.items()) if code not in EVENTS},
        leading_deletions=sum(_loses(one.steps) for one in with_words),
        trailing_deletions=sum(_loses(one.steps[::-1]) for one in with_words),
        empty_references=sum(not pair.reference for pair in pairs),
    )


def _verdict(pair: Pair) -> str | None:
    duration_s = pair.prediction.duration
    found = judge(pair.hypothesis, duration_s, is_complete=True)
    return None if found is None or judge(pair.reference, duration_s, is_complete=True) == found else found


def _loses(steps: Sequence[Step]) -> bool:
    """Tell whether the first word of the reference was deleted, whatever was inserted before it."""
    return next((step.kind == "delete" for step in steps if step.kind != "insert"), False)


def _breakdowns(
    pairs: Sequence[Pair], failed: Sequence[Prediction], merge_compounds: bool
) -> dict[str, tuple[Slice, ...]]:
    """Split by what the corpus knows; what it does not know about any utterance is left out."""
    keys: dict[str, Callable[[Prediction], str | None]] = {
        "source": lambda one: one.source,
        "duration": lambda one: bucket_name(one.duration) if one.duration else None,
        "sex": lambda one: one.sex,
    }
    found = {name: _slices(pairs, failed, key, merge_compounds) for name, key in keys.items()}
    return {name: slices for name, slices in found.items() if slices}


def _slices(
    pairs: Sequence[Pair],
    failed: Sequence[Prediction],
    key: Callable[[Prediction], str | None],
    merge_compounds: bool,
) -> tuple[Slice, ...]:
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(key(pair.prediction) or UNKNOWN, []).append(pair)
    num_failed = Counter(key(one) or UNKNOWN for one in failed)
    names = sorted({*groups, *num_failed}, key=_rank)
    if names in ([], [UNKNOWN]):
        return ()
    return tuple(_slice(name, groups.get(name, []), num_failed[name], merge_compounds) for name in names)


def _rank(name: str) -> tuple[bool, int, str]:
    """Order slices: buckets by duration, everything else by name, what is not stated last."""
    buckets = [bucket_name(edge) for edge in (0.0, *BUCKET_EDGES_S)]
    return name == UNKNOWN, buckets.index(name) if name in buckets else 0, name


def bucket_name(duration_s: float) -> str:
    """Name the duration bucket of an utterance, such as "2 to 5 s"."""
    low = 0.0
    for high in BUCKET_EDGES_S:
        if duration_s < high:
            return f"{low:g} to {high:g} s"
        low = high
    return f"{low:g} s and more"


def _slice(name: str, pairs: Sequence[Pair], num_failed: int, merge_compounds: bool) -> Slice:
    references, hypotheses = [pair.reference for pair in pairs], [pair.hypothesis for pair in pairs]
    return Slice(
        name=name,
        hours=sum(pair.prediction.duration for pair in pairs) / 3600,
        word_errors=count_word_errors(references, hypotheses, num_failed, merge_compounds=merge_compounds),
        interval=wer_interval(references, hypotheses, merge_compounds=merge_compounds),
    )
