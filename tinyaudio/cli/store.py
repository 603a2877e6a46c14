"""The `store` commands: describe, check, compare, merge and export feature stores."""

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tinyaudio.cli.console import ProgressBar, warn
from tinyaudio.cli.options import JsonOption


def _not_a_run(path: Path) -> Path:
    """Refuse the folder of a run, and name the store it was trained on."""
    if (path / "run.json").is_file():
        from pipelines.errors import RunError
        from pipelines.train.runs import Run

        trained_on = Run(path).state.get("store", "data/<recipe>")
        raise RunError(f"expected a feature store, found a run: {str(path)!r}. It was trained on {trained_on!r}.")
    return path


StoreArgument = Annotated[Path, typer.Argument(help="Feature store.", metavar="STORE", callback=_not_a_run)]

store = typer.Typer(help="Describe, check, compare, merge and export stores.", no_args_is_help=True)


@store.command("info")
def info(path: StoreArgument, json: JsonOption = False) -> None:
    """Print what a store holds, how complete it is, and which utterances are in quarantine and why."""
    from cache import store_info

    found = store_info(path)
    print(found.to_table())
    if json:
        print(json_module.dumps(asdict(found)))


@store.command("verify")
def verify(
    path: StoreArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte, not only records and file sizes.")] = False,
    json: JsonOption = False,
) -> None:
    """Find damage: flipped bits (--deep), truncated, missing or swapped files, records of another store.

    Exits 1 if there is any. The same `tinyaudio extract` command repairs exactly the damaged shards, including those
    that an interrupted check has found.
    """
    from cache import FeatureStore, find_faults

    opened = FeatureStore.open(path)
    num_committed, num_checked, faults = len(opened.committed_shards()), 0, []
    with ProgressBar("verify", num_committed, "shards", is_shown=deep) as bar:

        def count(_: object) -> None:
            nonlocal num_checked
            num_checked += 1
            bar.update(num_checked)

        for fault in find_faults(opened, deep=deep, progress=count):
            faults.append(fault)
            bar.clear()
            print(fault.message)
    if json:
        print(json_module.dumps({"faults": [asdict(fault) for fault in faults], "deep": deep}))
    elif not faults:
        checked = "every byte" if deep else "records and sizes; --deep reads every byte"
        print(f"{path} is sound: {num_committed} of {opened.num_shards} shards, checked {checked}")
    if faults:
        warn(f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in {path}")
        raise typer.Exit(1)


@store.command("diff")
def diff(
    path: StoreArgument,
    other: Annotated[Path, typer.Argument(help="Store to compare with.", metavar="OTHER")],
    json: JsonOption = False,
) -> None:
    """List the settings in which two extractions differ. Exits 1 if they do."""
    from cache import store_diff

    differences = store_diff(path, other)
    for name, (one, two) in differences.items():
        if name == "plan_id":  # a digest of 64 digits; --json prints it whole
            one, two = one[:12], two[:12]
        print(f"{name}: {one!r} in {path}, {two!r} in {other}")
    if json:
        print(json_module.dumps({name: list(values) for name, values in differences.items()}))
    elif not differences:
        print(f"{path} and {other} contain the same extraction")
    if differences:
        raise typer.Exit(1)


@store.command("merge")
def merge(
    destination: Annotated[
        Path, typer.Argument(help="Store to fill; created if it does not exist.", metavar="DESTINATION")
    ],
    sources: Annotated[list[Path], typer.Argument(help="Stores of the same plan.", metavar="SOURCE...")],
    json: JsonOption = False,
) -> None:
    """Collect the finished shards of stores that several machines wrote with `extract --shard i/N`."""
    from cache import store_merge

    merged = store_merge(destination, sources)
    state = f"{len(merged.pending)} still missing" if merged.pending else "complete and sealed"
    print(f"{destination}: {len(merged.adopted)} shards added, {len(merged.present)} already present; {state}")
    if json:
        print(json_module.dumps(asdict(merged)))


@store.command("export")
def export(
    source: StoreArgument,
    destination: Annotated[Path, typer.Argument(help="Smaller store to create.", metavar="DESTINATION")],
    max_hours: Annotated[
        float | None, typer.Option("--max-hours", min=0.0, help="Maximum hours of each split, drawn at random.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Export only this split.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Random seed for --max-hours.")] = 0,
) -> None:
    """Copy part of a store into a smaller one for quick ablations. The frames stay identical bit for bit."""
    from cache import CacheError, store_export, store_info

    if destination.resolve() == source.resolve():
        raise typer.BadParameter(
            f"{str(destination)!r} is the source; expected another folder", param_hint="DESTINATION"
        )
    if split is not None and split not in (known := sorted(store_info(source).splits)):
        raise typer.BadParameter(
            f"{split!r} is not in {str(source)!r}; expected one of {', '.join(known)}", param_hint="--split"
        )
    try:
        made = store_export(source, destination, max_hours=max_hours, split=split, seed=seed)
    except ValueError as error:
        if isinstance(error, CacheError):
            raise
        raise typer.BadParameter(str(error)) from error
    print(store_info(made.path).to_table())
