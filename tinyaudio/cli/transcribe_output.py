"""What `tinyaudio transcribe` writes and says: files, stdout, the bar, warnings, how it went. Part of the roof."""

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tinyaudio.cli.inputs import (
    STDIN,
    FoundInput,
    OutputClashError,
    OutputError,
    exists,
    plan_outputs,
    write_text,
)
from tinyaudio.subtitles import WRITERS, Layout, plain

if TYPE_CHECKING:
    from tinyaudio.model.transcript import Transcript


def _printable(text: str) -> str:
    """Put text on one line; file names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def say(message: str) -> None:
    """Print one line to stderr, under the command's name."""
    print(f"tinyaudio: {_printable(message)}", file=sys.stderr, flush=True)


def usage(message: str) -> NoReturn:
    """Leave with 2, saying what was found, what was expected and what to do."""
    say(message)
    sys.exit(2)


@dataclass
class Outcome:
    """What happened so far."""

    num_done: int = 0
    num_skipped: int = 0
    failures: list[str] = field(default_factory=list)
    warnings: int = 0


@dataclass(frozen=True)
class Route:
    """Where transcripts go: formats of files and their folder, and what stands on stdout."""

    kinds: tuple[str, ...]
    output_dir: Path | None
    on_stdout: str  # a format, "lines" with names, or "" for nothing
    is_implicit: bool = False  # nobody asked for the files


def route_of(
    inputs: Sequence[FoundInput], kinds: tuple[str, ...], output_dir: Path | None, *, as_json: bool, explicit: bool
) -> Route:
    """Decide where transcripts go; `explicit` where files were asked for."""
    if output_dir == Path(STDIN):
        if len(kinds) != 1 or len(inputs) != 1 or as_json:
            usage("--output-dir - is stdout, and takes one format of one input; name a folder")
        return Route((), None, kinds[0])
    if explicit:
        return Route(kinds, output_dir, "json" if as_json else "")
    if as_json:
        return Route((), None, "json")
    if len(inputs) == 1 and inputs[0].is_named:
        return Route((), None, "txt")
    return Route(kinds, None, "lines", is_implicit=True)


def kinds_of(formats: Sequence[str] | None) -> tuple[str, ...]:
    """The formats of --format, each once: given one by one, with commas, or as all; txt if none."""
    wanted = [kind.strip().lower() for given in formats or ["txt"] for kind in given.split(",") if kind.strip()]
    if "all" in wanted:
        wanted = [*WRITERS, *(kind for kind in wanted if kind != "all")]
    unknown = [kind for kind in wanted if kind not in WRITERS]
    if unknown or not wanted:
        usage(f"--format {','.join(formats or [])!r}: expected some of {','.join(WRITERS)}, or all")
    return tuple(dict.fromkeys(wanted))


def outputs_of(inputs: Sequence[FoundInput], route: Route, keep_extension: bool) -> list[dict[str, Path]]:
    """Name the files, and make their folder before anything takes time."""
    if not route.kinds:
        return [{} for _ in inputs]
    try:
        outputs = plan_outputs(inputs, route.output_dir, route.kinds, keep_extension)
        if route.output_dir is not None:
            route.output_dir.mkdir(parents=True, exist_ok=True)
    except OutputClashError as error:
        usage(str(error))
    except OSError as error:
        say(f"--output-dir {str(route.output_dir)!r} cannot be written: {error.strerror or error}")
        sys.exit(1)
    return outputs


def spare(paths: Iterator[Path]) -> None:
    """Refuse to write over what may be somebody's own transcript."""
    there = next(filter(exists, paths), None)
    if there is not None:
        usage(
            f"{str(there)!r} is there already; --skip-existing leaves such inputs alone, --output-dir DIR puts files "
            "elsewhere, --overwrite writes over them"
        )


@dataclass(frozen=True)
class Desk:
    """Where finished transcripts are written, printed and counted."""

    route: Route
    layout: Layout
    outcome: Outcome
    quiet: bool

    def finish(self, item: FoundInput, transcript: "Transcript", files: dict[str, Path]) -> None:
        """Write and print one transcript, and say what there is to say about it."""
        if transcript.error is None:
            transcript = replace(transcript, error=self._write(transcript, files))
        self._print(transcript)
        if transcript.error is not None:
            self.outcome.failures.append(item.name)
            say(transcript.error)
            return
        self.outcome.num_done += 1
        self.outcome.warnings += len(transcript.warnings)
        for line in _warning_lines(transcript) if not self.quiet else ():
            say(f"{item.name}: {line}")

    def _write(self, transcript: "Transcript", files: dict[str, Path]) -> str | None:
        """Write files; the reason, on one line, if that fails."""
        for kind, path in files.items():
            try:
                write_text(path, WRITERS[kind](transcript, self.layout))
            except OSError as problem:
                return f"{str(path)!r} cannot be written: {problem.strerror or problem}"
        return None

    def _print(self, transcript: "Transcript") -> None:
        on_stdout = self.route.on_stdout
        if not on_stdout or (transcript.error is not None and on_stdout != "json"):
            return
        if on_stdout == "lines":
            text = f"{_printable(transcript.source)}: {plain(transcript.text)}\n"
        else:
            text = WRITERS[on_stdout](transcript, self.layout)
        try:
            print(text, end="", flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            let_go_of_stdout()
            raise OutputError(f"stdout cannot be written: {error.strerror or error}") from error


def _warning_lines(transcript: "Transcript") -> Iterator[str]:
    from tinyaudio.model.guard import CODES, RETRIED

    def explain(code: str) -> str:
        base = code.removesuffix(RETRIED)
        return f"{base} at first; decoded again, and that stands" if code != base else f"{code}: {CODES[code]}"

    for segment in transcript.segments:
        for code in segment.warnings:
            yield f"{segment.start:.1f} to {segment.end:.1f} s: {explain(code)}"
    num_of_segments = sum(len(segment.warnings) for segment in transcript.segments)
    yield from map(explain, transcript.warnings[num_of_segments:])


class Bar:
    """Progress in seconds of audio, where stderr is a terminal."""

    def __init__(self, inputs: Sequence[FoundInput], quiet: bool) -> None:
        self._bar: Any = None
        if quiet or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        from tinyaudio.model.audio import probe_duration_s

        lengths = [None if item.path is None else probe_duration_s(item.path) for item in inputs]
        known = [length for length in lengths if length is not None]
        total = round(sum(known), 1) if len(known) == len(lengths) else None
        self._bar = tqdm(total=total, unit="s", desc="audio", dynamic_ncols=True, leave=False)

    def __enter__(self) -> "Bar":
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


def let_go_of_stdout() -> None:
    """Keep what is buffered from being written, and failing, once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def close(outcome: Outcome, num_inputs: int, quiet: bool) -> NoReturn:
    """Say how it went, where there is more than one thing to say, and leave with the code that tells the truth."""
    if num_inputs > 1 or outcome.num_skipped:
        counts = [f"{outcome.num_done} transcribed", f"{len(outcome.failures)} failed"]
        counts += [f"{outcome.num_skipped} skipped (already there)"] if outcome.num_skipped else []
        counts += [f"{outcome.warnings} warnings"] if outcome.warnings else []
        if outcome.failures or not quiet:
            say(f"{num_inputs} inputs: {', '.join(counts)}")
        if outcome.failures:
            say(f"failed: {', '.join(repr(name) for name in outcome.failures)}")
    sys.exit(1 if outcome.failures else 0)
