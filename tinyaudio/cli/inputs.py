"""Which recordings are meant by the words of a command line, and where their transcripts go.

Folders and patterns become files, in sorted order, each once; symlink loops end; every output gets a name of its own.
"""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinyaudio.model.errors import TinyAudioError

STDIN = "-"
# What is looked for in folders; files named one by one are tried whatever they are called.
AUDIO_EXTENSIONS = (
    "aac",
    "aif",
    "aiff",
    "amr",
    "au",
    "caf",
    "flac",
    "m4a",
    "m4b",
    "mka",
    "mp2",
    "mp3",
    "oga",
    "ogg",
    "opus",
)
EXTENSIONS = frozenset({*AUDIO_EXTENSIONS, "wav", "wave", "wma", "mkv", "mov", "mp4", "webm"})


class OutputError(TinyAudioError, ValueError):
    """Results that cannot be put where they should go."""


class OutputClashError(OutputError):
    """Two inputs whose transcripts would have one name."""


@dataclass(frozen=True, kw_only=True)
class FoundInput:
    """One recording to transcribe.

    Args:
        path: the file; None for stdin.
        below: its folder relative to the folder named on the command line; "" for files named themselves.
        is_named: it stands on the command line itself, so there is one of it whatever a folder or pattern holds.
        problem: why it cannot be looked at: one line; None for a file to try.
    """

    path: Path | None
    below: Path = Path()
    is_named: bool = False
    problem: str | None = None

    @property
    def name(self) -> str:
        return "stdin" if self.path is None else str(self.path)


def find_inputs(words: Sequence[str], recursive: bool) -> list[FoundInput]:
    """Turn paths, folders, patterns and "-" into recordings, each file once."""
    found: list[FoundInput] = []
    seen: set[str] = set()
    for word in words:
        for item in _expand(word, recursive):
            key = item.name if item.path is None or item.problem else os.path.realpath(item.path)
            if key not in seen:
                seen.add(key)
                found.append(item)
    return found


def _expand(word: str, recursive: bool) -> Iterator[FoundInput]:
    path = Path(word)
    if word == STDIN:
        yield FoundInput(path=None, is_named=True)
    elif _is_folder(path):
        yield from _list_folder(path, recursive)
    elif glob.has_magic(word) and not os.path.lexists(word):
        matches = sorted(glob.glob(word, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        folders = [Path(match) for match in matches if _is_folder(Path(match))]
        files = [Path(match) for match in matches if Path(match) not in folders]
        yield from (FoundInput(path=file) for file in files)
        for folder in folders if not files else []:  # as if the shell had named them
            yield from _list_folder(folder, recursive)
        if not matches:
            yield FoundInput(path=path, problem=f"{word!r} matches no file; check the pattern")
    else:
        yield FoundInput(path=path, is_named=True)


def exists(path: Path) -> bool:
    """Tell whether there is such a file; one that cannot be there or be looked at is not."""
    with contextlib.suppress(OSError, ValueError):
        return path.exists()
    return False


def _is_folder(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return path.is_dir()
    return False


def _list_folder(folder: Path, recursive: bool) -> Iterator[FoundInput]:
    any_file = False
    for item in _walk(folder, Path(), recursive, set()):
        any_file = True
        yield item
    if not any_file:
        hint = "" if recursive else ", or add --recursive"
        problem = f"{str(folder)!r} holds no audio files; expected names such as *.wav or *.mp3{hint}"
        yield FoundInput(path=folder, problem=problem)


def _walk(folder: Path, below: Path, recursive: bool, seen: set[str]) -> Iterator[FoundInput]:
    real = os.path.realpath(folder)
    if real in seen:  # a symlink back to where we have been
        return
    seen.add(real)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield FoundInput(path=folder, problem=f"{str(folder)!r} cannot be listed: {error.strerror}")
        return
    for entry in entries:
        if _is_folder(entry):
            if recursive:
                yield from _walk(entry, below / entry.name, recursive, seen)
        elif entry.suffix.lower().removeprefix(".") in EXTENSIONS:
            yield FoundInput(path=entry, below=below)


def plan_outputs(
    inputs: Sequence[FoundInput], output_dir: Path | None, formats: Sequence[str], keep_extension: bool = False
) -> list[dict[str, Path]]:
    """Name the output of every input in every format: beside it, or in `output_dir` as its folders lie.

    A name depends on its own input only, so that --skip-existing finds it again in any company.

    Args:
        keep_extension: talk.wav becomes talk.wav.txt and not talk.txt.

    Raises:
        OutputClashError: two inputs that would share a name.
    """
    bases = [_place(item, output_dir, keep_extension) for item in inputs]
    first: dict[Path, FoundInput] = {}
    for item, base in zip(inputs, bases, strict=True):
        if item.problem is not None:
            continue
        other = first.setdefault(base, item)
        if other is not item:
            name = str(base.with_name(f"{base.name}.{formats[0]}"))
            raise OutputClashError(
                f"{other.name!r} and {item.name!r} would both be written to {name!r}; {_way_out(other, item)}"
            )
    return [{kind: base.with_name(f"{base.name}.{kind}") for kind in formats} for base in bases]


def _way_out(one: FoundInput, other: FoundInput) -> str:
    if one.path and other.path and one.path.name == other.path.name:
        return "transcribe them one by one, each with an --output-dir of its own"
    return "--keep-extension tells them apart, as in talk.wav.txt and talk.mp3.txt"


def _place(item: FoundInput, output_dir: Path | None, keep_extension: bool) -> Path:
    name = "stdin" if item.path is None else item.path.name if keep_extension else item.path.stem
    if output_dir is not None:
        return output_dir / item.below / name
    return Path(name) if item.path is None else item.path.with_name(name)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary neighbour, then rename.

    Raises:
        OSError: the folder cannot be made or written to, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tinyaudio-", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
