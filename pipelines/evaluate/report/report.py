"""report.md and report.html of an evaluation, and the one-line form of its results.

Both files hold only what the summary holds. The page is the same Markdown as HTML, with charts; it loads nothing and
runs no script. Whatever a template prints is escaped, so that no text of a corpus or a model can become markup. A rate
that leaves failed utterances out carries a "*" everywhere.
"""

import io
import re
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_eval_context
from jinja2.nodes import EvalContext
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipelines.evaluate.comparison import Comparison
from pipelines.evaluate.confidence import Confidence
from pipelines.evaluate.error_analysis import Slice, Step
from pipelines.evaluate.summary import Summary
from pipelines.files import write_text
from pipelines.scoring import MIN_ERRORS, MIN_UTTERANCES, Interval

METHOD = (
    "Errors are summed over the whole set and divided by the number of reference words; references and hypotheses go "
    "through the same normaliser. Intervals are from a bootstrap on a log scale that treats utterances as independent; "
    f"below {MIN_UTTERANCES} utterances or {MIN_ERRORS} errors it would be too narrow, and none is given."
)
MAX_LABEL_LENGTH = 40  # characters of a chart's label; the table has the whole name
MARKS = {"equal": "", "substitute": "S", "delete": "D", "insert": "I"}
# What CommonMark or GitHub (autolinks, strikethrough, math, mentions) could read as markup inside a line. Values are
# only ever put inside a line of ours, so list markers and the like need no escape.
_MARKUP = re.compile(r"[\\`*_\[\]<>|#&~$@!]|:(?=//)|(?<=www)\.", re.IGNORECASE)
# Colours that the page replaces by its own, so that charts follow its light or dark theme: text, grid, data.
_THEME = {"#010101": "var(--ink)", "#020202": "var(--line)", "#030303": "var(--accent)"}
_INK, _GRID, _ACCENT = _THEME


def write_reports(folder: Path, summary: Summary) -> None:
    """Write report.md and report.html."""
    histogram = summary.analysis.error_histogram
    last = max((n for n, count in enumerate(histogram) if count), default=-1)
    labels = [f"{n} or more" if n == len(histogram) - 1 else str(n) for n in range(last + 1)]
    title = f"{summary.name} on {set_name(summary)}"
    markdown = render(
        Path(__file__).with_name("report.md.j2"),
        title=title,
        summary=summary,
        result=_result(summary),
        facts=_facts(summary),
        histogram=dict(zip(labels, histogram, strict=False)),
        provenance=_provenance(summary),
        method=METHOD,
    )
    write_text(folder / "report.md", markdown)

    charts = {f"By {name}": _interval_chart(slices) for name, slices in summary.analysis.breakdowns.items()}
    charts["Word errors per utterance"] = _bar_chart(labels, histogram[: last + 1])
    if summary.confidence is not None:
        charts["Confidence"] = _calibration_chart(summary.confidence)
    body = _to_html(markdown, [pair.steps for pair in summary.analysis.worst])
    for heading, svg in charts.items():
        body = body.replace(f"<h2>{heading}</h2>\n", f"<h2>{heading}</h2>\n<figure>{svg}</figure>\n")
    write_text(folder / "report.html", render(Path(__file__).with_name("report.html.j2"), title=title, body=body))


def render(template: Path, **values: Any) -> str:
    """Fill a Jinja2 template.

    Args:
        template: a .html.j2 file, in which every value is escaped as HTML, or a .md.j2 file, in which every value is
            escaped as Markdown text on one line. `value | safe` is not escaped.
        values: by name; a name that the template uses and `values` lacks is an error.
    """
    text = _environment(template.parent).get_template(template.name).render(**values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache
def _environment(folder: Path) -> Environment:
    @pass_eval_context
    def finalize(context: EvalContext, value: Any) -> Any:
        return value if context.autoescape or isinstance(value, Markup) else escape_markdown(str(value))

    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "align": lambda steps: "\n".join(align_lines(steps)),
        "mark": mark,
        "percent": percent,
        "probability": _probability,
        "shared": _shared,
        "span": span,
        "thousands": "{:,}".format,
    }
    return environment


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return _MARKUP.sub(r"\\\g<0>", re.sub(r"\s+", " ", text))


