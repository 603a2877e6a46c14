"""The results of an ablation: a table of groups of seeds, a table of runs, and a plot."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipelines.errors import RunError
from pipelines.train.run_table import Table
from pipelines.train.stage import TrainReport

# The palette of Okabe and Ito: distinguishable in print and with colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")

Group = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished run of a grid."""

    name: str
    settings: dict[str, Any]
    group: Group
    report: TrainReport
    wers: tuple[tuple[int, float], ...]  # (step through the decoder, dev WER) at evaluations
    ctc_wers: tuple[tuple[int, float], ...]  # (step, dev WER of the CTC loss's tokens alone) at evaluations
    losses: tuple[tuple[int, float], ...]  # (step, training loss) at logs


@dataclass(frozen=True)
class Measure:
    """What runs are compared by: dev WER in percent, else that by CTC alone, else the training loss."""

    name: str

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> "Measure":
        """Choose the first one that all runs have."""
        if all(one.report.dev_wer is not None for one in outcomes):
            return cls("dev WER, %")
        if all(one.report.ctc_wer is not None for one in outcomes):
            return cls("dev WER by CTC alone, %")
        return cls("training loss, nats per token")

    @property
    def is_wer(self) -> bool:
        return self.name.startswith("dev WER")

    def final(self, one: Outcome) -> float:
        if self.is_wer:
            return 100 * ((one.report.dev_wer if self.name == "dev WER, %" else one.report.ctc_wer) or 0.0)
        return math.nan if one.report.loss is None else one.report.loss

    def curve(self, one: Outcome) -> dict[int, float]:
        if self.is_wer:
            return {step: 100 * wer for step, wer in (one.wers if self.name == "dev WER, %" else one.ctc_wers)}
        return dict(one.losses)

    def groups(self, outcomes: Sequence[Outcome]) -> dict[Group, list[Outcome]]:
        """Group the repetitions, the best group first."""
        groups: dict[Group, list[Outcome]] = {}
        for one in outcomes:
            groups.setdefault(one.group, []).append(one)
        return dict(sorted(groups.items(), key=lambda item: statistics.mean(map(self.final, item[1]))))


def tabulate(outcomes: Sequence[Outcome], failed: Mapping[str, str]) -> Table:
    """Make one row for each group of seeds, and list failed runs (name -> reason) below."""
    groups = Measure.of(outcomes).groups(outcomes)
    keys = list(dict.fromkeys(key for group in groups for key, _ in group))
    has_ctc = any(one.report.ctc_wer is not None for one in outcomes)
    rows = []
    for group, runs in groups.items():
        settings, reports = dict(group), [one.report for one in runs]
        ctc = _mean_and_range([None if r.ctc_wer is None else 100 * r.ctc_wer for r in reports], "{:.1f}")
        rows.append(
            (
                *(str(settings.get(key, "-")) for key in keys),
                f"{reports[0].parameters:,}",
                f"{max(report.steps for report in reports):,}",
                _mean_and_range([report.loss for report in reports], "{:.3f}"),
                _mean_and_range([None if r.dev_wer is None else 100 * r.dev_wer for r in reports], "{:.1f}"),
                *([ctc] if has_ctc else []),
                str(len(runs)),
                f"{statistics.mean(report.seconds for report in reports):.0f}",
                f"{sum(report.num_utterances for report in reports):,}",
            )
        )
    names = [key.removeprefix("projector.").removeprefix("train.") for key in keys]
    wers = ("dev WER, %", "by CTC alone, %") if has_ctc else ("dev WER, %",)
    columns = (*names, "parameters", "steps", "loss", *wers, "seeds", "seconds a run", "encoder passes saved")
    passes = sum(one.report.encoder_passes for one in outcomes)
    utterances = sum(one.report.num_utterances for one in outcomes)
    hours = sum(one.report.audio_s for one in outcomes) / 3600
    note = (
        f"Encoder passes during all of it: {passes} (counted). With the encoder in the loop these {len(outcomes)} runs "
        f"would have encoded {utterances:,} utterances, {hours:,.1f} hours of audio."
    )
    notes = (note, *(f"Failed: {name}: {reason}" for name, reason in failed.items()))
    return Table(columns=columns, rows=tuple(rows), notes=notes)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well this ablation ranks the groups of another one of the same grid, each by the mean over its seeds."""

    other: str
    num_groups: int
    correlation: float  # Spearman's, -1 to 1
    best_here: int  # rank of this ablation's best group there, from 1
    best_there: int  # rank of the other's best group here

    def __str__(self) -> str:
        return (
            f"Rank correlation with {self.other}: {self.correlation:.2f} (Spearman, {self.num_groups} groups). The "
            f"best group here has rank {self.best_here} there, the best one there has rank {self.best_there} here."
        )


def read_wers(other: Path, names: Sequence[str]) -> dict[str, float]:
    """Read the dev WER of each run of a finished ablation from table.csv in its folder.

    Raises:
        RunError: it has no table, or not these runs.
    """
    table = other / "table.csv"
    if not table.is_file():
        raise RunError(
            f"{str(table)!r} does not exist; expected the folder of a finished ablation. Try runs/ablate-NAME"
        )
    rows = {row["run"]: row["dev_wer"] for row in csv.DictReader(io.StringIO(table.read_text()))}
    wers = {name: float(wer) for name, wer in rows.items() if wer not in ("", "None")}
    if missing := [name for name in names if name not in wers]:
        raise RunError(
            f"{str(table)!r} has no dev WER of {len(missing)} runs, such as {missing[0]!r}; expected the same grid"
        )
    return wers


def agreement(outcomes: Sequence[Outcome], other: Path, wers: Mapping[str, float]) -> Agreement:
    """Compare the ranking of at least two groups with that of a finished ablation in `other`; `wers` as `read_wers`."""
    measure = Measure.of(outcomes)
    groups = list(measure.groups(outcomes).values())
    here = _ranks([statistics.mean(map(measure.final, runs)) for runs in groups])
    there = _ranks([statistics.mean(wers[one.name] for one in runs) for runs in groups])
    is_constant = len(set(here)) == 1 or len(set(there)) == 1
    return Agreement(
        other=str(other),
        num_groups=len(groups),
        correlation=math.nan if is_constant else statistics.correlation(here, there),
        best_here=math.ceil(there[here.index(min(here))]),
        best_there=math.ceil(here[there.index(min(there))]),
    )


def _ranks(values: Sequence[float]) -> list[float]:
    """Rank from 1, the smallest first; equal values share their mean rank."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def _mean_and_range(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = form.format(statistics.mean(known))
    return mean if len(known) == 1 else f"{mean} ({form.format(min(known))}-{form.format(max(known))})"


