"""The roof over trying things out: `tinyaudio doctor` and `tinyaudio demo`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from tinyaudio.cli.options import ANY_SPELLING, say


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("doctor")(doctor)
    app.command("demo", context_settings=ANY_SPELLING)(demo)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Say what this machine can do, a line each, with remedies. Exit 1 if something will fail."""
    from dataclasses import asdict

    from tinyaudio import doctor as office

    findings = list(office.examine())
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            remedy = f"  -> {finding.remedy}" if finding.remedy else ""
            print(f"{finding.state:4}  {finding.name}: {finding.found}{remedy}")
    sys.exit(1 if any(finding.state == "bad" for finding in findings) else 0)


def demo(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id; default $TINYAUDIO_MODEL, else runs/latest.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
) -> None:
    """Open a page to try a model: microphone, upload, transcript with segments. Needs the extra: tinyaudio[demo]."""
    from tinyaudio.page import build_page, import_gradio, open_page

    import_gradio()  # before the model takes its time to load
    from tinyaudio.transcribe import Transcriber

    page = build_page(Transcriber.load(model, device=device), _examples())
    say(f"tinyaudio: the page is at {open_page(page, host, port)}; Ctrl-C ends it")
    page.block_thread()


def _examples() -> list[Path]:
    """Find the recordings that the Space offers; none where only the package tinyaudio is installed."""
    from importlib.util import find_spec

    spec = find_spec("pipelines")
    return sorted(Path(spec.origin).with_name("space").glob("examples/*.opus")) if spec and spec.origin else []
