"""The `store` commands: look into, check, compare, join and cut out feature stores. Part of the roof."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated

import typer

from tinyaudio.cli.options import JsonOption, say


def _not_a_run(path: Path) -> Path:
    """Refuse the folder of a run, naming the store it was trained on."""
    if (path / "run.json").is_file():
        from pipelines.errors import RunError
        from pipelines.train.runs import Run

        made_from = Run(path).state.get("store", "data/<recipe>")
        raise RunError(f"{str(path)!r} is a run, not a feature store; it was trained on {made_from!r}, name that")
    return path


StoreArgument = Annotated[Path, typer.Argument(help="Feature store.", metavar="STORE", callback=_not_a_run)]

SHOWN_IDS = 10  # of those that are not there

store = typer.Typer(help="Look into, check, compare, join and cut out feature stores.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(store, name="store")


@store.command("info")
def info(path: StoreArgument, json: JsonOption = False) -> None:
    """Say what is in a store, by whom, how complete, and who is in quarantine and why."""
    from cache import store_info

    found = store_info(path)
    print(found.to_table())
    if json:
        print(json_module.dumps(found.to_dict()))


@store.command("verify")
def verify(
    path: StoreArgument,
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte, not only sizes and records.")] = False,
    json: JsonOption = False,
) -> None:
    """Name every fault: flipped bits (--deep), truncated, missing or swapped files, records of another store.

    Exits 1 if there is one. `tinyaudio extract`, typed again, repairs exactly the damaged shards; what an interrupted
    check has found counts too.
    """
    from tqdm import tqdm

    from cache import FeatureStore, find_faults

    opened = FeatureStore.open(path)
    faults = []
    is_shown = deep and sys.stderr.isatty()
    with tqdm(total=len(opened.committed_shards()), unit=" shards", file=sys.stderr, disable=not is_shown) as bar:
        for fault in find_faults(opened, deep=deep, progress=lambda _: bar.update()):
            faults.append(fault)
            tqdm.write(fault.message, file=sys.stdout)
    if json:
        print(json_module.dumps({"faults": [fault.to_dict() for fault in faults], "deep": deep}))
    elif not faults:
        checked = "every byte" if deep else "records and sizes; --deep reads every byte"
        print(f"{path} is sound: {len(opened.committed_shards())} of {opened.num_shards} shards, checked {checked}")
    if faults:
        say(f"tinyaudio: {len(faults)} fault{'s' if len(faults) > 1 else ''} in {path}")
        raise typer.Exit(1)


@store.command("diff")
def diff(
    path: StoreArgument,
    other: Annotated[Path, typer.Argument(help="The store to compare with.", metavar="OTHER")],
    json: JsonOption = False,
) -> None:
    """List the settings in which two extractions differ. Exits 1 if they do."""
    from cache import store_diff

    differences = store_diff(path, other)
    for name, (one, two) in differences.items():
        print(f"{name}: {one!r} in {path}, {two!r} in {other}")
    if json:
        print(json_module.dumps({name: list(values) for name, values in differences.items()}))
    elif not differences:
        print(f"{path} and {other} hold the same extraction")
    if differences:
        raise typer.Exit(1)


@store.command("merge")
def merge(
    destination: Annotated[Path, typer.Argument(help="Store to fill; made if absent.", metavar="DESTINATION")],
    sources: Annotated[list[Path], typer.Argument(help="Stores of the same plan.", metavar="SOURCE...")],
    json: JsonOption = False,
) -> None:
    """Adopt the finished shards of stores that several machines made with `extract --shard i/N`."""
    from cache import store_merge

    merged = store_merge(destination, sources)
    state = f"{len(merged.pending)} still missing" if merged.pending else "complete and sealed"
    print(f"{destination}: {len(merged.adopted)} shards adopted, {len(merged.present)} were there; {state}")
    if json:
        print(json_module.dumps(merged.to_dict()))


@store.command("export")
def export(
    source: StoreArgument,
    destination: Annotated[Path, typer.Argument(help="The smaller store to make.", metavar="DESTINATION")],
    max_hours: Annotated[
        float | None, typer.Option("--max-hours", min=0.0, help="At most so many hours of each split, drawn at random.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Only this split.")] = None,
    ids: Annotated[Path | None, typer.Option("--ids", help="A file of utterance ids, one a line.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw.")] = 0,
) -> None:
    """Copy some utterances into a smaller store, for quick ablations; frames stay bit for bit the same."""
    from cache import store_export, store_info, unknown_ids

    if destination.resolve() == source.resolve():
        raise typer.BadParameter(
            f"{str(destination)!r} is the source; expected another folder", param_hint="DESTINATION"
        )
    if split is not None and split not in (held := sorted(store_info(source).splits)):
        raise typer.BadParameter(
            f"{split!r} is not in {str(source)!r}; expected one of {', '.join(held)}", param_hint="--split"
        )
    wanted = None if ids is None else _read_ids(ids)
    if wanted is not None and (unknown := unknown_ids(source, wanted)):
        shown = ", ".join(unknown[:SHOWN_IDS]) + (", ..." if len(unknown) > SHOWN_IDS else "")
        say(f"warning: {len(unknown)} of the {len(wanted)} ids in {ids} are not stored in {source}: {shown}")
    try:
        made = store_export(source, destination, max_hours=max_hours, split=split, ids=wanted, seed=seed)
    except ValueError as error:
        if isinstance(error, _cache_error()):
            raise
        raise typer.BadParameter(str(error)) from error
    print(store_info(made.path).to_table())


def _cache_error() -> type[Exception]:
    from cache import CacheError

    return CacheError


def _read_ids(path: Path) -> list[str]:
    if not path.is_file():
        raise typer.BadParameter(f"{str(path)!r} does not exist; expected a file of utterance ids", param_hint="--ids")
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise typer.BadParameter(
            f"{str(path)!r} is not UTF-8 text (byte {error.start}); expected utterance ids, one a line",
            param_hint="--ids",
        ) from error
