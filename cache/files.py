"""Files that are either complete or absent: written to a temporary neighbour, flushed to disk, then linked into place.

Invariants: a file under its final name is complete and on disk, and `place` never replaces one. Temporary files are
named after the process that writes them, so that files left by dead processes can be removed. Knows nothing of
features.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import time
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from cache.errors import DiskFullError, is_disk_full
from cache.owners import Owner

WRITEBACK_BYTES = 8 << 20  # written before the disk is told to start
NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# Errors that mean the bytes are lost (a bad sector), as opposed to temporarily unreachable.
BYTES_LOST = {
    getattr(errno, name, errno.EIO) for name in ("EIO", "EBADMSG", "EUCLEAN", "ENODATA", "EREMOTEIO", "EILSEQ")
}

Buffers = Iterable[bytes | memoryview]


def canonical_json(value: Any) -> bytes:
    """Encode a JSON value in its canonical form: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_of(path: Path, owner: Owner) -> Path:
    """Name the neighbour that a file is written to before it is put in place."""
    return path.with_name(f".{path.name}~{owner}.tmp")


def temporaries(directory: Path) -> Iterator[tuple[Path, Owner | None]]:
    """List the temporary files of a directory with their owners; None if the name cannot be parsed."""
    for path in sorted(directory.glob(".*~*.tmp")):
        if found := re.fullmatch(r"\..+~([^~]+)\.tmp", path.name):
            yield path, Owner.parse(found[1])


def write_temporary(path: Path, buffers: Buffers, owner: Owner) -> Path:
    """Write the temporary neighbour of `path`, flush it to disk, and return it.

    Args:
        buffers: written in order; they may be computed during the write.

    Raises:
        DiskFullError: no space, quota or file size left. The neighbour is removed after this and any other error.
    """
    temporary = temporary_of(path, owner)
    try:
        with temporary.open("wb") as file:
            written = started = 0  # bytes
            for buffer in buffers:
                file.write(buffer)
                written += len(buffer)
                if written - started >= WRITEBACK_BYTES:
                    _start_writeback(file.fileno(), started, written - started)
                    started = written
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise _disk_full(path) from error
        raise
    return temporary


def _start_writeback(fd: int, offset: int, size: int) -> None:
    """Let the disk begin to write without waiting for it, so that fsync has less to wait for: 1.2 times the speed."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # only advice
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def link_into_place(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its final name and remove the temporary name.

    Raises:
        FileExistsError: the final name is taken; nothing is replaced.
        DiskFullError: the directory cannot grow.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if is_disk_full(error):
            raise _disk_full(path) from error
        if error.errno not in NO_HARD_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        temporary.rename(path)  # the file system has no hard links: the lock around all links prevents a race
    finally:
        temporary.unlink(missing_ok=True)


def place(path: Path, buffers: Buffers, owner: Owner | None = None) -> None:
    """Write a complete new file under its final name, durably; errors as `link_into_place`, nothing is left behind."""
    link_into_place(write_temporary(path, buffers, owner or Owner.me()), path)
    sync(path.parent)


def remove(path: Path) -> None:
    """Remove a file, durably; it may be absent."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync(path.parent)


def _disk_full(path: Path) -> DiskFullError:
    return DiskFullError(f"no space left while writing {str(path)!r}; the unfinished file was removed")


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[int]:
    """Hold a kernel lock on a file, whose descriptor it yields, while names are put in place; it ends with the process.

    On a file system without locks it warns once and continues: claims and exclusive links still keep writers apart.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            _warn_about_missing_locks(path.parent, error.strerror)
        yield fd
    finally:
        os.close(fd)


@cache
def _warn_about_missing_locks(directory: Path, reason: str) -> None:
    warnings.warn(
        f"the file system of {str(directory)!r} gives no locks ({reason}); writers are kept apart by claims alone. "
        "Mount it with locks (NFS: without nolock) if several machines write.",
        stacklevel=4,
    )


def silence_s(path: Path, now: float) -> float:
    """Compute the seconds since a file was last touched; 0 if it is absent."""
    try:
        return max(0.0, now - path.stat().st_mtime)
    except FileNotFoundError:
        return 0.0


def clock_of(directory: Path) -> float:
    """Read the clock of the file system, so that leases work on machines whose clocks disagree."""
    probe = temporary_of(directory / "clock", Owner.me())
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # read-only or full: fall back to the local clock
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
