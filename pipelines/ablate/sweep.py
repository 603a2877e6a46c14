"""Ablations: train every cell of a grid, then summarize the results in a table and a plot.

    <output>/<cell>/         one run each; log.txt has its messages
    <output>/table.md, table.csv, plot.png

Finished runs are skipped and interrupted ones resume, so running the same command again continues after a kill. The
encoder is never loaded; a counter over every module call proves it.
"""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from cache import FeatureStore
from cache.errors import StoreNotFoundError
from pipelines.ablate.grid import Cell, Grid
from pipelines.ablate.report import Agreement, Outcome, agreement, plot, read_wers, tabulate, tabulate_runs
from pipelines.errors import RunError
from pipelines.files import write_text
from pipelines.train.run_table import Table
from pipelines.train.runs import Run
from pipelines.train.stage import TrainReport, train

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The results of a grid; `failed` is run name -> reason."""

    output: Path
    outcomes: tuple[Outcome, ...]
    table: Table
    num_skipped: int
    failed: dict[str, str] = field(default_factory=dict)
    agreement: Agreement | None = None

    def check(self) -> None:
        """Check that no run failed.

        Raises:
            RunError: some did, with their names.
        """
        if self.failed:
            raise RunError(
                f"{len(self.failed)} of {len(self.failed) + len(self.outcomes)} runs failed: {', '.join(self.failed)}. "
                "Run the same command again to retry them"
            )

    def __str__(self) -> str:
        files = "table.md, table.csv, plot.png" if self.outcomes else "table.md, table.csv"
        agreement = "" if self.agreement is None else f"\n{self.agreement}"
        return f"{self.table}{agreement}\nwritten to {self.output}: {files}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "runs": [{"name": one.name, **one.report.to_dict()} for one in self.outcomes],
            "encoder_passes": sum(one.report.encoder_passes for one in self.outcomes),
            "skipped": self.num_skipped,
            "failed": self.failed,
            "output": str(self.output),
            **({} if self.agreement is None else {"agreement": asdict(self.agreement)}),
        }


@dataclass(frozen=True, kw_only=True)
class _Task:
    """The arguments of one run, for a worker process."""

    cell: Cell
    store: Path
    folder: Path
    device: str


def ablate(
    grid: Grid,
    store: Path | None,
    output: Path,
    *,
    jobs: int = 1,
    device: str = "auto",
    say: Say = print,
    against: Path | None = None,
) -> Ablation:
    """Run or resume a grid.

    Args:
        store: the feature store of cells whose encoding has none in the grid; None for data/<recipe>.
        jobs: runs at the same time; they share the cores, and use the GPUs in turn.
        against: folder of a finished ablation of the same grid, whose ranking is compared with this one's.

    Returns:
        The results. A run that fails (on a loss that is not finite, say) is named there and does not stop the others.

    Raises:
        RunError: a store is missing or has another encoding, a cell's folder contains a run with other settings, or a
            run was stopped by a signal; or `against` is not an ablation of this grid.
        StoreMismatchError: a store made by another encoder.
    """
    started = time.monotonic()
    tasks = []
    for cell in grid.cells:
        path = grid.stores.get(cell.recipe.store.encoding) or store or Path("data") / cell.recipe.name
        tasks.append(_Task(cell=cell, store=path, folder=(output / cell.name).resolve(), device=device))
    _check(grid, store, tasks)
    wers = {} if against is None else read_wers(against, [cell.name for cell in grid.cells])
    if against is not None and len({cell.group for cell in grid.cells}) < 2:
        raise RunError("--against ranks combinations of settings besides the seed; expected at least two, found 1")
    unfinished = [task for task in tasks if not Run(task.folder).is_finished]
    num_skipped = len(tasks) - len(unfinished)
    say(f"{len(tasks)} runs, {num_skipped} of them finished before")
    failed: dict[str, str] = {}
    for number, (name, report) in enumerate(_run_all(unfinished, jobs), start=num_skipped + 1):
        if isinstance(report, str):
            failed[name] = report
            say(f"{number}/{len(tasks)}  {name} failed: {report}")
            continue
        say(f"{number}/{len(tasks)}  {report}")
        report.require_finished()
    outcomes = []
    for task in tasks:
        if task.cell.name in failed:
            continue
        run = Run(task.folder)
        metrics, ctc_steps = run.metrics(), task.cell.recipe.train.ctc_steps
        outcome = Outcome(
            name=task.cell.name,
            settings=task.cell.settings,
            group=task.cell.group,
            report=TrainReport(**run.state["report"]),
            wers=tuple((entry["step"] - ctc_steps, entry["dev_wer"]) for entry in metrics if "dev_wer" in entry),
            ctc_wers=tuple((entry["step"], entry["dev_ctc_wer"]) for entry in metrics if "dev_ctc_wer" in entry),
            losses=tuple((entry["step"], entry["loss"]) for entry in metrics if "loss" in entry),
        )
        outcomes.append(outcome)
    table = tabulate(outcomes, failed)
    write_text(output / "table.md", table.to_markdown())
    write_text(output / "table.csv", tabulate_runs(outcomes).to_csv())
    if outcomes:
        plot(outcomes, output / "plot.png")
    # With failed runs the means are of other seeds here than there.
    compared = None if against is None or failed else agreement(outcomes, against, wers)
    say(f"done in {time.monotonic() - started:.0f} s")
    return Ablation(
        output=output, outcomes=tuple(outcomes), table=table, num_skipped=num_skipped, failed=failed, agreement=compared
    )


def _check(grid: Grid, store: Path | None, tasks: list[_Task]) -> None:
    """Check before the first run what would stop a later one; errors as `ablate`."""
    if store is not None and all(task.store != store for task in tasks):
        raise RunError(f"--store {str(store)!r} would not be used: the grid names all its stores. Omit --store")
    commands = {}
    for task in tasks:
        encoding = task.cell.recipe.store.encoding
        relevant = [one for one in task.cell.overrides if one.startswith(("corpus.", "encoder.", "store.", "extract."))]
        extract = " ".join([f"tinyaudio extract --recipe {grid.recipe}", *(f"--set {one}" for one in relevant)])
        try:
            opened = FeatureStore.open(task.store)
        except StoreNotFoundError:
            commands[str(task.store)] = f"{extract} --store {task.store}"
            continue
        if opened.encoding != encoding:
            raise RunError(
                f"store {str(task.store)!r} has encoding {opened.encoding}; expected {encoding}. Try "
                f'`{extract} --store DIR`, and add DIR to the grid: [stores] {encoding} = "DIR"'
            )
        run = Run(task.folder)
        if run.state:
            run.check_resumable(task.cell.recipe, opened.fingerprint_id)
    if commands:
        raise RunError(f"no feature store at {', '.join(commands)}. Try `{' && '.join(commands.values())}`")


def _run_all(tasks: list[_Task], jobs: int) -> Iterator[tuple[str, TrainReport | str]]:
    """Run all tasks; yields each run's name when it ends, with its report or with the reason why it failed."""
    if jobs == 1:
        for task in tasks:
            yield task.cell.name, _run(task)
        return
    threads, context = max(1, torch.get_num_threads() // jobs), get_context("spawn")
    gpus = context.SimpleQueue()
    for gpu in gpus_for(jobs, tasks[0].device if tasks else "cpu"):
        gpus.put(gpu)
    with ProcessPoolExecutor(jobs, context, _begin_worker, (threads, gpus)) as pool:
        names = {pool.submit(_run, task): task.cell.name for task in tasks}
        for future in as_completed(names):
            yield names[future], future.result()


def _run(task: _Task) -> TrainReport | str:
    run, cell = Run(task.folder), task.cell
    run.folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"resume": bool(run.state), "device": task.device, "overrides": cell.overrides}
    try:
        return train(cell.recipe, task.store, run, say=run.log, **options)
    except RunError as error:
        return str(error)
    finally:
        gc.collect()  # a model and its trainer refer to each other; the next run needs their memory now
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def gpus_for(jobs: int, device: str) -> list[str | None]:
    """Assign the visible GPUs to workers in turn; None without a GPU."""
    if device == "cpu":
        return [None] * jobs
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(torch.cuda.device_count())] if named is None else named.replace(" ", "").split(",")
    gpus = [gpu for gpu in gpus if gpu not in ("", "-1")]
    return [gpus[worker % len(gpus)] if gpus else None for worker in range(jobs)]


def _begin_worker(threads: int, gpus: Any) -> None:
    """Limit a worker to its cores and its GPU, and end it with its parent: two writers would share a run's folder."""
    torch.set_num_threads(threads)
    if (gpu := gpus.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA reads it when it is first used, which is later
    parent = os.getppid()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
