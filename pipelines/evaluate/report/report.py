"""The report of an evaluation: one list of blocks, rendered as Markdown and as one self-contained HTML page.

Says nothing that is not in the summary. A WER with failures is marked wherever it stands.
"""

from pathlib import Path
from typing import Any

from pipelines.evaluate.comparison import Comparison
from pipelines.evaluate.error_analysis import Slice
from pipelines.evaluate.report.blocks import (
    TOO_FEW,
    Alignments,
    Block,
    Bullets,
    Figure,
    Heading,
    Paragraph,
    Table,
    to_html,
    to_markdown,
)
from pipelines.evaluate.report.plots import Estimate, bar_chart, interval_chart
from pipelines.evaluate.summary import Score, Summary
from pipelines.files import write_text
from pipelines.scoring import MIN_ERRORS, MIN_UTTERANCES, Interval

METHOD = (
    "Errors are summed over the whole set and divided by its reference words; both sides go through the same "
    "normaliser. Intervals: bootstrap over utterances, taken as independent, on a log scale; none below "
    f"{MIN_UTTERANCES} utterances or {MIN_ERRORS} errors, where they come out too narrow."
)


def write_reports(folder: Path, summary: Summary) -> None:
    """Write report.md and report.html."""
    blocks = report_blocks(summary)
    write_text(folder / "report.md", to_markdown(blocks))
    write_text(folder / "report.html", to_html(blocks, title=f"{summary.name} on {set_name(summary)}"))


def report_blocks(summary: Summary) -> list[Block]:
    """Say everything, the answer first."""
    return [
        Heading(1, f"{summary.name} on {set_name(summary)}"),
        *_headline(summary),
        *_scores(summary),
        *_comparison(summary.comparison),
        *_breakdowns(summary),
        *_rates(summary),
        *_confusions(summary),
        *_worst(summary),
        *_failures(summary),
        *_provenance(summary),
    ]


def headline(summary: Summary) -> str:
    """Say the result in one line."""
    return f"{_result(summary)} | {_facts(summary)}"


def _result(summary: Summary) -> str:
    score = summary.headline
    return f"WER {mark(percent(score.wer), score.word_errors.failed)} {_bracketed(score.interval)}".strip()


def _facts(summary: Summary) -> str:
    score, counts = summary.headline, summary.headline.word_errors
    parts = [
        f"S {_share(counts.substitutions, counts.words)} D {_share(counts.deletions, counts.words)} "
        f"I {_share(counts.insertions, counts.words)}",
        f"CER {mark(percent(score.cer), counts.failed)}",
        f"{counts.words:,} words, {counts.utterances:,} utterances, {counts.failed} failed, "
        f"{summary.analysis.rates.empty} empty",
    ]
    if summary.timing.rtfx is not None:
        parts.append(f"RTFx {summary.timing.rtfx:,.1f}")
    return " | ".join(parts)


def comparison_line(found: Comparison) -> str:
    """Say a comparison in one line."""
    wers = [mark(percent(wer), found.failed) for wer in (found.wer, found.other_wer)]
    return (
        f"{found.name} {wers[0]} against {found.other_name} {wers[1]} on {found.utterances:,} utterances"
        f"{_left_out(found)}: better in {_probability(found.p_better)} of resamples, worse in "
        f"{_probability(found.p_other_better)}"
    )


def _probability(share: float) -> str:
    """Print a share of resamples; no number of them makes anything certain."""
    return "< 0.1 %" if share < 0.001 else "> 99.9 %" if share > 0.999 else f"{100 * share:.1f} %"


def _left_out(found: Comparison) -> str:
    """Say what is not compared, and why."""
    parts = [f"{found.failed:,} without an answer of one or both"] if found.failed else []
    parts += [f"{found.unshared:,} in one of the two sets only"] if found.unshared else []
    return f" ({', '.join(parts)})" if parts else ""


def set_name(summary: Summary) -> str:
    scored = summary.settings.scored
    parts = [summary.settings.corpus_name, scored.get("config"), scored.get("split"), scored.get("source")]
    return " ".join(str(part) for part in parts if part)


