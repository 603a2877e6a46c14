"""The commands of stage two: train, ablate and runs. Part of the roof."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyaudio.cli.options import DeviceOption, JsonOption, RecipeOption, SetOption, StoreOption, default_store, say


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("train")(train)
    app.command("ablate")(ablate)
    app.command("runs")(runs)


def train(
    recipe: RecipeOption = "demo",
    store: StoreOption = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Name under runs/, or a folder.  [default: recipe and time]")
    ] = None,
    set_: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    dev_run: Annotated[
        bool,
        typer.Option(
            "--dev-run", help="One step of everything in a temporary folder: train, evaluate, save, load, resume."
        ),
    ] = False,
    overfit: Annotated[
        int | None,
        typer.Option(
            "--overfit", min=1, help="Train and evaluate on this many utterances alone; must end near 0 % WER."
        ),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Stage two: train the projector from a feature store; nothing else trains, and the encoder is not even loaded.

    SIGTERM saves and ends with exit code 0, Ctrl-C ends at once; --run and --resume go on. On several GPUs:
    torchrun --nproc-per-node N -m -- tinyaudio train ...
    """
    from pipelines.processes import is_main_process, num_processes
    from pipelines.recipes import load_recipe
    from pipelines.train.dev_run import rehearse
    from pipelines.train.runs import Run, run_folder
    from pipelines.train.stage import train as stage_two

    overrides = [*(set_ or []), *([] if overfit is None else [f"train.overfit_utterances={overfit}"])]
    loaded = load_recipe(recipe, overrides)
    path = store or default_store(loaded.name)
    if dev_run:
        if run is not None or resume or overfit is not None:
            raise typer.BadParameter("goes without --run, --resume and --overfit", param_hint="--dev-run")
        _report(rehearse(loaded, path, device=device, say=say), json)
        return
    if run is None and not resume and num_processes() > 1:
        raise typer.BadParameter("name the run when several processes train together", param_hint="--run")
    folder = run_folder("latest" if resume and run is None else run, loaded.name).resolve()
    is_first = is_main_process()
    try:
        report = stage_two(loaded, path, Run(folder), resume=resume, device=device, say=say)
    except KeyboardInterrupt:
        if is_first:
            say(f"tinyaudio: interrupted; the same command with --run {folder} --resume goes on")
        sys.exit(130)
    if is_first:
        _report(report, json)


def _report(results: Any, json: bool) -> None:
    print(results)
    if json:
        print(json_module.dumps(results.to_dict()))


def ablate(
    grid: Annotated[str, typer.Argument(help="A shipped grid's name, or the path of a TOML file.")] = "demo",
    store: Annotated[
        Path | None, typer.Option("--store", help="Feature store.  [default: the grid's, else data/<recipe>]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder of runs and tables.  [default: runs/ablate-<grid>]")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at the same time.")] = 1,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Train every combination of a grid on one store; ends with a table and a plot.

    Finished runs are skipped, so the same command again goes on after a kill, and tries again what failed.
    """
    from pipelines.ablate.grid import load_grid
    from pipelines.ablate.sweep import ablate as run_grid

    loaded = load_grid(grid, set_ or [])
    done = run_grid(loaded, store, output or Path("runs") / f"ablate-{loaded.name}", jobs=jobs, device=device, say=say)
    _report(done, json)
    done.check()


def runs(
    names: Annotated[
        list[str] | None, typer.Argument(help="Runs to compare, by name or folder; none lists all.")
    ] = None,
    under: Annotated[Path, typer.Option("--under", help="Folder that holds the runs.")] = Path("runs"),
    json: JsonOption = False,
) -> None:
    """List runs, or compare some: which settings differ, and what came of it."""
    from pipelines.train.run_table import compare_runs, list_runs

    table: Any = compare_runs(names, under) if names else list_runs(under)
    _report(table, json)
