"""The `transcribe` command.

stdout carries transcripts only. stderr carries warnings and failures, one line each, and a progress bar on a terminal.
Exit codes: 0 all inputs done (silence counts as done), 1 some input failed (the others are done), 2 usage,
130 interrupted.
"""

import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tinyaudio.cli.console import ProgressBar, printable, usage, warn
from tinyaudio.cli.inputs import (
    STDIN,
    FoundInput,
    OutputClashError,
    OutputError,
    exists,
    find_inputs,
    plan_outputs,
    write_text,
)
from tinyaudio.cli.options import DeviceOption, DraftOption, ModelOption, NBestOption, check_decoding
from tinyaudio.subtitles import WRITERS, Layout, plain

if TYPE_CHECKING:
    from tinyaudio.model.transcript import Transcript

BROKEN_PIPE = 141  # exit code that a shell reports for a process ended by SIGPIPE


def transcribe(
    paths: Annotated[list[str], typer.Argument(metavar="PATH|DIR|GLOB|URL|-...", help="Recordings; - is stdin.")],
    model: ModelOption = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", "--output-format", "-f", metavar="FORMATS", help="Files to write: txt,srt,vtt,tsv,json or all."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Folder for files; - is stdout.  [default: beside each input]"),
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Search subfolders too.")] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Skip inputs whose output files already exist.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Allow the default .txt outputs to replace existing files.")
    ] = False,
    keep_extension: Annotated[
        bool, typer.Option("--keep-extension", help="Name files talk.wav.txt instead of talk.txt.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per input.")] = False,
    num_beams: Annotated[
        int | None,
        typer.Option("--num-beams", "--beam-size", min=1, help="Beams; 1 is greedy.  [default: the model's (4)]"),
    ] = None,
    draft: DraftOption = "auto",
    ctc_nbest: NBestOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum tokens per segment.  [default: the model's (200)]")
    ] = None,
    length_penalty: Annotated[
        float | None,
        typer.Option(help="Length penalty of beam search; above 0 favours longer texts.  [default: the model's (1.0)]"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Segments decoded at once; changes the speed, not the text.  [default: 16 to 64 on a GPU, as its "
            "memory allows; else 8]",
        ),
    ] = None,
    chunk_length: Annotated[
        float | None,
        typer.Option("--chunk-length", help="Maximum length of a segment, in seconds.  [default: the model's]"),
    ] = None,
    track: Annotated[
        int | None,
        typer.Option(min=1, help="Audio track of a file with several, from 1.  [default: the file's default track]"),
    ] = None,
    device: DeviceOption = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.  [default: one per core]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision of the decoder: float32, bfloat16, float16.  [default: as trained]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a hub model.")] = None,
    encoder_id: Annotated[
        str | None, typer.Option(help="Another copy of the encoder: folder, hub id, or id@revision.")
    ] = None,
    decoder_id: Annotated[
        str | None, typer.Option(help="Another copy of the decoder: folder, hub id, or id@revision.")
    ] = None,
    word_timestamps: Annotated[
        bool, typer.Option("--word-timestamps", help="Time every word, for json and subtitles.")
    ] = False,
    highlight_words: Annotated[
        bool, typer.Option("--highlight-words", help="Underline each word of srt and vtt as it is spoken.")
    ] = False,
    max_line_width: Annotated[int, typer.Option(min=1, help="Maximum characters in a line of subtitles.")] = 42,
    max_line_count: Annotated[int, typer.Option(min=1, help="Maximum lines in a subtitle.")] = 2,
    language: Annotated[str, typer.Option(help="Must be en: the model transcribes English only.")] = "en",
    task: Annotated[str, typer.Option(help="Must be transcribe: the model does not translate.")] = "transcribe",
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print failures only: no progress bar, warnings or summary.")
    ] = False,
    fp16: Annotated[str | None, typer.Option(hidden=True)] = None,
    verbose: Annotated[str | None, typer.Option(hidden=True)] = None,
    temperature: Annotated[str, typer.Option(hidden=True)] = "0",
) -> None:
    """Turn recordings into text.

    One recording: prints its text, one line per segment. Several, or a folder: prints "name: text" lines and writes a
    .txt beside each recording; existing files are replaced only with --overwrite. With --format or --output-dir: writes
    those files only, and replaces them. With --json: prints objects, and writes no other files unless asked.

    Whisper's options have the same names here; --fp16, --verbose, --temperature 0 and --word_timestamps True are
    accepted too.
    """
    _check_whisper_options(language, task, temperature)
    check_decoding(draft, num_beams, ctc_nbest, length_penalty)
    if highlight_words and not word_timestamps:
        usage("--highlight-words: expected --word-timestamps with it; add that")
    if chunk_length is not None and not 1 <= chunk_length < math.inf:
        usage(f"--chunk-length {chunk_length:g}: expected at least 1 second")
    load = {"model": model, "device": device, "dtype": _dtype(dtype, fp16), "revision": revision}
    load |= {**_part("encoder", encoder_id), **_part("decoder", decoder_id)}
    decoding: dict[str, Any] = {"num_beams": num_beams, "draft": draft, "ctc_nbest": ctc_nbest}
    decoding |= {"max_new_tokens": max_new_tokens, "length_penalty": length_penalty, "batch_size": batch_size}
    decoding |= {"window_s": chunk_length, "word_timestamps": word_timestamps, "track": track}

    inputs = find_inputs(paths, recursive)
    _check_streams(inputs)
    sink = Sink(
        **_destination(inputs, formats, output_dir, as_json),
        layout=Layout(max_line_width=max_line_width, max_line_count=max_line_count, highlight_words=highlight_words),
        quiet=quiet or _is_false(verbose),
    )
    decoding["confidence"] = "json" in (*sink.kinds, sink.on_stdout)  # the one format that shows it
    for item in inputs:
        if item.note and not sink.quiet:
            warn(item.note)
    todo = []
    for item, files in zip(inputs, sink.plan(inputs, keep_extension), strict=True):
        if skip_existing and files and all(map(exists, files.values())):
            sink.num_skipped += 1
            continue
        existing = next(filter(exists, files.values()), None)
        if sink.is_implicit and existing is not None and not skip_existing and not overwrite:
            usage(
                f"{str(existing)!r} already exists. Add --skip-existing to keep it, --overwrite to replace it, or "
                "--output-dir DIR to write elsewhere."
            )
        todo.append((item, files))
    try:
        if todo:
            _run(todo, load, decoding, threads, sink)
        sys.stdout.flush()
    except KeyboardInterrupt:
        warn(
            f"interrupted; {sink.num_done} of {len(inputs)} inputs are done. Run the same command with --skip-existing "
            "to resume."
        )
        if any(thread.name == "tinyaudio-reader" for thread in threading.enumerate()):
            os._exit(130)  # it still waits for input: a pipe that stays open would keep the process alive
        sys.exit(130)
    except BrokenPipeError:
        _discard_stdout()
        sys.exit(BROKEN_PIPE)
    sink.finish(len(inputs))


