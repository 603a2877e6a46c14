"""The roof over transcription: `tinyaudio transcribe`.

stdout carries transcripts and nothing else; stderr carries progress, warnings and failures, one line each, and a bar
only where it is a terminal. Exit codes: 0 all done (silence is success), 1 some input failed (the others are done),
2 usage, 130 interrupted.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyaudio.cli.inputs import FoundInput, exists, find_inputs
from tinyaudio.cli.options import ANY_SPELLING
from tinyaudio.cli.transcribe_output import (
    Bar,
    Desk,
    Outcome,
    close,
    kinds_of,
    let_go_of_stdout,
    outputs_of,
    route_of,
    say,
    spare,
    usage,
)
from tinyaudio.subtitles import Layout

if TYPE_CHECKING:
    from tinyaudio.transcribe import Transcriber

BROKEN_PIPE = 141  # what a shell reports for a process that SIGPIPE ended


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("transcribe", context_settings=ANY_SPELLING)(transcribe)


def transcribe(
    paths: Annotated[list[str], typer.Argument(metavar="PATH|DIR|GLOB|-...", help="Recordings; - is stdin.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id; default $TINYAUDIO_MODEL, else runs/latest.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", "--output-format", "-f", help="Files to write: txt,srt,vtt,tsv,json or all."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", "-o", help="Where to write files; default beside each input; - is stdout."),
    ] = None,
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="Look into folders of folders.")] = False,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Leave inputs alone whose files are all there.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write over .txt files that no --format or --output-dir asked for.")
    ] = False,
    keep_extension: Annotated[
        bool, typer.Option("--keep-extension", help="Name files talk.wav.txt instead of talk.txt.")
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
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default one a core.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Decoder precision: float32, bfloat16, float16; default as trained.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a model on the hub.")] = None,
    encoder_id: Annotated[
        str | None, typer.Option(help="Another copy of the encoder: folder or hub id, or id@revision.")
    ] = None,
    decoder_id: Annotated[
        str | None, typer.Option(help="Another copy of the decoder: folder or hub id, or id@revision.")
    ] = None,
    max_line_width: Annotated[int, typer.Option(min=1, help="Subtitles: characters a line.")] = 42,
    max_line_count: Annotated[int, typer.Option(min=1, help="Subtitles: lines.")] = 2,
    language: Annotated[str, typer.Option(help="Only en: this model hears English.")] = "en",
    task: Annotated[str, typer.Option(help="Only transcribe: this model does not translate.")] = "transcribe",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No bar, warnings or summary; failures only.")] = False,
    fp16: Annotated[str | None, typer.Option(hidden=True)] = None,
    verbose: Annotated[str | None, typer.Option(hidden=True)] = None,
    temperature: Annotated[str, typer.Option(hidden=True)] = "0",
    word_timestamps: Annotated[str, typer.Option(hidden=True)] = "False",
) -> None:
    """Turn recordings into text.

    One recording: its text on stdout, a line a segment. Several, or a folder: a .txt beside each, which is never
    written over unless --overwrite says so, and "name: text" lines on stdout. With --format or --output-dir: those
    files only, written anew each time. With --json: objects on stdout, and no files unless asked for.

    Whisper's options have its names; its --fp16, --verbose, --temperature 0 and --word_timestamps False are taken too.
    """
    _refuse_what_whisper_can(language, task, temperature, word_timestamps)
    for name, value in (("--chunk-length", chunk_length), ("--length-penalty", length_penalty)):
        if value is not None and not (math.isfinite(value) and (value > 0 or name == "--length-penalty")):
            usage(f"{name} {value:g}: expected {'a number' if name == '--length-penalty' else 'seconds above 0'}")
    inputs = find_inputs(paths, recursive)
    _check_stdin(inputs)
    route = route_of(
        inputs, kinds_of(formats), output_dir, as_json=as_json, explicit=bool(formats) or output_dir is not None
    )
    outputs = outputs_of(inputs, route, keep_extension)
    if route.is_implicit and not skip_existing and not overwrite:
        spare(path for files in outputs for path in files.values())
    outcome, todo = Outcome(), []
    for item, files in zip(inputs, outputs, strict=True):
        if skip_existing and files and all(map(exists, files.values())):
            outcome.num_skipped += 1
        else:
            todo.append((item, files))
    options = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "length_penalty": length_penalty}
    options |= {"batch_size": batch_size, "window_s": chunk_length}
    load = {"model": model, "device": device, "dtype": _dtype(dtype, fp16), "revision": revision}
    load |= {**_part("encoder", encoder_id), **_part("decoder", decoder_id)}
    quiet = quiet or _is_false(verbose)
    layout = Layout(max_line_width=max_line_width, max_line_count=max_line_count)
    try:
        if todo:
            _run(todo, load, options, threads, Desk(route, layout, outcome, quiet))
        sys.stdout.flush()
    except KeyboardInterrupt:
        say(f"interrupted; {outcome.num_done} of {len(inputs)} inputs are done; --skip-existing goes on from here")
        os._exit(130) if _has_stuck_reader() else sys.exit(130)
    except BrokenPipeError:
        let_go_of_stdout()
        sys.exit(BROKEN_PIPE)
    close(outcome, len(inputs), quiet)


def _run(
    todo: Sequence[tuple[FoundInput, dict[str, Path]]],
    load: dict[str, Any],
    options: dict[str, Any],
    threads: int | None,
    desk: "Desk",
) -> None:
    """Transcribe what is to be done, in order; failures are collected."""
    from tinyaudio.model.transcript import Transcript

    tries = [item for item, _ in todo if item.problem is None]
    transcripts: Iterator[Transcript] = iter(())
    with Bar(tries, desk.quiet) as bar:
        if tries:
            transcriber = _load(load, threads)
            sources = (sys.stdin.buffer if item.path is None else item.path for item in tries)
            transcripts = transcriber.stream(sources, on_progress=bar.update, **options)
        for item, files in todo:
            if item.problem is None:
                transcript = replace(next(transcripts), source=item.name)
            else:
                transcript = Transcript(source=item.name, text="", error=item.problem)
            bar.clear()
            desk.finish(item, transcript, files)


def _load(load: dict[str, Any], threads: int | None) -> "Transcriber":
    import torch

    from tinyaudio.transcribe import Transcriber

    if threads is not None:
        torch.set_num_threads(threads)
    return Transcriber.load(**load)


def _refuse_what_whisper_can(language: str, task: str, temperature: str, word_timestamps: str) -> None:
    if language.strip().lower() not in ("en", "english"):
        usage(f"--language {language!r}: this model hears English only (en)")
    if task != "transcribe":
        usage(f"--task {task!r}: this model writes down what is said, in English (transcribe)")
    if temperature not in ("0", "0.0"):
        usage(f"--temperature {temperature!r}: this model does not sample; expected 0, or leave it out")
    if not _is_false(word_timestamps):
        usage("--word-timestamps: this model has times of segments only; they stand in srt, vtt, tsv and json")


def _is_false(value: str | None) -> bool:
    """Read a switch as Whisper's command line takes it: True or False behind the name."""
    return value is not None and value.strip().lower() in ("false", "no", "0")


