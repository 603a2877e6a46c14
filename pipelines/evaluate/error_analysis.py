"""Where the errors are: alignments, confusions, rates of outputs that went wrong as a whole, and breakdowns.

Works on normalised pairs. Loops and refusals are detected by `tinyaudio.model.guard`, as in decoding, on the text as
scored; an utterance whose reference itself looks like one is not counted.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jiwer

from pipelines.evaluate.normalizers import Pair
from pipelines.evaluate.predictions import Prediction
from pipelines.scoring import Interval, WordErrors, align_words, count_word_errors, wer_interval
from tinyaudio.model.guard import EVENTS, judge

BUCKET_EDGES_S = (2.0, 5.0, 10.0, 20.0)
NUM_WORST, NUM_CONFUSIONS = 20, 20
MOST_ERRORS = 10  # last bin of the histogram: utterances with this many errors or more
UNKNOWN = "not stated"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One column of an alignment; `kind` is "equal", "substitute", "delete" or "insert"; a missing word is empty."""

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
    num_words: int  # in the reference
    steps: tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """An error and how often it was made; `kind` and words as in `Step`."""

    kind: str
    reference: str
    hypothesis: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How many answers went wrong as a whole, out of `answered`."""

    answered: int
    empty: int  # no word although the reference has some
    looping: int  # as `tinyaudio.model.guard.judge` finds in the text as scored
    refusing: int  # the same
    guarded: int  # our guard warned about them or repaired them
    guard_codes: dict[str, int]  # these, by code
    provider_codes: dict[str, int]  # other warnings of a provider, such as that another model answered
    leading_deletions: int  # without the first word of their reference
    trailing_deletions: int  # without the last
    empty_references: int  # the reference has no word, so every word of the answer is an insertion


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Word errors and hours of a part of the set. Failures are counted in `word_errors.failed` and nowhere else."""

    name: str
    hours: float
    word_errors: WordErrors
    interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The whole analysis of one evaluation.

    `error_histogram[n]` utterances have n errors; the last entry counts those with n or more.
    """

    rates: Rates
    error_histogram: tuple[int, ...]
    worst: tuple[AlignedPair, ...]
    confusions: tuple[Confusion, ...]
    breakdowns: dict[str, tuple[Slice, ...]]


def analyse(pairs: Sequence[Pair], failed: Sequence[Prediction] = ()) -> Analysis:
    """Align all pairs once and report where the errors are; `failed` utterances are counted in the breakdowns."""
    output = align_words([pair.reference for pair in pairs], [pair.hypothesis for pair in pairs])
    aligned = [_aligned_pair(pair, output, i) for i, pair in enumerate(pairs)] if output else []
    histogram = Counter(min(one.num_errors, MOST_ERRORS) for one in aligned)
    wrong = [one for one in aligned if one.num_errors]
    wrong.sort(key=lambda one: (-one.num_errors, -one.num_errors / max(one.num_words, 1), one.utterance_id))
    # word by word: jiwer's own count would take a run of errors as one
    counts = Counter(
        (step.kind, step.reference, step.hypothesis) for one in wrong for step in one.steps if step.kind != "equal"
    )
    most_frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:NUM_CONFUSIONS]
    return Analysis(
        rates=_rates(pairs, aligned),
        error_histogram=tuple(histogram[n] for n in range(MOST_ERRORS + 1)),
        worst=tuple(wrong[:NUM_WORST]),
        confusions=tuple(Confusion(kind=k, reference=r, hypothesis=h, count=n) for (k, r, h), n in most_frequent),
        breakdowns=_breakdowns(pairs, failed),
    )


def _aligned_pair(pair: Pair, output: jiwer.WordOutput, i: int) -> AlignedPair:
    """Write jiwer's i-th alignment out word by word."""
    steps = []
    reference, hypothesis = output.references[i], output.hypotheses[i]
    for chunk in output.alignments[i]:
        left = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        right = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for word, other in itertools.zip_longest(left, right, fillvalue=""):
            steps.append(Step(kind=chunk.type, reference=word, hypothesis=other))
    return AlignedPair(
        utterance_id=pair.prediction.utterance_id,
        duration_s=pair.prediction.duration,
        source=pair.prediction.source,
        num_errors=sum(step.kind != "equal" for step in steps),
        num_words=len(pair.reference.split()),
        steps=tuple(steps),
    )


def _rates(pairs: Sequence[Pair], aligned: Sequence[AlignedPair]) -> Rates:
    verdicts: Counter[str | None] = Counter()
    for pair in pairs:
        duration_s = pair.prediction.duration
        found = judge(pair.hypothesis, duration_s, is_complete=True)
        if found is not None and judge(pair.reference, duration_s, is_complete=True) != found:
            verdicts[found] += 1
    codes = Counter(code for pair in pairs for code in set(pair.prediction.warnings))
    with_words = [one for one in aligned if one.num_words]
    return Rates(
        answered=len(pairs),
        empty=sum(bool(pair.reference) and not pair.hypothesis for pair in pairs),
        looping=verdicts["repetition"],
        refusing=verdicts["refusal"],
        guarded=sum(not EVENTS.isdisjoint(pair.prediction.warnings) for pair in pairs),
        guard_codes={code: n for code, n in sorted(codes.items()) if code in EVENTS},
        provider_codes={code: n for code, n in sorted(codes.items()) if code not in EVENTS},
        leading_deletions=sum(_begins_with_deletion(one.steps) for one in with_words),
        trailing_deletions=sum(_begins_with_deletion(one.steps[::-1]) for one in with_words),
        empty_references=sum(not pair.reference for pair in pairs),
    )


def _begins_with_deletion(steps: Sequence[Step]) -> bool:
    """Return whether the first word of the reference was deleted, whatever was inserted before it."""
    return next((step.kind == "delete" for step in steps if step.kind != "insert"), False)


def _breakdowns(pairs: Sequence[Pair], failed: Sequence[Prediction]) -> dict[str, tuple[Slice, ...]]:
    """Break down by source, duration and sex; a property that no utterance states is omitted."""
    keys: dict[str, Callable[[Prediction], str | None]] = {
        "source": lambda one: one.source,
        "duration": lambda one: bucket_name(one.duration) if one.duration else None,
        "sex": lambda one: one.sex,
    }
    buckets = [bucket_name(edge) for edge in (0.0, *BUCKET_EDGES_S)]
    found = {}
    for title, key in keys.items():
        groups: dict[str, list[Pair]] = {}
        for pair in pairs:
            groups.setdefault(key(pair.prediction) or UNKNOWN, []).append(pair)
        num_failed = Counter(key(one) or UNKNOWN for one in failed)
        names = {*groups, *num_failed}
        if names - {UNKNOWN}:
            found[title] = tuple(
                _slice(name, groups.get(name, []), num_failed[name])
                for name in sorted(names, key=lambda n: (n == UNKNOWN, buckets.index(n) if n in buckets else 0, n))
            )
    return found


def bucket_name(duration_s: float) -> str:
    """Name the duration bucket of an utterance, such as "2 to 5 s"."""
    low = 0.0
    for high in BUCKET_EDGES_S:
        if duration_s < high:
            return f"{low:g} to {high:g} s"
        low = high
    return f"{low:g} s and more"


def _slice(name: str, pairs: Sequence[Pair], num_failed: int) -> Slice:
    references, hypotheses = [pair.reference for pair in pairs], [pair.hypothesis for pair in pairs]
    return Slice(
        name=name,
        hours=sum(pair.prediction.duration for pair in pairs) / 3600,
        word_errors=count_word_errors(references, hypotheses, num_failed),
        interval=wer_interval(references, hypotheses),
    )