def percent(rate: float | None) -> str:
    """Print a fraction as people read it."""
    return "not defined" if rate is None else f"{100 * rate:.2f} %"


def mark(text: str, failed: int) -> str:
    """Mark a rate that leaves failures out."""
    return f"{text}*" if failed else text


def span(interval: Interval | None) -> str:
    """Print an interval in percent, for a cell of a table."""
    return TOO_FEW if interval is None else f"{100 * interval.low:.2f} to {100 * interval.high:.2f}"


def _bracketed(interval: Interval | None) -> str:
    return "" if interval is None else f"[95 % CI {span(interval)}]"


def _share(errors: int, words: int) -> str:
    return f"{100 * errors / words:.2f} %" if words else str(errors)


def _headline(summary: Summary) -> list[Block]:
    counts = summary.headline.word_errors
    blocks: list[Block] = [
        Paragraph(_result(summary), kind="result"),
        Paragraph(_facts(summary), kind="facts"),
    ]
    if counts.failed:
        total = counts.failed + counts.utterances
        blocks.append(
            Paragraph(
                f"* {counts.failed} of {total} utterances have no answer. They are not scored as empty text, and not "
                "scored at all: this WER is that of the rest, and no measurement of the whole set.",
                kind="warning",
            )
        )
    blocks += [Paragraph(note, kind="warning") for note in summary.notes]
    sampled = summary.settings.scored.get("max_samples")
    if sampled is not None:
        seed = summary.settings.scored.get("seed")
        blocks.append(Paragraph(f"A random sample of {sampled} utterances, seed {seed}; not the whole split."))
    return blocks


def _scores(summary: Summary) -> list[Block]:
    rows = [_score_row(score) for score in summary.scores]
    columns = ("Text", "WER", "95 % interval", "S", "D", "I", "Words", "CER")
    return [
        Heading(2, "Scores"),
        Table(columns, rows),
        Paragraph(
            f"{METHOD} Predictions are stored raw. The split into S, D and I is jiwer's; other tools split ties "
            "differently, the sum is the same."
        ),
    ]


def _score_row(score: Score) -> list[str]:
    counts, interval = score.word_errors, score.interval
    return [
        f"{score.label} ({score.detail})",
        mark(percent(score.wer), counts.failed),
        span(interval),
        f"{counts.substitutions:,}",
        f"{counts.deletions:,}",
        f"{counts.insertions:,}",
        f"{counts.words:,}",
        mark(percent(score.cer), counts.failed),
    ]


def _comparison(found: Comparison | None) -> list[Block]:
    if found is None:
        return []
    rows = [
        [name, mark(percent(wer), found.failed), _probability(p), f"{num:,}"]
        for name, wer, p, num in (
            (found.name, found.wer, found.p_better, found.num_better),
            (found.other_name, found.other_wer, found.p_other_better, found.num_worse),
        )
    ]
    return [
        Heading(2, "Compared on the same utterances"),
        Table(("System", "WER", "Probability of being better", "Utterances it does better"), rows),
        Paragraph(
            f"{found.utterances:,} utterances{_left_out(found)}; {found.num_tied:,} are tied. The probability is the "
            "share of paired bootstrap resamples in which a system has fewer errors."
        ),
    ]


def _breakdowns(summary: Summary) -> list[Block]:
    blocks: list[Block] = []
    for name, slices in summary.analysis.breakdowns.items():
        rows = [_slice_row(one) for one in slices]
        columns = (name.capitalize(), "WER", "95 % interval", "Utterances", "Failed", "Words", "Hours")
        estimates = [
            Estimate(mark(one.name, one.word_errors.failed), 100 * one.word_errors.wer, _scaled(one.interval))
            for one in slices
            if one.word_errors.words
        ]
        title = f"WER by {name}, %"
        blocks += [Heading(2, f"By {name}"), Figure(title, interval_chart(title, estimates)), Table(columns, rows)]
    return blocks