def _run(
    todo: Sequence[tuple[FoundInput, dict[str, Path]]],
    load: dict[str, Any],
    decoding: dict[str, Any],
    threads: int | None,
    sink: "Sink",
) -> None:
    """Transcribe inputs in order; failures are collected."""
    from tinyaudio.model.transcript import Transcript

    usable = [item for item, _ in todo if item.problem is None]
    transcripts: Iterator[Transcript] = iter(())
    with ProgressBar("audio", unit="s", is_shown=not sink.quiet) as bar:
        if usable:
            import torch

            from tinyaudio.model.audio import probe_duration_s
            from tinyaudio.transcribe import Transcriber, default_model

            if threads is not None:
                torch.set_num_threads(threads)
            if load["model"] is None:
                load["model"] = default_model(" with --model")
            transcriber = Transcriber.load(**load)
            total_s: float | None = None
            if bar.is_drawn:
                lengths = [None if item.path is None or item.url else probe_duration_s(item.path) for item in usable]
                known = [length for length in lengths if length is not None]
                total_s = round(sum(known), 1) if len(known) == len(lengths) else None
            sources = (sys.stdin.buffer if item.path is None else item.url or item.path for item in usable)
            transcripts = transcriber.stream(
                sources, on_progress=lambda progress: bar.update(round(progress.done_s, 1), total_s), **decoding
            )
        for item, files in todo:
            if item.problem is None:
                transcript = replace(next(transcripts), source=item.name)
            else:
                transcript = Transcript(source=item.name, text="", error=item.problem)
            bar.clear()
            sink.add(item, transcript, files)


