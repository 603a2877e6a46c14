"""Tables of runs: their overrides and results, or a comparison of their settings."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.create import compare_fields
from pipelines.errors import RecipeError, RunError
from pipelines.train.runs import LATEST, SECTIONS, Run

OUTCOME = ("state", "steps", "loss", "dev WER", "parameters", "seconds")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under columns, with notes below."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]
        padded = (zip(row, widths, strict=True) for row in (self.columns, *self.rows))
        lines = ["  ".join(f"{cell:<{width}}" for cell, width in row).rstrip() for row in padded]
        return "\n".join([*lines, *self.notes])

    def to_markdown(self) -> str:
        rows = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def to_csv(self) -> str:
        sink = io.StringIO()
        csv.writer(sink, lineterminator="\n").writerows([self.columns, *self.rows])
        return sink.getvalue()

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows], "notes": list(self.notes)}


def list_runs(under: Path) -> Table:
    """List the runs under a folder, including those of ablations, the newest last, with the overrides of each.

    Raises:
        RunError: there are none.
    """
    runs = sorted(_runs(under), key=lambda run: (run.state.get("began", ""), run.folder.name))
    if not runs:
        raise RunError(f"no runs under {str(under)!r}; `tinyaudio train` makes one")
    rows = []
    for run in runs:
        name, began = str(run.folder.relative_to(under)), run.state.get("began", "-").replace("T", " ")
        rows.append((name, began, ", ".join(run.state.get("overrides", [])) or "-", *_outcome(run)))
    return Table(columns=("run", "began", "differs in", *OUTCOME), rows=tuple(rows))


def _runs(folder: Path) -> Iterator[Run]:
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name == LATEST or not path.is_dir():
            continue
        run = Run(path)
        if run.state:
            yield run
        else:
            yield from _runs(path)


def compare_runs(names: Sequence[str], under: Path) -> Table:
    """Put runs side by side, one column each: the settings that differ, then the results.

    Raises:
        RunError: a name is not a run.
    """
    runs = []
    for name in names:
        folder = Path(name) if "/" in name else under / name
        runs.append(Run(folder.resolve()))
        if not runs[-1].state:
            raise RunError(f"{str(folder)!r} is not a run; expected one that `tinyaudio runs` lists")
    recipes = [run.recipe.model_dump(include=SECTIONS) for run in runs]
    differences = [compare_fields(recipes[0], recipe) for recipe in recipes]
    first = {key: value for difference in differences for key, (value, _) in difference.items()}
    settings = []
    for key in sorted(first):
        values = [difference.get(key, (None, first[key]))[1] for difference in differences]
        settings.append((key, *("-" if value is None else str(value) for value in values)))
    outcomes = [(name, *values) for name, *values in zip(OUTCOME, *map(_outcome, runs), strict=True)]
    notes = () if settings or len(runs) == 1 else ("no setting differs",)
    return Table(columns=("", *(run.folder.name for run in runs)), rows=(*settings, *outcomes), notes=notes)


def _outcome(run: Run) -> tuple[str, ...]:
    """Return the cells of `OUTCOME`."""
    metrics, report = run.metrics(), run.state.get("report", {})
    steps = max((entry["step"] for entry in metrics), default=0)
    wers = [entry["dev_wer"] for entry in metrics if "dev_wer" in entry]
    losses = [entry.get("decoder_loss", entry["loss"]) for entry in metrics if "loss" in entry]
    try:
        planned = str(run.recipe.train.all_steps)
    except RecipeError:  # of a version with other settings; that must not hide the other runs
        planned = "?"
    return (
        "finished" if run.is_finished else "unfinished",
        f"{steps}/{planned}",
        f"{losses[-1]:.4f}" if losses else "-",
        f"{100 * wers[-1]:.2f} %" if wers else "-",
        f"{report['parameters']:,}" if report else "-",
        f"{report['seconds']:.0f}" if report else "-",
    )
