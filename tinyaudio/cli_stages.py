"""The command `train`: stage two. Part of the roof."""

import json as json_module
from typing import Annotated

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
    """Register the command."""
    app.command("train")(train)


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
