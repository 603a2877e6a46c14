"""Which recordings the arguments of `transcribe` name, and which files their transcripts are written to.

Folders and patterns become files, sorted and without duplicates. Every output has a name of its own.
"""

import contextlib
import glob
import os
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from tinyaudio.model.errors import TinyAudioError

STDIN = "-"
# Files with these extensions are found in folders. A file named on the command line is tried whatever its name.
EXTENSIONS = frozenset(
    # sound
    "aa3 aac ac3 adts adx aif aifc aiff alac amr ape aptx au awb bwf caf dff dsf dts dtshd eac3 ec3 flac gsm latm "
    "ircam loas m2a m4a m4b m4p m4r mka mlp mp1 mp2 mp3 mpa mpc mpga oga ogg oma opus qcp qoa ra rf64 sf snd spx sph "
    "shn tak tta voc w64 wav wave weba wma wv "
    # films
    "3g2 3gp 3gpp amv asf avi divx dv f4a f4v flv gxf h264 ifo ismv m2t m2ts m2v m4v mj2 mkv mod mov mp4 mpe mpeg mpg "
    "mpv mts mxf nsv nut ogm ogv ogx qt rm rmvb tod ts vob webm wmv wtv xvid".split()
)
# In folders, these are no recordings, and are passed over without a note: our own outputs, texts, pictures, metadata.
COMPANIONS = frozenset(
    "bmp cfg css csv cue db doc docx gif html ini jpeg jpg js json jsonl lab lock log lrc m3u m3u8 md nfo parquet part "
    "pdf pls png ps1 py rtf sh srt sub svg tiff toml tsv txt vtt webp xls xlsx xml yaml yml zip".split()
)
APPLE_DOUBLE = "._"  # begins the names of the files in which macOS keeps attributes on disks of other systems


class OutputError(TinyAudioError, ValueError):
    """Results that cannot be written where they should go."""


class OutputClashError(OutputError):
    """Two inputs whose transcripts would have the same name."""


@dataclass(frozen=True, kw_only=True)
class FoundInput:
    """One recording to transcribe."""

    path: Path | None  # None for stdin. Of an address, its last part, after which the transcript is named
    below: Path = Path()  # its folder, relative to the folder given on the command line; "" for other files
    is_named: bool = False  # the command line names this file itself, not a folder or pattern that contains it
    problem: str | None = None  # one line that says why the input cannot be used; None for a file to try
    url: str | None = None  # the address of a recording on the web
    note: str | None = None  # one line about what was passed over in the folder that this is the first recording of

    @property
    def name(self) -> str:
        return self.url or ("stdin" if self.path is None else str(self.path))


def find_inputs(arguments: Sequence[str], recursive: bool) -> list[FoundInput]:
    """Turn paths, folders, patterns and "-" into recordings, each file once."""
    found: dict[str, FoundInput] = {}
    for argument in arguments:
        for item in _expand(argument, recursive):
            key = item.name if item.path is None or item.problem or item.url else os.path.realpath(item.path)
            found.setdefault(key, item)
    return list(found.values())


def _expand(argument: str, recursive: bool) -> Iterator[FoundInput]:
    path = Path(argument)
    if argument == STDIN:
        yield FoundInput(path=None, is_named=True)
    elif argument.lower().startswith(("http://", "https://")):
        yield FoundInput(path=Path(_name_of_address(argument)), is_named=True, url=argument)
    elif _is_folder(path):
        yield from _list_folder(path, recursive)
    elif glob.has_magic(argument) and not os.path.lexists(argument):
        matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]  # noqa: PTH207 (absolute too)
        files = [match for match in matches if not _is_folder(match)]
        yield from (FoundInput(path=file) for file in files)
        if not files:  # only folders match: list them, as if the shell had expanded the pattern
            for folder in matches:
                yield from _list_folder(folder, recursive)
        if not matches:
            yield FoundInput(path=path, problem=f"{argument!r} matches no file; check the pattern")
    else:
        yield FoundInput(path=path, is_named=True)


