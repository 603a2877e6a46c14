"""A web page to try a model: microphone and upload, transcript, segments and words to click, warnings, downloads.

Requires the optional extra `serve` (gradio), which is imported when a page is built. Recordings go through the same
request queue as those of the API. `pipelines/space` shows the same page as a Hugging Face Space.
"""

import contextlib
import os
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyaudio.model.errors import TinyAudioError
from tinyaudio.model.guard import CODES, RETRIED
from tinyaudio.model.transcript import Segment, Transcript
from tinyaudio.request_queue import NotReadyError, QueueFullError, RequestQueue, Update
from tinyaudio.subtitles import WRITERS, Layout

if TYPE_CHECKING:
    from fastapi import FastAPI

TITLE = "tinyaudio"
COLUMNS = ["start", "end", "text"]
UNSURE = 0.5  # a word of a smaller probability is marked
COLORS = {"unsure": "#f2b705", "unheard": "#e5484d"}
DOWNLOADS = ("srt", "vtt", "txt", "json")
KEPT_S = 3600  # how long gradio keeps an uploaded recording, seconds
WAIT_S = 1.0  # between two looks whether the reader of the page still waits
# Moves the player to the start of a clicked segment, which is in the row's first cell. gr.Audio cannot seek from
# Python, and it plays an <audio> inside a shadow root, next to an empty one in the page.
SEEK = """(start) => {
  const players = (root) => [...root.querySelectorAll('*')].flatMap(
    (e) => e.tagName === 'AUDIO' && e.src ? [e] : e.shadowRoot ? players(e.shadowRoot) : []);
  const [player] = players(document.querySelector('#recording'));
  if (player && start !== null) { player.currentTime = start; player.play(); }
}"""
# Saves a text of the page as a file, by the browser alone: the server writes none.
SAVE = """(files) => {
  if (!files || !files.%(kind)s) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([files.%(kind)s], {type: 'text/plain;charset=utf-8'}));
  link.download = (files.name || 'transcript') + '.%(kind)s';
  document.body.appendChild(link); link.click(); link.remove();
}"""
STYLE = """
.gradio-container { width: 100% !important; max-width: 860px !important; margin: 0 auto !important; }
.gradio-container .main, .gradio-container .contain, .gradio-container .column { min-width: 0 !important; }
#title h1 { margin: 0.2em 0 0; }
#segments { max-width: 100%; min-width: 0; }
#segments td, #segments th { font-family: inherit; }
#files { flex-wrap: wrap; gap: 8px; }
#files button { min-width: 72px; }
@media (max-width: 640px) {
  .gradio-container .main { padding: 8px !important; }
  #segments td, #segments th { font-size: 0.9em; }
}
"""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the page shows.

    Args:
        rows: (start, end, text) of each segment.
        words: each word, and one of `COLORS` if it is doubtful; none if the encoder has no CTC head.
        starts: when each word begins, seconds.
        notes: Markdown: how far it is, then the warnings in words.
        files: the texts to download by format, and the `name` of the recording.
    """

    text: str = ""
    rows: list[list[Any]] = field(default_factory=list)
    words: list[tuple[str, str | None]] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    notes: str = ""
    files: dict[str, str] | None = None


def build_page(requests: RequestQueue, name: str, examples: list[Path] | None = None) -> Any:
    """Build the page.

    Returns:
        A gradio Blocks, ready for `launch` or `mount_page`.

    Raises:
        TinyAudioError: gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ImportError as error:
        message = "the page requires gradio, which is missing. Try: pip install 'tinyaudio[serve]'"
        raise TinyAudioError(message) from error

    def answer(path: str | None) -> Iterator[tuple[Any, ...]]:
        for latest in follow_recording(requests, path):
            words = gr.update(value=latest.words, visible=bool(latest.words))
            yield latest.text, words, latest.starts, latest.rows, latest.notes, latest.files

    def pick(event: gr.SelectData) -> float:
        return float(event.row_value[0])

    def pick_word(starts: list[float], event: gr.SelectData) -> float:
        return starts[event.index]

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT_S // 4, KEPT_S)) as page:
        gr.Markdown(f"# {TITLE}\nEnglish speech to text. Model: `{name}`", elem_id="title")
        recording = gr.Audio(sources=["upload", "microphone"], type="filepath", label="Recording", elem_id="recording")
        recording.async_move_resource_to_block_cache = _uploads_only(
            recording.async_move_resource_to_block_cache, Path(recording.GRADIO_CACHE), examples or []
        )
        with gr.Row():
            go = gr.Button("Transcribe", variant="primary", min_width=120, elem_id="go")
            stop = gr.Button("Stop", min_width=120, elem_id="stop")
        text = gr.Textbox(label="Transcript", lines=4, elem_id="transcript", buttons=["copy"])
        words = gr.HighlightedText(
            label="Words (click to listen)", color_map=COLORS, show_legend=True, visible=False, elem_id="words"
        )
        starts = gr.JSON(visible=False)
        notes = gr.Markdown(elem_id="notes")
        rows = gr.Dataframe(
            headers=COLUMNS,
            column_widths=["20%", "20%", "60%"],
            interactive=False,
            wrap=True,
            label="Segments, in seconds (click to listen)",
            elem_id="segments",
        )
        files = gr.JSON(visible=False)
        with gr.Row(elem_id="files"):
            for kind in DOWNLOADS:
                save = gr.Button(f"Save .{kind}", size="sm", elem_id=f"save-{kind}")
                save.click(None, files, None, js=SAVE % {"kind": kind})
        start = gr.Number(visible=False)
        running = go.click(
            answer,
            recording,
            [text, words, starts, rows, notes, files],
            api_name="transcribe",
            concurrency_limit=requests.max_requests,
        )
        stop.click(None, cancels=[running])
        rows.select(pick, None, start, show_progress="hidden").then(None, start, None, js=SEEK)
        words.select(pick_word, starts, start, show_progress="hidden").then(None, start, None, js=SEEK)
        if examples:
            gr.Examples([[str(path)] for path in examples], recording, label="Examples")
    return page


