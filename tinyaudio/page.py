"""A page to try a model on: microphone and upload, transcript, segments to click, warnings in plain words.

Needs the optional extra `serve` (gradio), imported only when a page is built. `pipelines/space` lays the same page out
as a Hugging Face Space.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyaudio.model.errors import TinyAudioError
from tinyaudio.model.guard import CODES, RETRIED

if TYPE_CHECKING:
    from tinyaudio.transcribe import Transcriber

TITLE = "tinyaudio"
COLUMNS = ["start (s)", "end (s)", "text"]
# Moves the player to a clicked segment's start; the row's first cell holds it. gr.Audio has no Python way to seek, and
# its waveform plays an <audio> inside a shadow root, beside an empty one in the page.
SEEK = """(start) => {
  const players = (root) => [...root.querySelectorAll('*')].flatMap(
    (e) => e.tagName === 'AUDIO' && e.src ? [e] : e.shadowRoot ? players(e.shadowRoot) : []);
  const [player] = players(document.querySelector('#recording'));
  if (player && start !== null) { player.currentTime = start; player.play(); }
}"""


Answer = tuple[str, list[list[Any]], str]  # the text, one row (start, end, text) per segment, notes in Markdown


class _StoppedError(Exception):
    """Nobody waits for the answer any more."""


def import_gradio() -> None:
    """Import gradio.

    Raises:
        TinyAudioError: it is not installed.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise TinyAudioError("the page needs gradio, which is not installed; pip install 'tinyaudio[serve]'") from error


def open_page(page: Any, host: str, port: int) -> str:
    """Serve a page, in threads of its own, and return its address; port 0 is any free one.

    Raises:
        TinyAudioError: the port is taken.
    """
    try:
        page.launch(server_name=host, server_port=port or None, share=False, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise TinyAudioError(
            f"port {port} of {host} cannot be listened on: something else does, or the host is not this machine; "
            "name another with --port, 0 for any"
        ) from error
    return str(page.local_url)


def build_page(transcriber: "Transcriber", examples: list[Path] | None = None) -> Any:
    """Lay the page out.

    Args:
        transcriber: what it asks.
        examples: recordings to offer.

    Returns:
        A gradio Blocks, ready for `launch`.

    Raises:
        TinyAudioError: gradio is not installed.
    """
    import_gradio()
    import gradio as gr

    def answer(path: str | None) -> Iterator[Answer]:
        yield from follow_recording(transcriber, path)

    def pick(event: gr.SelectData) -> float:
        return float(event.row_value[0])

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\nEnglish speech to text. Model: `{transcriber.name}`")
        recording = gr.Audio(sources=["upload", "microphone"], type="filepath", label="Recording", elem_id="recording")
        with gr.Row():
            go = gr.Button("Transcribe", variant="primary", elem_id="go")
            stop = gr.Button("Stop", elem_id="stop")
        text = gr.Textbox(label="Transcript", lines=4, elem_id="transcript", buttons=["copy"])
        notes = gr.Markdown(elem_id="notes")
        rows = gr.Dataframe(
            headers=COLUMNS,
            column_widths=["12%", "12%", "76%"],
            interactive=False,
            wrap=True,
            label="Segments (click to listen)",
            elem_id="segments",
        )
        start = gr.Number(visible=False)
        running = go.click(answer, recording, [text, rows, notes], api_name="transcribe")
        stop.click(None, cancels=[running])
        rows.select(pick, None, start, show_progress="hidden").then(None, start, None, js=SEEK)
        if examples:
            gr.Examples([[str(path)] for path in examples], recording, label="Examples")
    return page


def follow_recording(transcriber: "Transcriber", path: str | None) -> Iterator[Answer]:
    """Say how far a transcription has come, and then what came out; closed before, it ends with the current batch."""
    updates: queue.Queue[Answer | BaseException] = queue.Queue()
    stopped = threading.Event()

    def on_progress(progress: Any) -> None:
        if stopped.is_set():
            raise _StoppedError
        updates.put(("", [], f"{progress.done_s:.0f} s of audio done"))

    def work() -> None:
        try:
            updates.put(describe_recording(transcriber, path, on_progress))
            updates.put(_StoppedError())
        except BaseException as error:  # carried over to the thread that can raise it
            updates.put(error)

    threading.Thread(target=work, name="tinyaudio-page", daemon=True).start()
    try:
        while not isinstance(update := updates.get(), BaseException):
            yield update
        if not isinstance(update, _StoppedError):
            raise update
    finally:
        stopped.set()


def describe_recording(
    transcriber: "Transcriber", path: str | None, on_progress: Callable[[Any], None] | None = None
) -> Answer:
    """Transcribe one recording for the page."""
    if not path:
        return "", [], "Record something, or drop a file on the box above."
    (transcript,) = transcriber.stream([path], on_progress=on_progress)
    rows = [[round(s.start, 2), round(s.end, 2), s.text] for s in transcript.segments]
    if transcript.error is not None:
        return transcript.text, rows, f"**This recording could not be read.** {_reason(transcript.error, path)}"
    notes = [f"- **{code}**: {_explain(code)}" for code in dict.fromkeys(transcript.warnings)]
    return transcript.text, rows, "\n".join([f"{transcript.duration_s:.1f} s of audio", *notes])


def _explain(code: str) -> str:
    base = code.removesuffix(RETRIED)
    return (
        CODES[base] if base == code else f"{CODES[base].split(';')[0]}; a second decoding was clean and is what you see"
    )


def _reason(error: str, path: str) -> str:
    """Name the file as its owner does, without the server's folders."""
    return error.replace(repr(path), repr(Path(path).name)).replace(path, Path(path).name)
