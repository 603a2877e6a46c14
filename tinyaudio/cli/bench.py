"""The `bench` commands: speed and memory of each stage, as ratios measured side by side. Part of the roof."""

import json as json_module
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyaudio.cli.options import DeviceOption, JsonOption, say

FullSizeOption = Annotated[
    bool, typer.Option("--full-size", help="HuBERT-large and SmolLM3-3B shapes with random weights.")
]

bench = typer.Typer(help="Measure speed and memory; ratios come from one run, side by side.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.add_typer(bench, name="bench")


def _bench(stage: str, json: bool, *arguments: Any, **settings: Any) -> None:
    """Call `pipelines.bench.<stage>.bench_<stage>` and print its table, and its results as JSON where asked for."""
    module = import_module(f"pipelines.bench.{stage}")
    results = getattr(module, f"bench_{stage}")(*arguments, **settings)
    print(module.format_table(results))
    if json:
        print(json_module.dumps(results))


@bench.command("store")
def store(
    directory: Annotated[Path, typer.Option("--directory", help="A folder on the disk to measure.")] = Path(),
    size_mb: Annotated[int, typer.Option("--size-mb", min=16, help="MiB of features to read.")] = 1024,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds, of which medians are taken.")] = 5,
    json: JsonOption = False,
) -> None:
    """The feature store on this disk: writing, reading in training order; against plain alternatives."""
    _bench("store", json, directory, size_mb=size_mb, rounds=rounds)


@bench.command("encodings")
def encodings(
    output: Annotated[Path, typer.Option("--output", help="Folder of stores and runs; the same again goes on.")] = Path(
        "runs/bench-encodings"
    ),
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each encoding.")] = 3,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at the same time.")] = 1,
    json: JsonOption = False,
) -> None:
    """float16 and int8 on the demo corpus: bytes, error, and word errors of projectors trained from each."""
    _bench("encodings", json, output, seeds=seeds, jobs=jobs, say=say)


@bench.command("extract")
def extract(full_size: FullSizeOption = False, device: DeviceOption = "auto", json: JsonOption = False) -> None:
    """Stage one: the encoder over a corpus, against plain loops."""
    from pipelines.bench.extract import bench_extract

    results = bench_extract(full_size=full_size, device=device)
    print(results)
    if json:
        print(json_module.dumps(results.to_dict()))


@bench.command("train")
def train(full_size: FullSizeOption = False, device: DeviceOption = "auto", json: JsonOption = False) -> None:
    """Stage two: a step from the store, with the encoder in the loop, and in a plain loop; each saving switched off."""
    _bench("train", json, full_size=full_size, device=device)


@bench.command("transcribe")
def transcribe(full_size: FullSizeOption = False, device: DeviceOption = "auto", json: JsonOption = False) -> None:
    """Inference: speed over real time and memory, against plain loops."""
    _bench("transcribe", json, full_size=full_size, device=device)
