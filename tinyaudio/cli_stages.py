"""The commands of the stages: extract and train. Part of the roof."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyaudio.cli_options import (
    DeviceOption,
    JsonOption,
    RecipeOption,
    SetOption,
    StoreOption,
    default_store,
    say,
)

def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("extract")(extract)
    app.command("train")(train)


def _parse_part(part: str) -> tuple[int, int]:
    index, slash, total = part.partition("/")
    if slash and index.isdigit() and total.isdigit() and int(index) < int(total):
        return int(index), int(total)
    raise typer.BadParameter(f"{part!r}; expected i/N with i from 0 to N-1, such as 0/4", param_hint="--shard")


def extract(
    recipe: RecipeOption = "demo",
    store: StoreOption = None,
    split: Annotated[str | None, typer.Option("--split", help="Only this split; default train and dev.")] = None,
    set_: SetOption = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, and stop.")] = False,
    shard: Annotated[str, typer.Option("--shard", help="i/N: only every N-th shard from the i-th on.")] = "0/1",
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Stage one: run the frozen encoder once over a corpus and store its features.

    Typed again it goes on where it stopped; typed after damage it repairs exactly the damaged shards.
    """
    from pipelines import extract as stage
    from pipelines.corpora import open_corpus
    from pipelines.recipes import load_recipe

    part = _parse_part(shard)
    loaded = load_recipe(recipe, set_ or [])
    path = store or default_store(loaded.name, split)
    corpus = open_corpus(loaded.corpus)
    splits, warnings = stage.wanted_splits(loaded, corpus, split)
    for warning in warnings:
        say(f"warning: {warning}")
    if plan:
        _print_plan(loaded, corpus, splits, path, json)
        return
    with _ProgressBar() as bar:
        report = stage.extract(loaded, path, splits=splits, part=part, device=device, on_progress=bar)
    print(report)
    if json:
        print(json_module.dumps(report.to_dict()))


def _print_plan(recipe: Any, corpus: Any, splits: list[str], path: Path, json: bool) -> None:
    from pipelines.planning import plan_corpus, summarize
    from tinyaudio.frozen import load_config

    dim = load_config(recipe.encoder.id, recipe.encoder.revision).hidden_size
    summary = summarize(plan_corpus(recipe, corpus, splits), dim, path)
    print(summary)
    if json:
        print(json_module.dumps(summary.to_dict()))


class _ProgressBar:
    """Audio hours done, on stderr, when that is a terminal."""

    def __enter__(self) -> "_ProgressBar":
        from tqdm import tqdm

        self._bar = tqdm(total=None, unit="h", file=sys.stderr, disable=None, bar_format=None, desc="extract")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, audio_s: float, state: dict[str, Any]) -> None:
        self._bar.total = state["total_s"] / 3600
        self._bar.set_postfix_str(
            f"shard {state['shard']}, {state['written_bytes'] / 1e9:.2f} GB, {state['bad']} quarantined", refresh=False
        )
        self._bar.update(audio_s / 3600)


def train(
    recipe: RecipeOption = "demo",
    store: StoreOption = None,
    run: Annotated[str | None, typer.Option("--run", help="Name under runs/, or a folder; default recipe and time.")] = None,
    set_: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Stage two: train the projector from a feature store; nothing else trains, and the encoder is not even loaded."""
    from pipelines.recipes import load_recipe
    from pipelines.runs import Run, run_folder
    from pipelines.train import train as stage_two

    loaded = load_recipe(recipe, set_ or [])
    folder = run_folder("latest" if resume and run is None else run, loaded.name)
    report = stage_two(
        loaded, store or default_store(loaded.name), Run(folder.resolve()), resume=resume, device=device, say=say
    )
    print(report)
    if json:
        print(json_module.dumps(report.to_dict()))
