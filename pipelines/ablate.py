"""Ablations, the reason for the store: train every cell of a grid, then put what came of it into a table and a plot.

    <output>/<cell>/         one run each; .log.txt holds what it said
    <output>/table.md, table.csv, plot.png

What is finished is skipped and what was interrupted goes on, so the same command again continues after a kill. The
encoder is never loaded; a counter over every module call proves it.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from cache import FeatureStore
from pipelines.ablation_report import Outcome, plot, tabulate, tabulate_runs
from pipelines.errors import RunError
from pipelines.grids import Cell, Grid
from pipelines.run_table import Table
from pipelines.runs import Run, write_atomically
from pipelines.train import TrainReport, train

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A finished grid."""

    output: Path
    outcomes: tuple[Outcome, ...]
    table: Table
    num_skipped: int

    def __str__(self) -> str:
        return f"{self.table}\nwritten to {self.output}: table.md, table.csv, plot.png"

    def to_dict(self) -> dict[str, Any]:
        reports = [{"name": one.name, **one.report.to_dict()} for one in self.outcomes]
        passes = sum(one.report.encoder_passes for one in self.outcomes)
        return {"runs": reports, "encoder_passes": passes, "skipped": self.num_skipped, "output": str(self.output)}


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What a worker process is told."""

    cell: Cell
    store: Path
    folder: Path
    device: str


def ablate(
    grid: Grid, store: Path | None, output: Path, *, jobs: int = 1, device: str = "auto", say: Say = print
) -> Ablation:
    """Run a grid, or go on with it.

    Args:
        store: the feature store; None for where the grid or the recipe says.
        output: folder of the runs and the tables.
        jobs: runs at the same time; they share cores, or the one device.

    Raises:
        StoreNotFoundError, StoreMismatchError: a store that is missing, or of another encoder or encoding.
        RunError: a cell's folder holds a run with other settings, or a run was stopped from outside.
    """
    started = time.monotonic()
    tasks = [
        _Task(cell=cell, store=grid.store_of(cell, store), folder=(output / cell.name).resolve(), device=device)
        for cell in grid.cells
    ]
    for task in tasks:
        _check(task)
    missing = [task for task in tasks if not Run(task.folder).is_finished]
    say(f"{len(tasks)} runs, {len(tasks) - len(missing)} of them finished before")
    for number, report in enumerate(_run_all(missing, jobs), start=len(tasks) - len(missing) + 1):
        say(f"{number}/{len(tasks)}  {report}")
        if not report.is_finished:
            raise RunError(f"{report.run} was stopped at step {report.steps}; the same command again goes on")
    outcomes = tuple(_outcome(task) for task in tasks)
    table = tabulate(outcomes)
    write_atomically(output / "table.md", table.to_markdown())
    write_atomically(output / "table.csv", tabulate_runs(outcomes).to_csv())
    plot(outcomes, output / "plot.png")
    say(f"done in {time.monotonic() - started:.0f} s")
    return Ablation(output=output, outcomes=outcomes, table=table, num_skipped=len(tasks) - len(missing))


def _check(task: _Task) -> None:
    """Find out before the first run what would stop the last one."""
    opened = FeatureStore.open(task.store)
    wanted = task.cell.recipe.store.encoding
    if opened.encoding != wanted:
        raise RunError(
            f"store {str(task.store)!r} holds {opened.encoding} and the grid asks for {wanted}; extract one with "
            f"`tinyaudio extract --set store.encoding={wanted} --store DIR` and name it in the grid: "
            f'[stores] {wanted} = "DIR"'
        )
    run = Run(task.folder)
    if run.state:
        run.check_resumable(task.cell.recipe, opened.fingerprint_id)


def _run_all(tasks: list[_Task], jobs: int) -> Iterator[TrainReport]:
    if jobs == 1:
        yield from map(_run, tasks)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin_worker, (threads,)) as pool:
        for future in as_completed([pool.submit(_run, task) for task in tasks]):
            yield future.result()


def _run(task: _Task) -> TrainReport:
    run = Run(task.folder)
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / ".log.txt").open("a") as log:
        return train(
            task.cell.recipe,
            task.store,
            run,
            resume=bool(run.state),
            device=task.device,
            say=lambda line: print(line, file=log, flush=True),
            is_latest=False,
        )


def _begin_worker(threads: int) -> None:
    """Share the cores, and die with the parent: an orphan would write into a folder that is gone on with elsewhere."""
    torch.set_num_threads(threads)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _outcome(task: _Task) -> Outcome:
    run = Run(task.folder)
    report = TrainReport(**run.state["report"])
    curve = [(entry["step"], entry["dev_wer"]) for entry in run.metrics() if "dev_wer" in entry]
    cell = task.cell
    return Outcome(name=cell.name, settings=cell.settings, group=cell.group, report=report, curve=tuple(curve))
