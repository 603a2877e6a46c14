"""The `serve` command: OpenAI's audio API and a web page, by one model."""

import os
import signal
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from tinyaudio.cli.console import say, usage
from tinyaudio.cli.options import DeviceOption, DraftOption, ModelOption, check_decoding
from tinyaudio.model.errors import TinyAudioError

KEY_VARIABLE = "TINYAUDIO_API_KEY"


def serve(
    model: ModelOption = None,
    device: DeviceOption = "auto",
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every address, and requires a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 picks a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=KEY_VARIABLE, show_envvar=False, help=f"Key that requests need.  [default: ${KEY_VARIABLE}]"
        ),
    ] = None,
    max_upload_mb: Annotated[int, typer.Option("--max-upload-mb", min=1, help="Largest request, in MiB.")] = 200,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests accepted at a time; others get status 429.")] = 64,
    num_beams: Annotated[
        int | None, typer.Option(min=1, help="Beams; 1 is greedy, and the fastest.  [default: the model's (4)]")
    ] = None,
    draft: DraftOption = "auto",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Segments decoded at once; changes the speed, not the text.")
    ] = 8,
    no_page: Annotated[bool, typer.Option("--no-page", help="Serve the API only; needs no gradio.")] = False,
) -> None:
    """Serve OpenAI's transcription API, and a page at / to try the model. Needs the extra: tinyaudio[serve]."""
    check_decoding(draft, num_beams)
    for name in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", *(() if no_page else ("gradio",))):
        if find_spec(name) is None:
            hint = ", or add --no-page" if name == "gradio" else ""
            raise TinyAudioError(f"serve requires {name}, which is missing. Try: pip install 'tinyaudio[serve]'{hint}")
    from tinyaudio.server import Limits, bind, build_app, is_loopback, public_name
    from tinyaudio.server import serve as serve_app

    if api_key is None and not is_loopback(host):
        usage(f"--host {host} is reachable from other machines; expected an API key. Set ${KEY_VARIABLE} or --api-key")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key):
        usage(f"--api-key or ${KEY_VARIABLE}: expected printable ASCII characters without spaces around them")
    if api_key == "":
        usage(f"--api-key or ${KEY_VARIABLE} is empty; expected a key, or omit it")
    from tinyaudio.model.recognize import Options
    from tinyaudio.request_queue import RequestQueue
    from tinyaudio.transcribe import Transcriber, default_model

    name = model if model is not None else default_model(" with --model")
    listener = bind(host, port)
    options = Options(num_beams=num_beams, draft=draft, batch_size=batch_size)

    def load() -> Transcriber:
        transcriber = Transcriber.load(name, device=device)
        transcriber.recognizer.drafter(options)  # an error now, and not with every request
        return transcriber

    queue = RequestQueue(load, options, max_requests=max_queue)
    mount = None
    with tempfile.TemporaryDirectory(prefix="tinyaudio-") as folder:
        if not no_page:
            os.environ["GRADIO_TEMP_DIR"] = folder  # the page's uploads, removed at the end
            from tinyaudio.page import mount_page

            mount = lambda app: mount_page(app, queue, public_name(name), example_recordings())  # noqa: E731
        limits = Limits(max_upload_bytes=max_upload_mb << 20)
        app = build_app(queue, public_name(name), host=host, api_key=api_key, limits=limits, mount_page=mount)
        shown = f"[{host}]" if ":" in host else host
        say(f"tinyaudio: serving at http://{shown}:{listener.getsockname()[1]}/ (docs at /docs); press Ctrl-C to stop")
        if serve_app(app, queue, listener) == signal.SIGINT:
            raise typer.Exit(130)


def example_recordings() -> list[Path]:
    """Find the recordings that the Space offers; none if only the package tinyaudio is installed."""
    spec = find_spec("pipelines")
    return sorted(Path(spec.origin).with_name("space").glob("examples/*.opus")) if spec and spec.origin else []
