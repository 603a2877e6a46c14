"""The roof over transcription: `tinyaudio transcribe`, `doctor` and `demo`.

stdout carries transcripts and nothing else; stderr carries progress, warnings and failures, one line each, and a bar
only where it is a terminal. Exit codes: 0 all done (silence is success), 1 some input failed (the others are done),
2 usage, 130 interrupted.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tinyaudio.inputs import FoundInput, find_inputs, plan_outputs, write_atomically
from tinyaudio.subtitles import WRITERS, Layout, plain

if TYPE_CHECKING:
    from tinyaudio.transcript import Transcript

BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended
ANY_SPELLING = {"token_normalize_func": lambda name: name.replace("_", "-")}  # --output_dir is --output-dir


def add_to(app: typer.Typer) -> None:
    """Register this module's commands."""
    app.command("transcribe", context_settings=ANY_SPELLING)(transcribe)
    app.command("doctor")(doctor)
    app.command("demo", context_settings=ANY_SPELLING)(demo)


@dataclass
class Outcome:
    """What happened so far."""

    num_done: int = 0
    num_skipped: int = 0
    failures: list[str] = field(default_factory=list)
    warnings: int = 0


def transcribe(
    paths: Annotated[list[str], typer.Argument(metavar="PATH|DIR|GLOB|-...", help="Recordings; - is stdin.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id; default $TINYAUDIO_MODEL, else runs/latest.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option("--format", "--output-format", "-f", help="Files to write: txt,srt,vtt,tsv,json or all."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", "-o", help="Where to write files; default beside each input.")
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Look into folders of folders.")] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave inputs alone whose files are all there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per input.")] = False,
    num_beams: Annotated[
        int | None,
        typer.Option("--num-beams", "--beam-size", min=1, help="Beams; 1 is greedy; default the model's (4)."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of one segment; default the model's (200).")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Of beam search: above 0 favours longer texts; default the model's (1.0).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Segments decoded at once; changes the speed only.")] = 8,
    chunk_length: Annotated[
        float | None,
        typer.Option("--chunk-length", help="Longest piece decoded at once, seconds; default the model's."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Decoder precision; default as trained.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a model on the hub.")] = None,
    encoder_id: Annotated[str | None, typer.Option(help="Another copy of the encoder: folder or hub id.")] = None,
    decoder_id: Annotated[str | None, typer.Option(help="Another copy of the decoder: folder or hub id.")] = None,
    max_line_width: Annotated[int, typer.Option(min=1, help="Subtitles: characters a line.")] = 42,
    max_line_count: Annotated[int, typer.Option(min=1, help="Subtitles: lines.")] = 2,
    language: Annotated[str, typer.Option(help="Only en: this model hears English.")] = "en",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar, warnings or summary; failures only.")] = False,
) -> None:
    """Turn recordings into text.

    One input: text on stdout. Several: a .txt beside each, and "name: text" lines on stdout. With --format or
    --output-dir: files only.
    """
    kinds = _kinds(formats, output_dir, paths)
    if language not in ("en", "english", "English"):
        _usage(f"--language {language!r}: this model hears English only (en)")
    if chunk_length is not None and chunk_length <= 0:
        _usage(f"--chunk-length {chunk_length:g}: expected seconds above 0")
    layout = Layout(max_line_width=max_line_width, max_line_count=max_line_count)
    inputs = find_inputs(paths, recursive)
    if any(item.path is None for item in inputs) and sys.stdin.isatty():
        _usage("- is a terminal; expected audio through a pipe: tinyaudio transcribe - < speech.wav")
    is_one = len(inputs) == 1 and formats is None and output_dir is None
    if is_one:
        kinds = ()
    outputs = _outputs(inputs, output_dir, kinds)
    outcome, todo = Outcome(), []
    for item, files in zip(inputs, outputs, strict=True):
        if skip_existing and files and all(path.exists() for path in files.values()):
            outcome.num_skipped += 1
        else:
            todo.append((item, files))
    options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
    options |= {"batch_size": batch_size, "window_s": chunk_length}
    parts = {"encoder_id": encoder_id, "decoder_id": decoder_id}
    load = {"model": model, "device": device, "dtype": dtype, "revision": revision}
    load |= {key: value for key, value in parts.items() if value is not None}
    show = _shower(as_json, is_one, formats is None and output_dir is None)
    try:
        if todo:
            _run(todo, load, options, layout, show, outcome, quiet)
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say(f"interrupted; {outcome.num_done} of {len(inputs)} inputs are done; --skip-existing goes on from here")
        os._exit(130) if _has_stuck_reader() else sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)
    _close(outcome, len(inputs), quiet)


def _run(
    todo: Sequence[tuple[FoundInput, dict[str, Path]]],
    load: dict[str, Any],
    options: dict[str, Any],
    layout: Layout,
    show: Any,
    outcome: Outcome,
    quiet: bool,
) -> None:
    """Transcribe what is to be done, in order; failures are collected."""
    from tinyaudio.transcribe import Transcriber
    from tinyaudio.transcript import Transcript

    tries = [item for item, _ in todo if item.problem is None]
    transcripts: Iterator[Transcript] = iter(())
    with _Bar(tries, quiet) as bar:
        if tries:
            transcriber = Transcriber.load(**load)
            sources = (sys.stdin.buffer if item.path is None else item.path for item in tries)
            transcripts = transcriber.stream(sources, on_progress=bar.update, **options)
        for item, files in todo:
            if item.problem is None:
                transcript = replace(next(transcripts), source=item.name)
            else:
                transcript = Transcript(source=item.name, text="", error=item.problem)
            bar.clear()
            _finish(item, transcript, files, layout, show, outcome, quiet)


def _finish(
    item: FoundInput,
    transcript: "Transcript",
    files: dict[str, Path],
    layout: Layout,
    show: Any,
    outcome: Outcome,
    quiet: bool,
) -> None:
    """Print and write one transcript, and say what there is to say about it."""
    error = transcript.error
    if error is None:
        try:
            for kind, path in files.items():
                write_atomically(path, WRITERS[kind](transcript, layout))
        except OSError as problem:
            error = f"{str(problem.filename or files)!r} cannot be written: {problem.strerror}"
            transcript = replace(transcript, error=error)
    show(transcript)
    if error is not None:
        outcome.failures.append(item.name)
        _say(error)
        return
    outcome.num_done += 1
    outcome.warnings += len(transcript.warnings)
    if not quiet:
        for line in _warning_lines(transcript):
            _say(f"{item.name}: {line}")


def _warning_lines(transcript: "Transcript") -> Iterator[str]:
    from tinyaudio.guard import CODES, RETRIED

    def explain(code: str) -> str:
        base = code.removesuffix(RETRIED)
        return f"{base} at first; decoded again, and that stands" if code != base else f"{code}: {CODES[code]}"

    for segment in transcript.segments:
        for code in segment.warnings:
            yield f"{segment.start:.1f} to {segment.end:.1f} s: {explain(code)}"
    if not transcript.segments:
        yield from map(explain, transcript.warnings)


def _shower(as_json: bool, is_one: bool, prints_text: bool) -> Any:
    """Choose what a finished transcript puts on stdout."""

    def show(transcript: "Transcript") -> None:
        if as_json:
            print(json.dumps(transcript.to_dict()), flush=True)
        elif prints_text and transcript.error is None:
            text = plain(transcript.text)
            print(text if is_one else f"{_printable(transcript.source)}: {text}", flush=True)

    return show


def _kinds(formats: str | None, output_dir: Path | None, paths: Sequence[str]) -> tuple[str, ...]:
    wanted = ["txt"] if formats is None else [kind.strip().lower() for kind in formats.split(",") if kind.strip()]
    if wanted == ["all"]:
        wanted = list(WRITERS)
    unknown = [kind for kind in wanted if kind not in WRITERS]
    if unknown or not wanted:
        _usage(f"--format {formats!r}: expected some of {','.join(WRITERS)}, or all")
    return tuple(dict.fromkeys(wanted))


def _outputs(inputs: Sequence[FoundInput], output_dir: Path | None, kinds: tuple[str, ...]) -> list[dict[str, Path]]:
    from tinyaudio.inputs import OutputClashError

    if not kinds:
        return [{} for _ in inputs]
    try:
        return plan_outputs(inputs, output_dir, kinds)
    except OutputClashError as error:
        _usage(str(error))


def _close(outcome: Outcome, num_inputs: int, quiet: bool) -> NoReturn:
    """Say how it went, where there is more than one thing to say, and leave with the code that tells the truth."""
    if num_inputs > 1 or outcome.num_skipped:
        counts = [f"{outcome.num_done} transcribed", f"{len(outcome.failures)} failed"]
        counts += [f"{outcome.num_skipped} skipped (already there)"] if outcome.num_skipped else []
        counts += [f"{outcome.warnings} warnings"] if outcome.warnings else []
        if outcome.failures or not quiet:
            _say(f"{num_inputs} inputs: {', '.join(counts)}")
        if outcome.failures:
            _say(f"failed: {', '.join(repr(name) for name in outcome.failures)}")
    sys.exit(1 if outcome.failures else 0)


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
    from tinyaudio.page import build_page
    from tinyaudio.transcribe import Transcriber

    page = build_page(Transcriber.load(model, device=device), _examples())
    page.launch(server_name=host, server_port=port or None, share=False, quiet=True, prevent_thread_lock=True)
    print(f"the page is at {page.local_url}; Ctrl-C ends it", file=sys.stderr, flush=True)
    page.block_thread()


def _examples() -> list[Path]:
    """Find the recordings that the Space offers; none where only the package tinyaudio is installed."""
    from importlib.util import find_spec

    spec = find_spec("pipelines")
    return sorted(Path(spec.origin).with_name("space").glob("examples/*.opus")) if spec and spec.origin else []


class _Bar:
    """Progress in seconds of audio, where stderr is a terminal."""

    def __init__(self, inputs: Sequence[FoundInput], quiet: bool) -> None:
        self._bar: Any = None
        if quiet or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        from tinyaudio.audio import probe_duration_s

        lengths = [None if item.path is None else probe_duration_s(item.path) for item in inputs]
        known = [length for length in lengths if length is not None]
        total = round(sum(known), 1) if len(known) == len(lengths) else None
        self._bar = tqdm(total=total, unit="s", desc="audio", dynamic_ncols=True, leave=False)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, progress: Any) -> None:
        if self._bar is not None:
            self._bar.update(round(progress.done_s - self._bar.n, 1))

    def clear(self) -> None:
        if self._bar is not None:
            self._bar.clear()


def _has_stuck_reader() -> bool:
    """Tell whether a thread still waits for input (a pipe that stays open would keep the process alive)."""
    import threading

    return any(thread.name == "tinyaudio-reader" for thread in threading.enumerate())


def _printable(text: str) -> str:
    """Put text on one line in the characters a terminal can show; file names may hold anything."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return shown.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8")


def _say(message: str) -> None:
    print(f"tinyaudio: {_printable(message)}", file=sys.stderr, flush=True)


def _usage(message: str) -> NoReturn:
    _say(message)
    sys.exit(2)
