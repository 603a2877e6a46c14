"""The `publish` command: a folder for the hub, with a card from measured numbers."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

from tinyaudio.cli.console import usage
from tinyaudio.cli.options import JsonOption


def publish(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[str, typer.Option(help="Repository on the hub: owner/name.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Make the folder and the card, but do not upload.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    encoder_id: Annotated[str | None, typer.Option(help="Hub id of the encoder, if the run used a local copy.")] = None,
    decoder_id: Annotated[str | None, typer.Option(help="Hub id of the decoder, if the run used a local copy.")] = None,
    power_watts: Annotated[
        float | None, typer.Option(min=0, help="Power of the machine during training, W, for the energy on the card.")
    ] = None,
    grams_per_kwh: Annotated[
        float | None, typer.Option(min=0, help="CO2 emissions of its electricity, g per kWh, for the card.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Hub token.  [default: HF_TOKEN or the stored one]")] = None,
    json: JsonOption = False,
) -> None:
    """Publish a run: the model, a card with measured numbers, evaluations and samples."""
    from pipelines.publish.stage import REPOSITORY
    from pipelines.publish.stage import publish as stage

    if not REPOSITORY.fullmatch(repo):
        usage(f"--repo {repo!r}: expected owner/name")
    done = stage(
        run,
        repo,
        dry_run=dry_run,
        private=private,
        encoder_id=encoder_id,
        decoder_id=decoder_id,
        power_watts=power_watts,
        grams_per_kwh=grams_per_kwh,
        token=token,
    )
    print(f"{len(done.files)} files in {done.folder}")
    print(done.url or f"dry run: nothing was uploaded; check {done.folder / 'README.md'}")
    if json:
        print(json_module.dumps({"folder": str(done.folder), "files": list(done.files), "url": done.url}))