def _to_html(markdown: str, alignments: Sequence[Sequence[Step]]) -> str:
    """Convert a report to HTML; its n-th fenced block becomes the n-th alignment, in columns that wrap."""
    remaining = iter(alignments)

    def fence(*_: Any) -> str:
        return render(Path(__file__).with_name("alignment.html.j2"), steps=next(remaining), marks=MARKS)

    converter = MarkdownIt("commonmark", {"html": False}).enable("table").disable(["link", "image", "autolink"])
    converter.add_render_rule("fence", fence)
    html = str(converter.render(markdown))
    return html.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")


def headline(summary: Summary) -> str:
    """Return the result on one line."""
    return f"{_result(summary)} | {_facts(summary)}"


def _result(summary: Summary) -> str:
    score = summary.headline
    interval = "" if score.interval is None else f" [95 % CI {span(score.interval)}]"
    return f"WER {mark(percent(score.wer), score.word_errors.failed)}{interval}"


def _facts(summary: Summary) -> str:
    score, counts = summary.headline, summary.headline.word_errors
    kinds = {"S": counts.substitutions, "D": counts.deletions, "I": counts.insertions}
    parts = [
        " ".join(f"{kind} {percent(n / counts.words) if counts.words else n}" for kind, n in kinds.items()),
        f"CER {mark(percent(score.cer), counts.failed)}",
        f"{counts.words:,} words, {counts.utterances:,} utterances, {counts.failed} failed, "
        f"{summary.analysis.rates.empty} empty",
    ]
    if summary.timing.rtfx is not None:
        parts.append(f"RTFx {summary.timing.rtfx:,.1f}")
    if summary.timing.drafts is not None:
        parts.append(f"{summary.timing.drafts.passes_per_utterance:.2f} decoder passes an utterance with drafts")
    return " | ".join(parts)


def comparison_line(found: Comparison) -> str:
    """Return a comparison on one line."""
    wers = [mark(percent(wer), found.failed) for wer in (found.wer, found.other_wer)]
    return (
        f"{found.name} {wers[0]} against {found.other_name} {wers[1]} on {_shared(found)}: better in "
        f"{_probability(found.p_better)} of resamples, worse in {_probability(found.p_other_better)}"
    )


def _shared(found: Comparison) -> str:
    """Return how many utterances are compared, and why others are not."""
    reasons = [f"{found.failed:,} without an answer of one or both"] if found.failed else []
    reasons += [f"{found.unshared:,} in one of the two sets only"] if found.unshared else []
    return f"{found.utterances:,} utterances" + (f" ({', '.join(reasons)})" if reasons else "")


def _probability(share: float) -> str:
    """Format a share of resamples in percent; no number of them gives 0 or 100."""
    return "< 0.1 %" if share < 0.001 else "> 99.9 %" if share > 0.999 else f"{100 * share:.1f} %"


def set_name(summary: Summary) -> str:
    """Return the evaluated set's corpus, config, split and source, as far as they are known."""
    scored = summary.settings.scored
    parts = [summary.settings.corpus_name, scored.get("config"), scored.get("split"), scored.get("source")]
    return " ".join(str(part) for part in parts if part)


def percent(rate: float | None) -> str:
    """Format a fraction in percent."""
    return "not defined" if rate is None else f"{100 * rate:.2f} %"


def mark(text: str, failed: int) -> str:
    """Add a "*" to a rate that leaves failed utterances out."""
    return f"{text}*" if failed else text


def span(interval: Interval | None) -> str:
    """Format an interval in percent, for a cell of a table."""
    return "too few" if interval is None else f"{100 * interval.low:.2f} to {100 * interval.high:.2f}"


def align_lines(steps: Sequence[Step]) -> list[str]:
    """Return an alignment as three lines of equal columns: REF, HYP and the kind of each error."""
    lines = ["REF:", "HYP:", "    "]
    for step in steps:
        column = (step.reference or "*", step.hypothesis or "*", MARKS[step.kind])
        width = max(map(len, column))
        lines = [f"{line} {word.ljust(width)}" for line, word in zip(lines, column, strict=True)]
    return [line.rstrip() for line in lines]


