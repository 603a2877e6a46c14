"""What an ablation ends with: a table over groups of seeds, a table of runs, and a plot."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.train.run_table import Table
from pipelines.train.stage import TrainReport

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished run of a grid; the curves are (step, dev WER) at evaluations and (step, loss) at logs."""

    name: str
    settings: dict[str, Any]
    group: tuple[tuple[str, Any], ...]
    report: TrainReport
    wers: tuple[tuple[int, float], ...]
    losses: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class _Measure:
    """What runs are compared by: dev WER in percent, or the training loss where some run has no dev split."""

    name: str
    is_wer: bool

    def final(self, one: Outcome) -> float:
        found = one.report.dev_wer if self.is_wer else one.report.loss
        return math.nan if found is None else found * self._scale

    def curve(self, one: Outcome) -> dict[int, float]:
        return {step: value * self._scale for step, value in (one.wers if self.is_wer else one.losses)}

    def mean(self, runs: Sequence[Outcome]) -> float:
        return statistics.mean(self.final(one) for one in runs)

    @property
    def _scale(self) -> float:
        return 100.0 if self.is_wer else 1.0


def _measure(outcomes: Sequence[Outcome]) -> _Measure:
    is_wer = all(one.report.dev_wer is not None for one in outcomes)
    return _Measure("dev WER, %" if is_wer else "training loss, nats a token", is_wer)


def grouped(outcomes: Sequence[Outcome]) -> dict[tuple[tuple[str, Any], ...], list[Outcome]]:
    """Put repetitions together, the best group first."""
    groups: dict[tuple[tuple[str, Any], ...], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.group, []).append(one)
    measure = _measure(outcomes)
    return dict(sorted(groups.items(), key=lambda item: measure.mean(item[1])))


def tabulate(outcomes: Sequence[Outcome], failed: Mapping[str, str]) -> Table:
    """One row for each group of seeds.

    Args:
        failed: why, by the names of runs that came to nothing; named below the table.
    """
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
                _mean_and_range([None if r.dev_wer is None else 100 * r.dev_wer for r in reports], "{:.1f}"),
                str(len(runs)),
                f"{statistics.mean(report.seconds for report in reports):.0f}",
                f"{sum(report.num_utterances for report in reports):,}",
            )
        )
    names = [key.removeprefix("projector.").removeprefix("train.") for key in keys]
    columns = (*names, "parameters", "steps", "loss", "dev WER, %", "seeds", "seconds a run", "encoder passes saved")
    notes = [_passes(outcomes), *(f"Failed: {name}: {reason}" for name, reason in failed.items())]
    return Table(columns=columns, rows=tuple(rows), notes=tuple(notes))


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
    """Draw dev WER over steps and at the end: a line and a row for each group, a thin line and a dot for each seed.

    Without word error rates, the loss instead. Lines are told apart by the colours of the names on the right.
    """
    groups, measure = grouped(outcomes), _measure(outcomes)
    figure = Figure(figsize=(11, 1.6 + max(3.0, 0.42 * len(groups))), layout="constrained")
    FigureCanvasAgg(figure)
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    for row, runs in enumerate(groups.values()):
        colour = COLOURS[row % len(COLOURS)]
        _draw_curves(curves, [measure.curve(one) for one in runs], colour, has_dots=measure.is_wer)
        finals = [measure.final(one) for one in runs]
        ends.plot(finals, [row] * len(finals), "o", color=colour, markersize=6, alpha=0.85)
        mean = statistics.mean(finals)
        ends.plot([mean, mean], [row - 0.28, row + 0.28], color=colour, linewidth=2.5)
        ends.annotate(
            f"{mean:.1f}" if measure.is_wer else f"{mean:.3f}",
            (max(finals), row),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
        )
    curves.set(xlabel="optimizer steps", ylabel=measure.name, title="while training", xlim=(0, None), ylim=(0, None))
    ends.set(xlabel=measure.name, title="at the end; dots are seeds, bars their mean")
    ends.set_xlim(0, 1.18 * max(map(measure.final, outcomes)))  # room for the numbers
    ends.set_yticks(range(len(groups)), [label(group) for group in groups])
    for row, name in enumerate(ends.get_yticklabels()):
        name.set(color=COLOURS[row % len(COLOURS)], fontweight="bold")
    ends.invert_yaxis()
    for axes in (curves, ends):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def label(group: Sequence[tuple[str, Any]]) -> str:
    """Name a group by its settings: "mlp, hidden_size 512"."""
    words = []
    for key, value in group:
        name = key.split(".")[-1]
        words.append(str(value) if name in ("kind", "encoding") else name if value is True else f"{name} {value}")
    return ", ".join(words)


def _draw_curves(axes: Any, seeds: Sequence[dict[int, float]], colour: str, has_dots: bool) -> None:
    for curve in seeds:
        axes.plot(list(curve), list(curve.values()), color=colour, linewidth=0.8, alpha=0.35)
    steps = sorted(set.intersection(*map(set, seeds)))
    means = [statistics.mean(curve[step] for curve in seeds) for step in steps]
    axes.plot(steps, means, color=colour, linewidth=2, marker="o" if has_dots else "", markersize=3.5)


def _passes(outcomes: Sequence[Outcome]) -> str:
    passes = sum(one.report.encoder_passes for one in outcomes)
    utterances = sum(one.report.num_utterances for one in outcomes)
    hours = sum(one.report.audio_s for one in outcomes) / 3600
    return (
        f"Encoder passes during all of it: {passes} (counted). With the encoder in the loop these {len(outcomes)} runs "
        f"would have encoded {utterances:,} utterances, {hours:,.1f} hours of audio."
    )


def _mean_and_range(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = form.format(statistics.mean(known))
    return mean if len(known) == 1 else f"{mean} ({form.format(min(known))}-{form.format(max(known))})"