def _slice_row(one: Slice) -> list[str]:
    counts, interval = one.word_errors, one.interval
    return [
        one.name,
        mark(percent(counts.wer if counts.words else None), counts.failed),
        span(interval),
        f"{counts.utterances:,}",
        f"{counts.failed:,}",
        f"{counts.words:,}",
        f"{one.hours:.2f}",
    ]


def _scaled(interval: Interval | None) -> tuple[float, float] | None:
    return None if interval is None else (100 * interval.low, 100 * interval.high)


def _rates(summary: Summary) -> list[Block]:
    rates = summary.analysis.rates
    named = [
        ("Empty, where the reference is not", rates.empty),
        ("Looping", rates.looping),
        ("Refusing, or speaking as an assistant", rates.refusing),
        ("Warned about or repaired by the guard", rates.guarded),
        ("First word of the reference deleted", rates.leading_deletions),
        ("Last word of the reference deleted", rates.trailing_deletions),
        ("Reference without a word", rates.empty_references),
    ]
    rows = [[name, f"{n:,}", percent(n / rates.answered if rates.answered else None)] for name, n in named]
    for kind, codes in (("guard", rates.guard_codes), ("provider", rates.provider_codes)):
        rows += [[f"{kind}: {code}", f"{n:,}", percent(n / rates.answered)] for code, n in codes.items()]
    histogram = summary.analysis.error_histogram
    last = max((n for n, count in enumerate(histogram) if count), default=0)
    labels = [f"{n}+" if n == len(histogram) - 1 else str(n) for n in range(last + 1)]
    title = "Utterances by number of word errors"
    return [
        Heading(2, "Outputs"),
        Table(("Answers that are", "Count", "Share"), rows),
        Figure(title, bar_chart(title, labels, histogram[: last + 1])),
    ]


def _confusions(summary: Summary) -> list[Block]:
    kinds = {"substitute": "substitution", "insert": "insertion", "delete": "deletion"}
    repeated = [one for one in summary.analysis.confusions if one.count > 1]
    if not repeated:
        return []
    rows = [[kinds[one.kind], one.reference, one.hypothesis, f"{one.count:,}"] for one in repeated]
    return [Heading(2, "Errors made more than once"), Table(("Kind", "Reference", "Hypothesis", "Count"), rows)]


def _worst(summary: Summary) -> list[Block]:
    if not summary.analysis.worst:
        return []
    return [Heading(2, "Worst utterances"), Alignments(summary.analysis.worst)]


def _failures(summary: Summary) -> list[Block]:
    if not summary.failures:
        return []
    failed, listed = summary.headline.word_errors.failed, len(summary.failures)
    rows = [[one.utterance_id, one.error] for one in summary.failures]
    more = [Paragraph(f"The first {listed} of {failed}; all stand in predictions.jsonl.")] if listed < failed else []
    return [Heading(2, "Failures"), Table(("Utterance", "Why"), rows), *more]


def _provenance(summary: Summary) -> list[Block]:
    settings = summary.settings
    timing = summary.timing
    lines = [f"provider: {settings.provider}"]
    lines += [f"{key}: {value}" for key, value in _flat(settings.model)]
    lines += [f"set {key}: {value}" for key, value in _flat(settings.scored)]
    lines += [f"trained on: {settings.trained_on}"] if settings.trained_on else []
    for environment in settings.environments:
        lines += [f"computed on {key}: {value}" for key, value in _flat(environment)]
    lines += [f"scored with {name}: {version}" for name, version in summary.versions.items()]
    lines.append(f"bootstrap: {summary.bootstrap.replications:,} replications, seed {summary.bootstrap.seed}")
    is_remote = any(environment.get("is_remote") for environment in settings.environments)
    kind = "latency, with network and queue" if is_remote else "wall time"
    lines.append(f"time: {timing.time_s:,.1f} s ({kind}) for {timing.audio_s:,.1f} s of audio")
    return [Heading(2, "What was run"), Bullets(lines)]


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in table.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return [(key, value) for key, value in pairs if value is not None]