def _provenance(summary: Summary) -> list[tuple[str, Any]]:
    """Return what was run, as names and values."""
    settings, timing = summary.settings, summary.timing
    tables = {"": settings.model, "set ": settings.scored}
    rows: list[tuple[str, Any]] = [("provider", settings.provider)]
    rows += [(f"{prefix}{key}", value) for prefix, table in tables.items() for key, value in _flat(table)]
    rows.append(("trained on", settings.trained_on))
    for environment in settings.environments:
        rows += [(f"computed on {key}", value) for key, value in _flat(environment)]
    rows += [(f"scored with {name}", version) for name, version in summary.versions.items()]
    rows.append(("bootstrap", f"{summary.bootstrap.replications:,} replications, seed {summary.bootstrap.seed}"))
    is_remote = any(environment.get("is_remote") for environment in settings.environments)
    kind = "latency, with network and queue" if is_remote else "wall time"
    if (drafts := timing.drafts) is not None:
        rows.append(
            (
                "drafts",
                f"{drafts.passes_per_utterance:.2f} decoder passes an utterance, {drafts.passes_per_token:.3f} a "
                f"token; {percent(drafts.accepted_share)} of the tokens were drafted",
            )
        )
    rows.append(("time", f"{timing.time_s:,.1f} s ({kind}) for {timing.audio_s:,.1f} s of audio"))
    return [(name, value) for name, value in rows if value is not None]


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Flatten nested tables: [("decoding.num_beams", 4)]."""
    pairs: list[tuple[str, Any]] = []
    for key, value in table.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def _interval_chart(slices: Sequence[Slice]) -> str:
    """Draw the WER of each slice in percent: a dot with its interval as a line. The axis starts at zero."""
    figure, axes = _chart([mark(one.name, one.word_errors.failed) for one in slices])
    for row, one in enumerate(slices):
        if not one.word_errors.words:
            continue
        wer = 100 * one.word_errors.wer
        axes.plot(wer, row, "o", color=_ACCENT, clip_on=False)
        if one.interval is not None:
            ends = (100 * one.interval.low, 100 * one.interval.high)
            axes.plot(ends, (row, row), color=_ACCENT, linewidth=2.5, clip_on=False)
        axes.text(1.02, row, f"{wer:.2f}", transform=axes.get_yaxis_transform(), va="center", color=_INK)
    axes.set_xlim(left=0)
    axes.set_xlabel("WER, %", color=_INK)
    return _to_svg(figure)


def _bar_chart(labels: Sequence[str], counts: Sequence[int]) -> str:
    """Draw the number of utterances for each number of word errors."""
    figure, axes = _chart(labels)
    for bar, count in zip(axes.barh(range(len(counts)), counts, color=_ACCENT, clip_on=False), counts, strict=True):
        axes.annotate(f"{count:,}", (count, bar.get_y() + bar.get_height() / 2), xytext=(6, 0),
                      textcoords="offset points", va="center", color=_INK)  # fmt: skip
    axes.set_xlabel("utterances", color=_INK)
    return _to_svg(figure)


def _calibration_chart(confidence: Confidence) -> str:
    """Draw the share of right words over the mean score of each bin; a calibrated score is on the diagonal."""
    figure, axes = _figure(4.0)
    axes.plot((0, 1), (0, 1), color=_GRID)
    for score, marker, color in zip(confidence.scores, ("o-", "s--"), (_ACCENT, _INK), strict=True):
        means = [one.mean_score for one in score.bins]
        shares = [one.num_right / one.num_words for one in score.bins]
        axes.plot(means, shares, marker, color=color, markersize=5, label=score.name, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.set_xlabel("mean score", color=_INK)
    axes.set_ylabel("share of right words", color=_INK)
    axes.grid(color=_GRID)
    axes.legend(frameon=False, labelcolor=_INK)
    return _to_svg(figure)


def _chart(rows: Sequence[str]) -> tuple[Figure, Axes]:
    """Make an empty chart with one row for each label, from top to bottom."""
    figure, axes = _figure(0.7 + 0.3 * len(rows))
    labels = [label if len(label) <= MAX_LABEL_LENGTH else f"{label[: MAX_LABEL_LENGTH - 3]}..." for label in rows]
    axes.set_yticks(range(len(rows)), labels, parse_math=False)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color=_GRID, clip_on=False)
    return figure, axes


def _figure(height: float) -> tuple[Figure, Axes]:
    """Make an empty figure, in inches, without background, frame and ticks."""
    figure = Figure(figsize=(7.5, height), facecolor="none", layout="constrained")
    axes = figure.subplots(subplot_kw={"facecolor": "none"})
    axes.tick_params(colors=_INK, length=0)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    return figure, axes


def _to_svg(figure: Figure) -> str:
    """Return a chart as an SVG element, the same for the same chart, with its text as text."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser's fonts draw the text
        FigureCanvasSVG(figure).print_svg(stream, metadata=nothing)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    for drawn, shown in _THEME.items():
        svg = svg.replace(drawn, shown)
    return re.sub(r' id="\w[\w.]*_\d+"', "", svg)  # names such as "text_1", which every chart has