def _name_of_address(url: str) -> str:
    """Return the last part of an address, or its host."""
    with contextlib.suppress(ValueError):  # it is no address: fetching it gives the reason
        parts = urllib.parse.urlsplit(url)
        return PurePosixPath(urllib.parse.unquote(parts.path)).name.replace("\0", "") or parts.hostname or "address"
    return "address"


def exists(path: Path) -> bool:
    """Check whether a file exists; a path that is impossible or not accessible does not."""
    with contextlib.suppress(OSError, ValueError):
        return path.exists()
    return False


def _is_folder(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return path.is_dir()
    return False


def _list_folder(folder: Path, recursive: bool) -> Iterator[FoundInput]:
    passed_over: list[Path] = []
    found = list(_walk(folder, Path(), recursive, set(), passed_over))
    kinds = sorted({path.suffix.lower() or "no extension" for path in passed_over})
    note = None
    if passed_over:
        some = ", ".join([*kinds[:5], *(["..."] if len(kinds) > 5 else [])])
        which = f"{len(passed_over)} file{'s' * (len(passed_over) > 1)} of unknown kind ({some})"
        note = f"{str(folder)!r}: passed over {which}. Name a file on the command line to try it"
    if not found:
        hint = "" if recursive else ", or add --recursive"
        problem = f"{str(folder)!r} contains no audio files; expected names such as *.wav or *.mp3{hint}"
        found = [FoundInput(path=folder, problem=problem)]
    yield replace(found[0], note=note)
    yield from found[1:]


def _walk(
    folder: Path, below: Path, recursive: bool, visited: set[str], passed_over: list[Path]
) -> Iterator[FoundInput]:
    real = os.path.realpath(folder)
    if real in visited:  # a symlink back to a folder that has been listed
        return
    visited.add(real)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        yield FoundInput(path=folder, problem=f"{str(folder)!r} cannot be listed: {error.strerror}")
        return
    for entry in entries:
        extension = entry.suffix.lower().removeprefix(".")
        if _is_folder(entry):
            if recursive:
                yield from _walk(entry, below / entry.name, recursive, visited, passed_over)
        elif entry.name.startswith(APPLE_DOUBLE):
            continue
        elif extension in EXTENSIONS:
            yield FoundInput(path=entry, below=below)
        elif extension not in COMPANIONS and not entry.name.startswith("."):
            passed_over.append(entry)


def plan_outputs(
    inputs: Sequence[FoundInput], output_dir: Path | None, formats: Sequence[str], keep_extension: bool = False
) -> list[dict[str, Path]]:
    """Name the output of every input in every format: beside the input, or under `output_dir` in the same folders.

    A name depends on its own input only, so that --skip-existing finds it whatever else is transcribed.

    Args:
        keep_extension: talk.wav becomes talk.wav.txt instead of talk.txt.

    Raises:
        OutputClashError: two inputs would have the same output.
    """
    outputs: list[dict[str, Path]] = []
    first: dict[Path, FoundInput] = {}
    for item in inputs:
        name = "stdin" if item.path is None else item.path.name if keep_extension else item.path.stem
        if output_dir is not None:
            base = output_dir / item.below / name
        else:
            base = Path(name) if item.path is None else item.path.with_name(name)
        outputs.append({kind: base.with_name(f"{base.name}.{kind}") for kind in formats})
        other = first.setdefault(base, item) if item.problem is None else item
        if other is not item:
            if other.path and item.path and other.path.name == item.path.name:
                remedy = "Transcribe them one by one, each with its own --output-dir."
            else:
                remedy = "Add --keep-extension, which writes talk.wav.txt and talk.mp3.txt."
            clash = str(outputs[-1][formats[0]])
            raise OutputClashError(f"{other.name!r} and {item.name!r} would both be written to {clash!r}. {remedy}")
    return outputs


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a temporary file beside it, then a rename.

    Raises:
        OSError: the folder cannot be created or written to, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tinyaudio-{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
