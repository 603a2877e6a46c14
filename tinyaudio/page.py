"""A web page to try a model: microphone and upload, transcript, segments to click, explained warnings.

Requires the optional extra `serve` (gradio), which is imported when a page is built. `pipelines/space` shows the same
page as a Hugging Face Space.
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
# Moves the player to the start of a clicked segment, which is in the row's first cell. gr.Audio cannot seek from
# Python, and it plays an <audio> inside a shadow root, next to an empty one in the page.
SEEK = """(start) => {
  const players = (root) => [...root.querySelectorAll('*')].flatMap(
    (e) => e.tagName === 'AUDIO' && e.src ? [e] : e.shadowRoot ? players(e.shadowRoot) : []);
  const [player] = players(document.querySelector('#recording'));
  if (player && start !== null) { player.currentTime = start; player.play(); }
}"""


Answer = tuple[str, list[list[Any]], str]  # the text, one row (start, end, text) per segment, notes in Markdown


class _StoppedError(Exception):
    """The caller does not wait for the answer any more."""


def import_gradio() -> None:
    """Import gradio.

    Raises:
        TinyAudioError: it is not installed.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise TinyAudioError(
            "the page requires gradio, which is missing. Try: pip install 'tinyaudio[serve]'"
        ) from error


def open_page(page: Any, host: str, port: int) -> str:
    """Serve a page in background threads and return its address; port 0 is any free port.

    Raises:
        TinyAudioError: the port is taken.
    """
    try:
        page.launch(server_name=host, server_port=port or None, share=False, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise TinyAudioError(
            f"port {port} of {host} is in use, or the host is not this machine. Choose another --port, 0 for any"
        ) from error
    return str(page.local_url)


def build_page(transcriber: "Transcriber", examples: list[Path] | None = None) -> Any:
    """Build the page.

    Args:
        transcriber: transcribes the recordings.
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
    """Yield the progress of a transcription, then its result. If closed early, it stops after the current batch."""
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
        except BaseException as error:  # raised in the caller's thread
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
        name = Path(path).name  # as the user knows it, without the server's folders
        reason = transcript.error.replace(repr(path), repr(name)).replace(path, name)
        return transcript.text, rows, f"**This recording could not be read.** {reason}"
    notes = [f"{transcript.duration_s:.1f} s of audio"]
    for code in dict.fromkeys(transcript.warnings):
        fault = CODES[code.removesuffix(RETRIED)]
        is_retried = code.endswith(RETRIED)
        explanation = f"{fault.split(';')[0]}; a second decoding was clean and is shown" if is_retried else fault
        notes.append(f"- **{code}**: {explanation}")
    return transcript.text, rows, "\n".join(notes)