def _dtype(dtype: str | None, fp16: str | None) -> str | None:
    if dtype is None:
        return "float32" if _is_false(fp16) else None  # --fp16 True: a GPU's decoder is in half precision as trained
    known = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    if known.get(dtype, dtype) not in known.values():
        usage(f"--dtype {dtype!r}: expected one of {', '.join(known.values())}")
    return known.get(dtype, dtype)


def _part(part: str, name: str | None) -> dict[str, str]:
    """Split id@revision; a folder's name may hold an @."""
    if name is None:
        return {}
    model_id, _, revision = name.rpartition("@")
    if not model_id or exists(Path(name)):
        return {f"{part}_id": name}
    return {f"{part}_id": model_id, f"{part}_revision": revision}


def _check_stdin(inputs: Sequence[FoundInput]) -> None:
    if sys.stdout is None:
        usage("stdout is closed; leave it open, results go there")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a terminal that knows ASCII only
    if not any(item.path is None for item in inputs):
        return
    if sys.stdin is None:
        usage("- is stdin, which is closed; expected audio through a pipe: tinyaudio transcribe - < speech.wav")
    if sys.stdin.isatty():
        usage("- is a terminal; expected audio through a pipe: tinyaudio transcribe - < speech.wav")


def _has_stuck_reader() -> bool:
    """Tell whether a thread still waits for input (a pipe that stays open would keep the process alive)."""
    import threading

    return any(thread.name == "tinyaudio-reader" for thread in threading.enumerate())
