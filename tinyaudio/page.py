"""A page to try a model on: microphone and upload, transcript, segments to click, warnings in plain words.

Needs the optional extra `demo` (gradio), imported only when a page is built. `pipelines/space` lays the same page out
as a Hugging Face Space.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyaudio.errors import MissingModelError
from tinyaudio.guard import CODES, RETRIED

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


def build_page(transcriber: "Transcriber", examples: list[Path] | None = None) -> Any:
    """Lay the page out.

    Args:
        transcriber: what it asks.
        examples: recordings to offer.

    Returns:
        A gradio Blocks, ready for `launch`.

    Raises:
        MissingModelError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise MissingModelError("the page needs gradio; pip install 'tinyaudio[demo]'") from error

    def answer(path: str | None) -> tuple[str, list[list[Any]], str]:
        return describe_recording(transcriber, path)

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
            headers=COLUMNS, interactive=False, wrap=True, label="Segments (click to listen)", elem_id="segments"
        )
        start = gr.Number(visible=False)
        running = go.click(answer, recording, [text, rows, notes], api_name="transcribe")
        stop.click(None, cancels=[running])
        rows.select(pick, None, start, show_progress="hidden").then(None, start, None, js=SEEK)
        if examples:
            gr.Examples([[str(path)] for path in examples], recording, label="Examples")
    return page


def describe_recording(transcriber: "Transcriber", path: str | None) -> tuple[str, list[list[Any]], str]:
    """Transcribe one recording for the page.

    Returns:
        The text, one row (start, end, text) per segment, and what else there is to say, in Markdown.
    """
    if not path:
        return "", [], "Record something, or drop a file on the box above."
    (transcript,) = transcriber.stream([path])
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
