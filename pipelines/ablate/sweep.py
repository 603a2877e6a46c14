"""Ablations, the reason for the store: train every cell of a grid, then put what came of it into a table and a plot.

    <output>/<cell>/         one run each; .log.txt holds what it said
    <output>/table.md, table.csv, plot.png

What is finished is skipped and what was interrupted goes on, so the same command again continues after a kill. The
encoder is never loaded; a counter over every module call proves it.
"""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from cache import FeatureStore
from pipelines.ablate.grid import Cell, Grid
from pipelines.ablate.report import Outcome, plot, tabulate, tabulate_runs
from pipelines.errors import RunError
from pipelines.files import write_text
from pipelines.train.run_table import Table
from pipelines.train.runs import Run
from pipelines.train.stage import TrainReport, train

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A grid that has been gone through; `failed` says why, by the names of runs that came to nothing."""

    output: Path
    outcomes: tuple[Outcome, ...]
    table: Table
    num_skipped: int
    failed: dict[str, str] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse to take a grid with holes for a whole one.

        Raises:
            RunError: some run failed.
        """
        if self.failed:
            raise RunError(
                f"{len(self.failed)} of {len(self.failed) + len(self.outcomes)} runs failed: {', '.join(self.failed)}; "
                "the same command again tries them again"
            )

    def __str__(self) -> str:
        files = "table.md, table.csv, plot.png" if self.outcomes else "table.md, table.csv"
        return f"{self.table}\nwritten to {self.output}: {files}"

    def to_dict(self) -> dict[str, Any]:
        reports = [{"name": one.name, **one.report.to_dict()} for one in self.outcomes]
        passes = sum(one.report.encoder_passes for one in self.outcomes)
        return {
            "runs": reports,
            "encoder_passes": passes,
            "skipped": self.num_skipped,
            "failed": self.failed,
            "output": str(self.output),
        }


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
        jobs: runs at the same time; they share the cores, and the GPUs in turn.

    Returns:
        What came of it. A run that fails (a loss that is not finite, say) is named there and stops no other.

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
    failed: dict[str, str] = {}
    for number, (name, report) in enumerate(_run_all(missing, jobs), start=len(tasks) - len(missing) + 1):
        if isinstance(report, str):
            failed[name] = report
            say(f"{number}/{len(tasks)}  {name} failed: {report}")
            continue
        say(f"{number}/{len(tasks)}  {report}")
        if not report.is_finished:
            raise RunError(f"{report.run} was stopped at step {report.steps}; the same command again goes on")
    outcomes = tuple(_outcome(task) for task in tasks if task.cell.name not in failed)
    table = tabulate(outcomes, failed)
    write_text(output / "table.md", table.to_markdown())
    write_text(output / "table.csv", tabulate_runs(outcomes).to_csv())
    if outcomes:
        plot(outcomes, output / "plot.png")
    say(f"done in {time.monotonic() - started:.0f} s")
    num_skipped = len(tasks) - len(missing)
    return Ablation(output=output, outcomes=outcomes, table=table, num_skipped=num_skipped, failed=failed)


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


def _run_all(tasks: list[_Task], jobs: int) -> Iterator[tuple[str, TrainReport | str]]:
    """Run them; gives the name of each as it ends, with its report, or with why it failed."""
    if jobs == 1:
        for task in tasks:
            yield task.cell.name, _attempt(task)
        return
    threads, context = max(1, torch.get_num_threads() // jobs), get_context("spawn")
    gpus = context.SimpleQueue()
    for gpu in gpus_for(jobs, tasks[0].device if tasks else "cpu"):
        gpus.put(gpu)
    with ProcessPoolExecutor(jobs, context, _begin_worker, (threads, gpus)) as pool:
        names = {pool.submit(_attempt, task): task.cell.name for task in tasks}
        for future in as_completed(names):
            yield names[future], future.result()


def gpus_for(jobs: int, device: str) -> list[str | None]:
    """Share the visible GPUs out among workers: for each the one it shall see, None where there is none."""
    if device == "cpu":
        return [None] * jobs
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(torch.cuda.device_count())] if named is None else named.replace(" ", "").split(",")
    gpus = [gpu for gpu in gpus if gpu not in ("", "-1")]
    return [gpus[worker % len(gpus)] if gpus else None for worker in range(jobs)]


def _attempt(task: _Task) -> TrainReport | str:
    report = _run_or_say_why(task)
    gc.collect()  # a model lies in cycles with its trainer: the next one needs its memory now
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return report


def _run_or_say_why(task: _Task) -> TrainReport | str:
    try:
        return _run(task)
    except RunError as error:
        return str(error)


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
        )


def _begin_worker(threads: int, gpus: Any) -> None:
    """Share cores and GPUs, and die with the parent: an orphan would write where another goes on."""
    torch.set_num_threads(threads)
    if (gpu := gpus.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA reads it when first used, which is later
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _outcome(task: _Task) -> Outcome:
    run = Run(task.folder)
    report = TrainReport(**run.state["report"])
    metrics, cell = run.metrics(), task.cell
    return Outcome(
        name=cell.name,
        settings=cell.settings,
        group=cell.group,
        report=report,
        wers=tuple((entry["step"], entry["dev_wer"]) for entry in metrics if "dev_wer" in entry),
        losses=tuple((entry["step"], entry["loss"]) for entry in metrics if "loss" in entry),
    )