@dataclass(kw_only=True)
class Sink:
    """Where transcripts go, and how many of the inputs are done."""

    kinds: tuple[str, ...]
    output_dir: Path | None = None  # folder for files; None: beside each input
    on_stdout: str  # a format, "lines" for lines of "name: text", or "" for nothing
    is_implicit: bool = False  # the command line asks for no files; they are written because there are several inputs
    layout: Layout
    quiet: bool
    num_done: int = 0
    num_skipped: int = 0
    num_warnings: int = 0
    failures: list[str] = field(default_factory=list)

    def plan(self, inputs: Sequence[FoundInput], keep_extension: bool) -> list[dict[str, Path]]:
        """Name the files of every input by format, and create their folder before the model is loaded."""
        if not self.kinds:
            return [{} for _ in inputs]
        try:
            outputs = plan_outputs(inputs, self.output_dir, self.kinds, keep_extension)
            if self.output_dir is not None:
                self.output_dir.mkdir(parents=True, exist_ok=True)
        except OutputClashError as error:
            usage(str(error))
        except OSError as error:
            warn(f"--output-dir {str(self.output_dir)!r} cannot be written: {error.strerror or error}")
            sys.exit(1)
        return outputs

    def add(self, item: FoundInput, transcript: "Transcript", files: dict[str, Path]) -> None:
        """Write and print one transcript, with its warnings.

        Raises:
            BrokenPipeError: the process that read stdout is gone. OutputError: stdout cannot be written.
        """
        is_unwritten = False
        if transcript.error is None:
            for kind, path in files.items():
                try:
                    write_text(path, WRITERS[kind](transcript, self.layout))
                except OSError as error:
                    reason = f"{str(path)!r} cannot be written: {error.strerror or error}"
                    transcript = replace(transcript, error=reason)
                    is_unwritten = True
                    break
        # The text that could not be written is printed instead: decoding it again may take hours.
        if self.on_stdout == "json" or (self.on_stdout and transcript.error is None) or is_unwritten:
            if self.on_stdout == "lines" or not self.on_stdout:
                text = f"{printable(transcript.source)}: {plain(transcript.text)}\n"
            else:
                text = WRITERS[self.on_stdout](transcript, self.layout)
            try:
                print(text, end="", flush=True)
            except BrokenPipeError:
                raise
            except OSError as error:
                _discard_stdout()
                raise OutputError(f"stdout cannot be written: {error.strerror or error}") from error
        if transcript.error is not None:
            self.failures.append(item.name)
            warn(transcript.error)
            return
        self.num_done += 1
        self.num_warnings += len(transcript.warnings)
        if not self.quiet:
            for line in _describe_warnings(transcript):
                warn(f"{item.name}: {line}")

    def finish(self, num_inputs: int) -> NoReturn:
        """Print a summary of several inputs, and exit with 1 if any failed."""
        if num_inputs > 1 or self.num_skipped:
            counts = [f"{self.num_done} transcribed", f"{len(self.failures)} failed"]
            counts += [f"{self.num_skipped} skipped (output exists)"] if self.num_skipped else []
            counts += [f"{self.num_warnings} warnings"] if self.num_warnings else []
            if self.failures or not self.quiet:
                warn(f"{num_inputs} inputs: {', '.join(counts)}")
            if self.failures:
                warn(f"failed: {', '.join(repr(name) for name in self.failures)}")
        sys.exit(1 if self.failures else 0)


