"""Tables of runs: what there is, which settings differ, what came of it."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import RunError
from pipelines.recipes import Recipe
from pipelines.recipes.recipe import differing_keys
from pipelines.train.runs import LATEST, Run

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
    """List the runs under a folder, those of ablations too, the newest last, with the settings that are their own.

    Raises:
        RunError: there are none.
    """
    found = sorted(_runs(under), key=lambda run: (run.state.get("began", ""), run.folder.name))
    if not found:
        raise RunError(f"no runs under {str(under)!r}; `tinyaudio train` makes one")
    rows = [
        (str(run.folder.relative_to(under)), run.state.get("began", "-").replace("T", " "), settings, *outcome(run))
        for run, settings in zip(found, _own_settings([run.recipe for run in found]), strict=True)
    ]
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


def _own_settings(recipes: Sequence[Recipe]) -> list[str]:
    """Name the settings of each recipe that are not those of most recipes of its name: "kind=linear, seed=1"."""
    named: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        named.setdefault(recipe.name, []).append(recipe)
    usual: dict[str, dict[str, str]] = {}
    for name, alike in named.items():
        keys = _keys_that_differ(alike)
        tables = [recipe.model_dump() for recipe in alike]
        usual[name] = {key: Counter(str(_look_up(t, key)) for t in tables).most_common(1)[0][0] for key in keys}
    shown = []
    for recipe in recipes:
        mine = {key: str(_look_up(recipe.model_dump(), key)) for key in usual[recipe.name]}
        own = [f"{key.split('.')[-1]}={value}" for key, value in mine.items() if value != usual[recipe.name][key]]
        shown.append(", ".join(own) or "-")
    return shown


def _keys_that_differ(recipes: Sequence[Recipe]) -> list[str]:
    return sorted({key for recipe in recipes[1:] for key in differing_keys(recipes[0], recipe, SECTIONS)})


def compare_runs(names: Sequence[str], under: Path) -> Table:
    """Put runs side by side: a column each; settings that differ, then what came of it.

    Raises:
        RunError: one of them is no run.
    """
    found = [_find(name, under) for name in names]
    recipes = [run.recipe for run in found]
    keys = _keys_that_differ(recipes)
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
