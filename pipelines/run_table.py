"""Tables of runs: what there is, which settings differ, what came of it."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import RunError
from pipelines.recipes import differing_keys
from pipelines.runs import LATEST, Run

SECTIONS = ("corpus", "encoder", "decoder", "store", "projector", "train")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under columns, with a line or two below."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = [
            "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([*text, *self.notes])

    def to_markdown(self) -> str:
        lines = [self.columns, tuple("---" for _ in self.columns), *self.rows]
        text = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        return "\n".join([*text, *(f"\n{note}" for note in self.notes)]) + "\n"

    def to_csv(self) -> str:
        sink = io.StringIO()
        csv.writer(sink, lineterminator="\n").writerows([self.columns, *self.rows])
        return sink.getvalue()

    def to_dict(self) -> dict[str, Any]:
        return {"rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows], "notes": list(self.notes)}


def list_runs(under: Path) -> Table:
    """List the runs under a folder, the newest last.

    Raises:
        RunError: there are none.
    """
    found = [Run(path) for path in under.iterdir() if path.name != LATEST] if under.is_dir() else []
    found = sorted((run for run in found if run.state), key=lambda run: (run.state.get("began", ""), run.folder.name))
    if not found:
        raise RunError(f"no runs under {str(under)!r}; `tinyaudio train` makes one")
    rows = [(run.folder.name, run.state.get("began", "-").replace("T", " "), *outcome(run)) for run in found]
    return Table(columns=("run", "began", *OUTCOME), rows=tuple(rows))


def compare_runs(names: Sequence[str], under: Path) -> Table:
    """Put runs side by side: a column each; settings that differ, then what came of it.

    Raises:
        RunError: one of them is no run.
    """
    found = [_find(name, under) for name in names]
    recipes = [run.recipe for run in found]
    keys = sorted({key for recipe in recipes[1:] for key in differing_keys(recipes[0], recipe, SECTIONS)})
    settings = [(key, *(_shown(_look_up(recipe.model_dump(), key)) for recipe in recipes)) for key in keys]
    outcomes = [(name, *values) for name, *values in zip(OUTCOME, *map(outcome, found), strict=True)]
    note = () if keys or len(found) == 1 else ("no setting differs",)
    return Table(columns=("", *(run.folder.name for run in found)), rows=(*settings, *outcomes), notes=note)


OUTCOME = ("state", "steps", "loss", "dev WER", "parameters", "seconds")


def outcome(run: Run) -> tuple[str, ...]:
    """Say how far a run is and what it has reached, as text in the order of `OUTCOME`."""
    metrics, report = run.metrics(), run.state.get("report", {})
    steps = max((entry["step"] for entry in metrics), default=0)
    wers = [entry["dev_wer"] for entry in metrics if "dev_wer" in entry]
    losses = [entry["loss"] for entry in metrics if "loss" in entry]
    return (
        "finished" if run.is_finished else "unfinished",
        f"{steps}/{run.recipe.train.steps}",
        f"{losses[-1]:.4f}" if losses else "-",
        f"{100 * wers[-1]:.2f} %" if wers else "-",
        f"{report['parameters']:,}" if report else "-",
        f"{report['seconds']:.0f}" if report else "-",
    )


def _find(name: str, under: Path) -> Run:
    folder = Path(name) if "/" in name else under / name
    run = Run(folder.resolve())
    if not run.state:
        raise RunError(f"{str(folder)!r} holds no run; `tinyaudio runs` lists those there are")
    return run


def _look_up(table: dict[str, Any], key: str) -> Any:
    value: Any = table
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
