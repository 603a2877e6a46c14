"""The `publish` command: a folder for the hub, with a card from measured numbers."""

import json as json_module
from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("publish")(publish)


def publish(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[str, typer.Option(help="Repository on the hub: owner/name.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Make the folder and the card, and stop.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    encoder_id: Annotated[str | None, typer.Option(help="Where others find the encoder, if yours is a folder.")] = None,
    decoder_id: Annotated[str | None, typer.Option(help="Where others find the decoder, if yours is a folder.")] = None,
    power_watts: Annotated[
        float | None, typer.Option(min=0, help="Power of the machine while training, W, for the card's energy.")
    ] = None,
    grams_per_kwh: Annotated[float | None, typer.Option(min=0, help="CO2 of its electricity, g for a kWh.")] = None,
    token: Annotated[str | None, typer.Option(help="Token of the hub; default HF_TOKEN or the stored one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
) -> None:
    """Publish a run: model, card with measured numbers, evaluations, samples and checksums."""
    from pipelines.publish.stage import Parts
    from pipelines.publish.stage import publish as stage

    done = stage(
        run,
        repo,
        dry_run=dry_run,
        private=private,
        parts=Parts(encoder_id=encoder_id, decoder_id=decoder_id),
        power_watts=power_watts,
        grams_per_kwh=grams_per_kwh,
        token=token,
    )
    print(f"{len(done.files)} files in {done.folder}")
    print(done.url or "nothing was uploaded (--dry-run); read README.md there")
    if json:
        print(json_module.dumps({"folder": str(done.folder), "files": list(done.files), "url": done.url}))
