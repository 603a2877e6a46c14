"""Options that several commands share, and how help lists commands."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperGroup

from tinyaudio.cli.console import usage

RecipeOption = Annotated[str, typer.Option("--recipe", help="Name of a bundled recipe, or path of a TOML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting. Repeatable.")
]
StoreOption = Annotated[Path | None, typer.Option("--store", help="Feature store.  [default: data/<recipe>]")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps, ...")]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder or hub id.  [default: $TINYAUDIO_MODEL, else runs/latest]")
]

DRAFTS = ("auto", "projector", "encoder", "none")  # as `tinyaudio.model.drafts.KINDS`, which imports torch
DraftOption = Annotated[
    str, typer.Option("--draft", help="What drafts greedy text, for speed: auto, projector, encoder or none.")
]

NBestOption = Annotated[
    int | None,
    typer.Option(
        "--ctc-nbest", min=2, max=100, help="Let the decoder choose among the N best texts of the projector's CTC head."
    ),
]


def check_decoding(
    draft: str, num_beams: int | None, ctc_nbest: int | None = None, length_penalty: float | None = None
) -> None:
    """Exit with a usage error for a value that cannot be used, or for options that exclude each other."""
    if length_penalty is not None and not math.isfinite(length_penalty):
        usage(f"--length-penalty {length_penalty:g}: expected a number")
    if draft not in DRAFTS:
        usage(f"--draft {draft!r}: expected one of {', '.join(DRAFTS)}")
    if draft in ("projector", "encoder") and num_beams not in (None, 1):
        usage(f"--draft {draft} is for greedy decoding; expected --num-beams 1, found {num_beams}")
    if ctc_nbest is not None and (num_beams is not None or draft not in ("auto", "none")):
        usage("--ctc-nbest chooses a text and writes none; expected no --num-beams and no --draft. Omit them")


class CommandGroup(TyperGroup):
    """Commands whose help lists the whole first sentence of each, under headings, in order."""

    headings: ClassVar[Mapping[str, Iterable[str]]] = {}  # heading -> names of commands; without any: one list

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, self.commands))
        for heading, names in (self.headings or {"Commands": self.commands}).items():
            with formatter.section(heading):
                formatter.write_dl(
                    [(name.ljust(width), self.commands[name].get_short_help_str(limit=1000)) for name in names]
                )


def default_store(recipe_name: str, split: str | None = None) -> Path:
    """Return data/<recipe>, or data/<recipe>-<split> for a split extracted on its own."""
    return Path("data") / (recipe_name if split is None else f"{recipe_name}-{split}")
