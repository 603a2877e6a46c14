"""Options that several commands share, and how they speak. Part of the roof."""

from pathlib import Path
from typing import Annotated

import typer

from tinyaudio.cli.console import say as say

ANY_SPELLING = {"token_normalize_func": lambda name: name.replace("_", "-")}  # --output_dir is --output-dir

RecipeOption = Annotated[str, typer.Option("--recipe", help="Name of a shipped recipe, or the path of a TOML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override one setting: section.key=value. Repeatable.")
]
StoreOption = Annotated[Path | None, typer.Option("--store", help="Feature store.  [default: data/<recipe>]")]
JsonOption = Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")]


def default_store(recipe_name: str, split: str | None = None) -> Path:
    """data/<recipe>, or data/<recipe>-<split> for a split extracted by itself."""
    return Path("data") / (recipe_name if split is None else f"{recipe_name}-{split}")
