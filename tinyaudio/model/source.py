"""Sources: a path, bytes or file object, opened so that both decoders can read it forwards and backwards.

A pipe or socket is copied to a temporary file first. Travels with the checkpoint.
"""

import contextlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from typing import Any, BinaryIO, cast

from .errors import AudioError

SPOOL_BYTES = 1 << 26  # of an input that cannot be rewound are kept in memory; a longer one goes to a temporary file

AudioSource = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO


def describe(source: object) -> str:
    """Name an input in an error message."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes of audio"
    if isinstance(getattr(source, "name", None), str):
        return repr(source.name)  # type: ignore[attr-defined]
    return f"{type(source).__name__} input"


def open_source(source: AudioSource) -> contextlib.AbstractContextManager[BinaryIO]:
    """Open an input for reading from its start. A file object of the caller's stays open.

    Raises:
        AudioError: not a file, or one that cannot be opened.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source)
    name = describe(source)
    if not isinstance(source, (str, os.PathLike)):
        if not hasattr(source, "read"):
            raise AudioError(f"expected a path, bytes, a binary file object or a numpy array, found {name}")
        return contextlib.nullcontext(source) if _can_rewind(source) else _spool(source)
    try:
        # Not blocking: opening a named pipe without a writer would wait for ever.
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise AudioError(f"{name} does not exist. Check the path") from error
    except (OSError, ValueError) as error:
        raise AudioError(f"{name} cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    kind = os.fstat(handle).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
        os.close(handle)
        found = "directory" if stat.S_ISDIR(kind) else "device or socket"
        raise AudioError(f"{name} is a {found}; expected an audio file")
    os.set_blocking(handle, True)
    stream = os.fdopen(handle, "rb")
    if stat.S_ISREG(kind):
        return stream
    with stream:
        return _spool(stream)


def _can_rewind(stream: Any) -> bool:
    """Check whether a file object is a file, at its start, in binary mode, so that it needs no copy."""
    try:
        return bool(stream.seekable() and stream.tell() == 0 and stream.read(0) == b"")
    except (AttributeError, OSError, ValueError):
        return False


def _spool(stream: Any) -> BinaryIO:
    copy = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 (handed over to the caller)
    try:
        shutil.copyfileobj(stream, copy, 1 << 20)
    except BaseException as error:
        copy.close()
        if not isinstance(error, TypeError):
            raise
        raise AudioError(f"expected a file opened in binary mode, found text in {describe(stream)}") from error
    copy.seek(0)
    return cast(BinaryIO, copy)


class Part:
    """A part of a stream, as a file of its own for a decoder.

    libsndfile calls the methods from C, where an exception is printed to stderr with its traceback and lost. So none is
    raised: a seek to before the beginning, as damaged files ask for, does nothing; a read error ends the file, and
    `raise_error` raises it.

    Args:
        begin, end: of the part, bytes.
        patches: bytes that replace those of the stream, by their place in the part: corrected sizes of a header.
    """

    def __init__(self, stream: BinaryIO, begin: int, end: int, patches: Mapping[int, bytes]) -> None:
        self._read, self._seek = stream.read, stream.seek
        self._begin, self._size, self._patches = begin, end - begin, patches
        self._position = 0
        self._stands_at = -1  # where the stream itself stands in the part, since nothing else moves it between reads
        self._error: OSError | None = None

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        position = self._position
        remaining = self._size - position
        if remaining <= 0:
            return b""
        try:
            if self._stands_at != position:
                self._seek(self._begin + position)
            data = self._read(size if 0 <= size < remaining else remaining)
        except OSError as error:
            self._error, self._stands_at = error, -1
            return b""
        self._position = self._stands_at = position + len(data)
        if not self._patches:
            return data
        for place, patch in self._patches.items():
            offset = place - position
            if -len(patch) < offset < len(data):
                known = bytearray(data)
                for i, value in enumerate(patch):
                    if 0 <= offset + i < len(data):
                        known[offset + i] = value
                data = bytes(known)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset
        if whence == os.SEEK_CUR:
            position += self._position
        elif whence == os.SEEK_END:
            position += self._size
        if position >= 0:
            self._position = position
        return position if position >= 0 else self._position

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error
