"""The commands of stage two: `train`, `ablate` and `runs`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyaudio.cli.console import print_report, say, warn
from tinyaudio.cli.options import DeviceOption, JsonOption, RecipeOption, SetOption, StoreOption, default_store


def train(
    recipe: RecipeOption = "demo",
    store: StoreOption = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Name under runs/, or a folder.  [default: <recipe>-<time>]")
    ] = None,
    set_: SetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume from the last checkpoint of --run, or of the newest run.")
    ] = False,
    dev_run: Annotated[
        bool,
        typer.Option("--dev-run", help="Train, evaluate, save, load and resume for one step in a temporary folder."),
    ] = False,
    overfit: Annotated[
        int | None,
        typer.Option(
            "--overfit", min=1, help="Train and evaluate on this many utterances only; fails unless WER gets near 0."
        ),
    ] = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Stage two: train the projector from a feature store. Nothing else is trained; the encoder is not even loaded.

    SIGTERM saves and exits with code 0, Ctrl-C exits at once; --run and --resume resume either. On several GPUs:
    torchrun --nproc-per-node N -m -- tinyaudio train ...
    """
    from pipelines.processes import is_main_process, num_processes
    from pipelines.recipes import load_recipe
    from pipelines.train.dev_run import dev_run as run_dev
    from pipelines.train.runs import Run, run_folder
    from pipelines.train.stage import train as stage_two

    overrides = [*(set_ or []), *([] if overfit is None else [f"train.overfit_utterances={overfit}"])]
    loaded = load_recipe(recipe, overrides)
    path = store or default_store(loaded.name)
    if dev_run:
        if run is not None or resume or overfit is not None:
            raise typer.BadParameter("omit --run, --resume and --overfit", param_hint="--dev-run")
        print_report(run_dev(loaded, path, device=device, say=say), json)
        return
    if run is None and not resume and num_processes() > 1:
        raise typer.BadParameter("several processes that train together need a name for the run", param_hint="--run")
    folder = run_folder("latest" if resume and run is None else run, loaded.name).resolve()
    is_first = is_main_process()
    try:
        report = stage_two(loaded, path, Run(folder), resume=resume, device=device, say=say, overrides=overrides)
    except KeyboardInterrupt:
        if is_first:
            warn(f"interrupted; run the same command with --run {folder} --resume to resume")
        sys.exit(130)
    if is_first:
        print_report(report, json)


def ablate(
    grid: Annotated[str, typer.Argument(help="Name of a bundled grid, or path of a TOML file.")] = "demo",
    store: Annotated[
        Path | None, typer.Option("--store", help="Feature store.  [default: the grid's, else data/<recipe>]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Folder for runs and tables.  [default: runs/ablate-<grid>]")
    ] = None,
    ctc_only: Annotated[
        int | None,
        typer.Option(
            "--ctc-only", min=1, help="Train this many steps on the CTC loss alone: minutes instead of hours."
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", help="Folder of a finished ablation of the same grid, to compare the rankings."),
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Number of runs at the same time.")] = 1,
    set_: SetOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Train every combination of a grid on one store, and print a table. Also writes a plot.

    Finished runs are skipped: run the same command again to resume, or to retry what failed.
    """
    from pipelines.ablate.grid import load_grid
    from pipelines.ablate.sweep import ablate as run_grid

    alone = [] if ctc_only is None else ["train.steps=0", f"train.ctc_steps={ctc_only}"]
    loaded = load_grid(grid, [*(set_ or []), *alone])
    folder = output or Path("runs") / f"ablate-{loaded.name}{'-ctc' if alone else ''}"
    done = run_grid(loaded, store, folder, jobs=jobs, device=device, say=say, against=against)
    print_report(done, json)
    done.check()


def runs(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names or folders of runs to compare.  [default: list all]")
    ] = None,
    under: Annotated[Path, typer.Option("--under", help="Folder of runs.")] = Path("runs"),
    json: JsonOption = False,
) -> None:
    """List runs, or compare some: the settings that differ, and the results."""
    from pipelines.train.run_table import compare_runs, list_runs

    table: Any = compare_runs(names, under) if names else list_runs(under)
    print_report(table, json)
