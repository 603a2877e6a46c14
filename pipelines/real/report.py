"""What `make real` found: a table of systems, the learning curve as a table, and as a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.evaluate.report.report import comparison_line, mark, percent, span
from pipelines.evaluate.summary import Summary
from pipelines.train.runs import Run

# Of the palette of Okabe and Ito, distinguishable in print and with colour blindness.
COLOURS = {"main": "#0072B2", "plain": "#D55E00"}
LABELS = {"main": "with a CTC loss", "plain": "without a CTC loss"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One evaluation on the dev split while a run trained; rates are fractions, None where not measured."""

    step: int
    minutes: float  # wall time since the run began, evaluations included
    decoder: float | None  # WER of the transcripts that the decoder writes
    insertions: float | None  # the part of it that loops raise
    ctc: float | None  # WER of the projector's CTC head alone
    loss: float | None  # nats per token, of the right audio
    gain: float | None  # by how much that of wrong audio is larger


def curve_of(run: Run) -> list[Point]:
    """Read the evaluations of a run from its metrics."""
    seconds, points = 0.0, []
    for entry in run.metrics():
        if "dev_wer" in entry or "dev_ctc_wer" in entry:
            points.append(
                Point(
                    step=entry["step"],
                    minutes=seconds / 60,
                    decoder=entry.get("dev_wer"),
                    insertions=entry["dev_insertions"] / entry["dev_words"] if entry.get("dev_words") else None,
                    ctc=entry.get("dev_ctc_wer"),
                    loss=entry.get("dev_loss"),
                    gain=entry.get("dev_listening_gain"),
                )
            )
        seconds = entry.get("seconds", seconds)
    return points


def tabulate(evaluations: Mapping[str, Summary], curves: Mapping[str, Sequence[Point]], checks: dict[str, Any]) -> str:
    """Write the tables as Markdown."""
    lines = ["| system | utterances | words | WER | 95 % interval | S | D | I | empty | times real time |"]
    lines += ["|---|" + "---:|" * 9]
    for name, one in evaluations.items():
        errors, speed = one.word_errors, one.timing.rtfx
        cells = [errors.utterances, f"{errors.words:,}", mark(percent(one.headline.wer), errors.failed)]
        cells += [span(one.headline.interval), errors.substitutions, errors.deletions, errors.insertions]
        cells += [one.analysis.rates.empty, "-" if speed is None else f"{speed:.1f}"]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    lines += ["", f"Parts alone: {checks['whisper']}; language model: {checks['language_model']}."]
    lines += ["", *(f"- {comparison_line(one.comparison)}" for one in evaluations.values() if one.comparison)]
    for name, points in curves.items():
        lines += ["", f"Learning curve {LABELS[name]}, on the dev split:", ""]
        lines.append(
            "| step | minutes | WER by the decoder | insertions | WER by CTC alone | loss | gain of the right audio |"
        )
        lines += ["|" + "---:|" * 7]
        for point in points:
            rates = " | ".join(
                "-" if rate is None else f"{100 * rate:.1f} %" for rate in (point.decoder, point.insertions, point.ctc)
            )
            nats = " | ".join("-" if value is None else f"{value:.2f}" for value in (point.loss, point.gain))
            lines.append(f"| {point.step:,} | {point.minutes:.0f} | {rates} | {nats} |")
    return "\n".join(lines) + "\n"


def draw(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draw word errors on the dev split over the time of training: solid by the decoder, dashed by CTC alone."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points in curves.items():
        written = [(one.minutes, 100 * one.decoder) for one in points if one.decoder is not None]
        drafted = [(one.minutes, 100 * one.ctc) for one in points if one.ctc is not None]
        if drafted:
            axes.plot(*zip(*drafted, strict=True), "--", color=COLOURS[name], label="its projector's CTC head alone")
        if written:
            axes.plot(*zip(*written, strict=True), "o-", color=COLOURS[name], markersize=4, label=LABELS[name])
    axes.set(xlabel="minutes of training, evaluations included", ylabel="word error rate on dev, %")
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if any(curves.values()):
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
