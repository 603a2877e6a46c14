"""The `bench` commands: speed and memory of the store and of each stage."""

import json as json_module
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyaudio.cli.console import aligned
from tinyaudio.cli.options import DeviceOption, JsonOption

FullSizeOption = Annotated[
    bool, typer.Option("--full-size", help="HuBERT-large and SmolLM3-3B shapes with random weights.")
]

AudioOption = Annotated[
    float | None, typer.Option("--audio-s", min=1, help="Seconds of audio in a round.  [default: minutes of work]")
]
RoundsOption = Annotated[
    int | None, typer.Option("--rounds", min=1, help="Rounds, of which medians are taken.  [default: 1 to 5]")
]

bench = typer.Typer(help="Measure speed and memory. Ratios come from one run, side by side.", no_args_is_help=True)


def _bench(stage: str, json: bool, *arguments: Any, **settings: Any) -> None:
    """Call `pipelines.bench.<stage>.bench_<stage>` and print its results, also as JSON if requested."""
    module = import_module(f"pipelines.bench.{stage}")
    results = getattr(module, f"bench_{stage}")(*arguments, **settings)
    print(format_results(results, module.NOTES))
    if json:
        print(json_module.dumps(results))


def format_results(results: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """Lay out results: single values with their goals or meanings, then one table for each group of values."""
    rows = []
    for name, value in results.items():
        if isinstance(value, str):
            rows.append([name, "", value])
        elif not isinstance(value, dict):
            rows.append([name, _cell(value), notes.get(name, "")])
    blocks = [aligned(rows)]
    for name, group in results.items():
        if isinstance(group, dict):
            is_nested = all(isinstance(values, dict) for values in group.values())
            table = {row: _flat(values) for row, values in group.items()} if is_nested else {"": group}
            header = [name, *next(iter(table.values()))]
            blocks.append(aligned([header, *([row, *map(_cell, values.values())] for row, values in table.items())]))
    return "\n\n".join(blocks)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Put the values of a nested group beside the others, under their own names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def _cell(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return str(value)
    return f"{value:,.3f}" if isinstance(value, float) and abs(value) < 100 else f"{value:,.0f}"


@bench.command("store")
def store(
    directory: Annotated[Path, typer.Option("--directory", help="A folder on the disk to measure.")] = Path(),
    size_mb: Annotated[int, typer.Option("--size-mb", min=16, help="MiB of features to read.")] = 1024,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds, of which medians are taken.")] = 5,
    json: JsonOption = False,
) -> None:
    """The feature store on this disk: writing, and reading in training order, against plain alternatives."""
    _bench("store", json, directory, size_mb=size_mb, rounds=rounds)


@bench.command("extract")
def extract(
    full_size: FullSizeOption = False,
    audio_s: AudioOption = None,
    rounds: RoundsOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Stage one: the encoder over a corpus, against plain loops; and the host's part without an encoder."""
    _bench("extract", json, full_size=full_size, audio_s=audio_s, rounds=rounds, device=device)


@bench.command("train")
def train(full_size: FullSizeOption = False, device: DeviceOption = "auto", json: JsonOption = False) -> None:
    """Stage two: a step from the store, against the encoder in the loop and a plain loop."""

    def print_race(by_name: dict[str, Any]) -> None:
        print(format_results({"contestants": by_name}, {}), flush=True)

    _bench("train", json, full_size=full_size, device=device, on_race=print_race)


@bench.command("transcribe")
def transcribe(
    full_size: FullSizeOption = False,
    audio_s: AudioOption = None,
    rounds: RoundsOption = None,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Inference: speed over real time and memory, against plain `pipeline()`."""
    _bench("transcribe", json, full_size=full_size, audio_s=audio_s, rounds=rounds, device=device)


@bench.command("serve")
def serve(device: DeviceOption = "auto", json: JsonOption = False) -> None:
    """The server: 1, 8 and 50 clients against the batched command line on the same files."""
    _bench("serve", json, device=device)