def mount_page(app: "FastAPI", requests: RequestQueue, name: str, examples: list[Path] | None = None) -> None:
    """Mount the page at `/` of a server; errors as `build_page`."""
    page = build_page(requests, name, examples)
    import gradio as gr

    gr.mount_gradio_app(
        app,
        page,
        path="/",
        css=STYLE,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        pwa=False,
        footer_links=[],
    )


def _uploads_only(move: Any, folder: Path, examples: list[Path]) -> Any:
    """Wrap how gradio takes the file that a request names, so that it is one that was uploaded, or an example.

    By itself gradio 6.31 downloads URLs, and opens any file of the server if the page is mounted (`_check_allowed`
    returns early while `has_launched` is false).
    """

    async def move_uploads_only(path: Any) -> Any:
        place = Path(str(path)).resolve()
        if not place.is_relative_to(folder.resolve()) and place not in {example.resolve() for example in examples}:
            raise ValueError("expected an uploaded recording, found a link or another file")
        return await move(path)

    return move_uploads_only


def follow_recording(requests: RequestQueue, path: str | None) -> Iterator[Answer]:
    """Yield the progress of a transcription, then its result. If closed early, it stops after the current batch."""
    if not path:
        yield Answer(notes="Record something, or drop a file on the box above.")
        return
    try:
        ticket = requests.enter()
    except (QueueFullError, NotReadyError) as error:
        yield Answer(notes=f"**Not now.** {error}.")
        return
    updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
    segments: list[Segment] = []
    latest = Answer(notes="waiting")
    try:
        ticket.submit(path, updates.put, word_timestamps=requests.has_word_times, confidence=True)
        while True:
            with contextlib.suppress(queue.Empty):
                update = updates.get(timeout=WAIT_S)
                if update.failure is not None:
                    raise update.failure
                segments += update.segments
                if update.transcript is not None:
                    yield describe(update.transcript, path)
                    return
                text = " ".join(segment.text for segment in segments if segment.text)
                latest = Answer(text=text, **_shown(segments), notes=f"{update.done_s:.0f} s of audio done")
            yield latest  # also without news: where the page's reader has gone, this is where it ends
    finally:
        ticket.leave()


def _shown(segments: Sequence[Segment]) -> dict[str, Any]:
    """Return `rows`, `words` and `starts` of an answer."""
    words = [word for segment in segments for word in segment.words or ()]
    is_unsure = [word.probability is not None and word.probability < UNSURE for word in words]
    marks = ["unheard" if word.is_unheard else "unsure" if is_unsure[i] else None for i, word in enumerate(words)]
    return {
        "rows": [[round(segment.start, 2), round(segment.end, 2), segment.text] for segment in segments],
        "words": [(word.word, mark) for word, mark in zip(words, marks, strict=True)],
        "starts": [round(word.start, 2) for word in words],
    }


def describe(transcript: Transcript, path: str) -> Answer:
    """Describe a finished transcription for the page."""
    shown = {"text": transcript.text, **_shown(transcript.segments)}
    name = Path(path).name  # as the user knows it, without the server's folders
    if transcript.error is not None:
        reason = transcript.error.replace(repr(path), repr(name)).replace(path, name)
        notes = f"**This recording could not be read.** {reason}"
        return Answer(**shown, notes=notes)
    lines = [f"{transcript.duration_s:.1f} s of audio"]
    for code in dict.fromkeys(transcript.warnings):
        fault = CODES[code.removesuffix(RETRIED)]
        is_retried = code.endswith(RETRIED)
        explanation = f"{fault.split(';')[0]}; a second decoding was clean and is shown" if is_retried else fault
        lines.append(f"- **{code}**: {explanation}")
    transcript = replace(transcript, source=name, model=transcript.model and Path(transcript.model).name)
    files = {kind: WRITERS[kind](transcript, Layout()) for kind in DOWNLOADS}
    files["name"] = Path(name).stem
    return Answer(**shown, notes="\n".join(lines), files=files)