def _destination(
    inputs: Sequence[FoundInput], formats: Sequence[str] | None, output_dir: Path | None, as_json: bool
) -> dict[str, Any]:
    """Decide where transcripts go: the first fields of `Sink`."""
    kinds = [kind.strip().lower() for given in formats or ["txt"] for kind in given.split(",") if kind.strip()]
    if "all" in kinds:
        kinds = [*WRITERS, *(kind for kind in kinds if kind != "all")]
    if not kinds or any(kind not in WRITERS for kind in kinds):
        usage(f"--format {','.join(formats or [])!r}: expected some of {','.join(WRITERS)}, or all")
    kinds = list(dict.fromkeys(kinds))
    if output_dir == Path(STDIN):
        if len(kinds) != 1 or len(inputs) != 1 or as_json:
            usage("--output-dir - is stdout and takes one format of one input; name a folder instead")
        return {"kinds": (), "on_stdout": kinds[0]}
    if formats or output_dir is not None:
        return {"kinds": tuple(kinds), "output_dir": output_dir, "on_stdout": "json" if as_json else ""}
    if as_json:
        return {"kinds": (), "on_stdout": "json"}
    if len(inputs) == 1 and inputs[0].is_named:
        return {"kinds": (), "on_stdout": "txt"}
    return {"kinds": tuple(kinds), "on_stdout": "lines", "is_implicit": True}


def _describe_warnings(transcript: "Transcript") -> Iterator[str]:
    from tinyaudio.model.guard import CODES, RETRIED

    def explain(code: str) -> str:
        if code.endswith(RETRIED):
            return f"{code.removesuffix(RETRIED)} in the first decoding; the second was clean and is used"
        return f"{code}: {CODES[code]}"

    for segment in transcript.segments:
        for code in segment.warnings:
            yield f"{segment.start:.1f} to {segment.end:.1f} s: {explain(code)}"
    num_of_segments = sum(len(segment.warnings) for segment in transcript.segments)
    yield from map(explain, transcript.warnings[num_of_segments:])


def _discard_stdout() -> None:
    """Redirect stdout to nowhere, so that flushing its buffer at exit does not fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_whisper_options(language: str, task: str, temperature: str) -> None:
    if language.strip().lower() not in ("en", "english"):
        usage(f"--language {language!r}: the model transcribes English only; expected en")
    if task != "transcribe":
        usage(f"--task {task!r}: the model does not translate; expected transcribe")
    if temperature not in ("0", "0.0"):
        usage(f"--temperature {temperature!r}: the model does not sample; expected 0, or omit it")


def _is_false(value: str | None) -> bool:
    """Read the value of a switch as Whisper's command line does: --verbose False."""
    return value is not None and value.strip().lower() in ("false", "no", "0")


def _dtype(dtype: str | None, fp16: str | None) -> str | None:
    if dtype is None:
        return "float32" if _is_false(fp16) else None  # --fp16 True: the default, since training used half precision
    known = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if known.get(dtype, dtype) not in known.values():
        usage(f"--dtype {dtype!r}: expected one of {', '.join(known.values())}")
    return known.get(dtype, dtype)


def _part(part: str, name: str | None) -> dict[str, str]:
    """Split id@revision; the name of an existing folder may contain an @."""
    if name is None:
        return {}
    model_id, _, revision = name.rpartition("@")
    if not model_id or exists(Path(name)):
        return {f"{part}_id": name}
    return {f"{part}_id": model_id, f"{part}_revision": revision}


def _check_streams(inputs: Sequence[FoundInput]) -> None:
    if sys.stdout is None:
        usage("stdout is closed, and results go there; leave it open")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that show ASCII only
    if any(item.path is None for item in inputs):
        if sys.stdin is None:
            usage("- is stdin, which is closed; expected audio through a pipe: tinyaudio transcribe - < speech.wav")
        if sys.stdin.isatty():
            usage("- is a terminal; expected audio through a pipe: tinyaudio transcribe - < speech.wav")