def tabulate_runs(outcomes: Sequence[Outcome]) -> Table:
    """Make one row for each run, with plain numbers."""
    keys = list(dict.fromkeys(key for one in outcomes for key in one.settings))
    fields = "parameters steps loss dev_wer ctc_wer seconds num_utterances audio_s encoder_passes".split()
    rows = []
    for one in outcomes:
        report = one.report.to_dict()
        cells = [one.settings.get(key, "") for key in keys] + [report[field] for field in fields]
        rows.append((one.name, *(str(cell) for cell in cells)))
    return Table(columns=("run", *keys, *fields), rows=tuple(rows))


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw dev WER (or else the loss) over steps and at the end.

    Each group has a thick line and a bar for its mean; each seed has a thin line and a dot.
    """
    measure = Measure.of(outcomes)
    groups = measure.groups(outcomes)
    figure = Figure(figsize=(11, 1.6 + max(3.0, 0.42 * len(groups))), layout="constrained")
    FigureCanvasAgg(figure)
    curves, ends = figure.subplots(1, 2, width_ratios=(3, 2))
    for row, runs in enumerate(groups.values()):
        colour = COLOURS[row % len(COLOURS)]
        seeds, finals = [measure.curve(one) for one in runs], [measure.final(one) for one in runs]
        for curve in seeds:
            curves.plot(list(curve), list(curve.values()), color=colour, linewidth=0.8, alpha=0.35)
        steps = sorted(set.intersection(*map(set, seeds)))
        means = [statistics.mean(curve[step] for curve in seeds) for step in steps]
        curves.plot(steps, means, color=colour, linewidth=2, marker="o" if measure.is_wer else "", markersize=3.5)
        mean = statistics.mean(finals)
        ends.plot(finals, [row] * len(finals), "o", color=colour, markersize=6, alpha=0.85)
        ends.plot([mean, mean], [row - 0.28, row + 0.28], color=colour, linewidth=2.5)
        number = f"{mean:.1f}" if measure.is_wer else f"{mean:.3f}"
        ends.annotate(number, (max(finals), row), xytext=(9, 0), textcoords="offset points", va="center")
    name = measure.name
    steps_of = "steps through the decoder" if name == "dev WER, %" else "optimizer steps"
    curves.set(xlabel=steps_of, ylabel=name, title="during training", xlim=(0, None), ylim=(0, None))
    drawn = [value for runs in groups.values() for one in runs for value in measure.curve(one).values()]
    if measure.is_wer and drawn and min(drawn) > 0 and max(drawn) > 10 * min(drawn):  # else the ends look alike
        curves.set_yscale("log")
        curves.set_ylim(0.8 * min(drawn), 1.2 * max(drawn))
        curves.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        curves.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
    ends.set(xlabel=name, title="at the end (dots: seeds, bars: mean)")
    ends.set_xlim(0, 1.18 * max(map(measure.final, outcomes)))  # space for the numbers
    labels = []
    for group in groups:  # such as "mlp, hidden_size 512"
        words = [(key.split(".")[-1], str(value)) for key, value in group]
        labels.append(", ".join(value if key in ("kind", "encoding") else f"{key} {value}" for key, value in words))
    ends.set_yticks(range(len(groups)), labels)
    for row, tick in enumerate(ends.get_yticklabels()):
        tick.set(color=COLOURS[row % len(COLOURS)], fontweight="bold")
    ends.invert_yaxis()
    for axes in (curves, ends):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
