"""The `serve` command: a web page to try a model on."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tinyaudio.cli.console import say
from tinyaudio.cli.options import DeviceOption, ModelOption


def serve(
    model: ModelOption = None,
    device: DeviceOption = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 7860,
) -> None:
    """Serve a web page that transcribes: microphone, upload, transcript. Needs the extra: tinyaudio[serve]."""
    from tinyaudio.page import build_page, import_gradio, open_page

    import_gradio()  # a missing extra is reported before the model is loaded
    from tinyaudio.transcribe import Transcriber

    page = build_page(Transcriber.load(model, device=device), example_recordings())
    say(f"tinyaudio: the page is at {open_page(page, host, port)}; press Ctrl-C to stop")
    page.block_thread()


def example_recordings() -> list[Path]:
    """Find the recordings that the Space offers; none if only the package tinyaudio is installed."""
    spec = find_spec("pipelines")
    return sorted(Path(spec.origin).with_name("space").glob("examples/*.opus")) if spec and spec.origin else []
