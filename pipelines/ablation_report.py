"""What an ablation ends with: a table over groups of seeds, a table of runs, and a plot."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.run_table import Table
from pipelines.train import TrainReport

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished run of a grid; `curve` is (step, dev WER) at every evaluation."""

    name: str
    settings: dict[str, Any]
    group: tuple[tuple[str, Any], ...]
    report: TrainReport
    curve: tuple[tuple[int, float], ...]


def grouped(outcomes: Sequence[Outcome]) -> dict[tuple[tuple[str, Any], ...], list[Outcome]]:
    """Put repetitions together, the best group first."""
    groups: dict[tuple[tuple[str, Any], ...], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.group, []).append(one)
    return dict(sorted(groups.items(), key=lambda item: _mean_wer(item[1])))


def tabulate(outcomes: Sequence[Outcome]) -> Table:
    """One row for each group of seeds."""
    groups = grouped(outcomes)
    keys = list(dict.fromkeys(key for group in groups for key, _ in group))
    rows = []
    for group, runs in groups.items():
        settings, reports = dict(group), [one.report for one in runs]
        rows.append(
            (
                *(str(settings.get(key, "-")) for key in keys),
                f"{reports[0].parameters:,}",
                f"{max(report.steps for report in reports):,}",
                _mean_and_range([report.loss for report in reports], "{:.3f}"),
                _mean_and_range([_percent(report.dev_wer) for report in reports], "{:.1f}"),
                str(len(runs)),
                f"{statistics.mean(report.seconds for report in reports):.0f}",
                f"{sum(report.num_utterances for report in reports):,}",
            )
        )
    names = [key.removeprefix("projector.").removeprefix("train.") for key in keys]
    columns = (*names, "parameters", "steps", "loss", "dev WER, %", "seeds", "seconds a run", "encoder passes saved")
    return Table(columns=columns, rows=tuple(rows), notes=(_passes(outcomes),))


def tabulate_runs(outcomes: Sequence[Outcome]) -> Table:
    """One row for each run, plain numbers."""
    keys = list(dict.fromkeys(key for one in outcomes for key in one.settings))
    fields = ("parameters", "steps", "loss", "dev_wer", "seconds", "num_utterances", "audio_s", "encoder_passes")
    rows = []
    for one in outcomes:
        report = one.report.to_dict()
        cells = [one.settings.get(key, "") for key in keys] + [report[field] for field in fields]
        rows.append((one.name, *(str(cell) for cell in cells)))
    return Table(columns=("run", *keys, *fields), rows=tuple(rows))


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw dev WER over steps and at the end: a line and a row for each group, a thin line and a dot for each seed."""
    groups = grouped(outcomes)
    figure = Figure(figsize=(11, 1.6 + max(3.0, 0.42 * len(groups))), layout="constrained")
    FigureCanvasAgg(figure)
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    for row, runs in enumerate(groups.values()):
        colour = COLOURS[row % len(COLOURS)]
        _draw_curves(curves, runs, colour)
        finals = [_percent(one.report.dev_wer) for one in runs]
        ends.plot(finals, [row] * len(finals), "o", color=colour, markersize=6, alpha=0.85)
        mean = _mean_wer(runs)
        ends.plot([mean, mean], [row - 0.28, row + 0.28], color=colour, linewidth=2.5)
        ends.annotate(f"{mean:.1f}", (max(finals), row), xytext=(9, 0), textcoords="offset points", va="center")
    curves.set(xlabel="optimizer steps", ylabel="dev WER, %", title="while training", ylim=(0, None))
    ends.set(xlabel="dev WER, %", title="at the end; dots are seeds, bars their mean")
    ends.set_xlim(0, 1.18 * max(_percent(one.report.dev_wer) for one in outcomes))  # room for the numbers
    ends.set_yticks(range(len(groups)), [label(group) for group in groups])
    ends.invert_yaxis()
    for axes in (curves, ends):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def label(group: Sequence[tuple[str, Any]]) -> str:
    """Name a group by its settings: "mlp, whiten"."""
    words = []
    for key, value in group:
        name = key.split(".")[-1]
        words.append(str(value) if name in ("kind", "encoding") else name if value is True else f"{name} {value}")
    return ", ".join(words)


def _draw_curves(axes: Any, runs: Sequence[Outcome], colour: str) -> None:
    for one in runs:
        axes.plot([s for s, _ in one.curve], [100 * w for _, w in one.curve], color=colour, linewidth=0.8, alpha=0.35)
    steps = sorted(set.intersection(*({step for step, _ in one.curve} for one in runs)))
    means = [100 * statistics.mean(dict(one.curve)[step] for one in runs) for step in steps]
    axes.plot(steps, means, color=colour, linewidth=2, marker="o", markersize=3.5)


def _passes(outcomes: Sequence[Outcome]) -> str:
    passes = sum(one.report.encoder_passes for one in outcomes)
    utterances = sum(one.report.num_utterances for one in outcomes)
    hours = sum(one.report.audio_s for one in outcomes) / 3600
    return (
        f"Encoder passes during all of it: {passes} (counted). With the encoder in the loop these {len(outcomes)} runs "
        f"would have encoded {utterances:,} utterances, {hours:,.1f} hours of audio."
    )


def _percent(wer: float | None) -> float:
    return float("nan") if wer is None else 100 * wer


def _mean_wer(runs: Sequence[Outcome]) -> float:
    return statistics.mean(_percent(one.report.dev_wer) for one in runs)


def _mean_and_range(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = form.format(statistics.mean(known))
    return mean if len(known) == 1 else f"{mean} ({form.format(min(known))}-{form.format(max(known))})"
