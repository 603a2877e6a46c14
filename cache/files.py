"""Files that are whole or absent: written beside their place, flushed to the disk, then linked in.

Invariants: a file under its final name is complete and on the disk, and `place` never replaces one. A temporary file
carries its owner in its name, so that a janitor can tell the living from the dead. Knows nothing of features.
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

from cache.errors import DiskFullError
from cache.owners import Owner

IOV_MAX = 1024  # buffers per system call, POSIX's usual limit
BATCH_BYTES = 1 << 20  # bytes per system call: still in the processor's cache from computing their checksum
WRITEBACK_BYTES = 8 << 20  # written before the disk is set to work on them

Buffers = Iterable[bytes | memoryview]
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
# What disks and file systems answer where the bytes themselves are lost, as opposed to being out of reach for now.
_LOST = {getattr(errno, name, errno.EIO) for name in ("EIO", "EBADMSG", "EUCLEAN", "ENODATA", "EREMOTEIO", "EILSEQ")}
_TEMPORARY = re.compile(r"^\.(?P<name>.+)~(?P<owner>[^~]+)\.tmp$")


# ---------------------------------------------------------------------------------------------------- how it writes


def canonical_json(value: Any) -> bytes:
    """Give the one spelling of a JSON value: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def write_buffers(fd: int, buffers: Buffers) -> None:
    """Write buffers in order, about a megabyte at a time; they may be made while they are written."""
    batch: list[memoryview] = []
    written = begun = 0  # bytes; of those the disk has been set to work on
    for buffer in buffers:
        batch.append(memoryview(buffer))
        if len(batch) == IOV_MAX or sum(map(len, batch)) >= BATCH_BYTES:
            written += sum(map(len, batch))
            _write_all(fd, batch)
            batch = []
        if written - begun >= WRITEBACK_BYTES:
            _start_writeback(fd, begun, written - begun)
            begun = written
    _write_all(fd, batch)


def _start_writeback(fd: int, offset: int, size: int) -> None:
    # Sets the disk to work on the range without waiting for it, so that little is left for fsync to do: 5 ms of 107 for
    # 256 MiB. What has reached the disk may also leave the page cache, as nobody reads a shard just written.
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # advice: a file system may not take it
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def _write_all(fd: int, views: list[memoryview]) -> None:
    views = [view for view in views if len(view)]
    while views:
        written = os.writev(fd, views)
        while written:
            if written < len(views[0]):
                views[0] = views[0][written:]
                break
            written -= len(views.pop(0))


def temporary_of(path: Path, owner: Owner) -> Path:
    """Name the neighbour that a file is written to before it is put in place."""
    return path.with_name(f".{path.name}~{owner}.tmp")


def write_temporary(path: Path, buffers: Buffers, owner: Owner) -> Path:
    """Write a neighbour of `path` and flush it to the disk.

    Returns:
        The neighbour.

    Raises:
        DiskFullError: no space, quota or file size left; the neighbour is removed.
    """
    temporary = temporary_of(path, owner)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_buffers(fd, buffers)
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise DiskFullError(path) from error
        raise
    return temporary


def link_into_place(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its final name and remove the temporary one.

    Raises:
        FileExistsError: the final name is taken; nothing is replaced.
        DiskFullError: the directory cannot grow.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise DiskFullError(path) from error
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        temporary.rename(path)  # a file system without hard links: the shard lock keeps others out
        return
    finally:
        temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def place(path: Path, buffers: Buffers, owner: Owner | None = None) -> None:
    """Write a whole new file durably under its final name.

    Raises:
        FileExistsError: the name is taken; nothing is replaced.
        DiskFullError: nothing is left behind.
    """
    link_into_place(write_temporary(path, buffers, owner or Owner.me()), path)
    sync_directory(path.parent)


def remove(path: Path) -> None:
    """Remove a file, durably; absent is fine."""
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        sync_directory(path.parent)


# ---------------------------------------------------------------------------------------------------- side by side


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[int]:
    """Hold a kernel lock on a file while names are being put in place: milliseconds.

    Dies with its process. Where the file system knows no locks, which is said once, claims and `link` still keep
    writers apart.

    Yields:
        The descriptor of the file.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            _warn_of_missing_locks(path.parent, error.strerror)
        yield fd
    finally:
        os.close(fd)


@cache
def _warn_of_missing_locks(directory: Path, reason: str) -> None:
    warnings.warn(
        f"the file system of {str(directory)!r} gives no locks ({reason}); writers are kept apart by claims alone. "
        "Mount it with locks (NFS: without nolock) if several machines write.",
        stacklevel=4,
    )


def is_lost(error: OSError) -> bool:
    """Say whether an error means that the bytes are gone (a bad sector), and not that they are out of reach for now."""
    return error.errno in _LOST


def silence_s(path: Path, now: float) -> float:
    """Give the seconds since a file was last touched; 0 if it is gone."""
    try:
        return max(0.0, now - path.stat().st_mtime)
    except FileNotFoundError:
        return 0.0


def clock_of(directory: Path) -> float:
    """Read the clock of the file system itself, so that leases survive machines whose clocks disagree."""
    probe = temporary_of(directory / "clock", Owner.me())
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:  # read-only or full: the local clock has to do
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def temporaries(directory: Path) -> Iterator[tuple[Path, Owner | None]]:
    """List the temporary files of a directory with their owners."""
    for path in sorted(directory.glob(".*~*.tmp")):
        if found := _TEMPORARY.match(path.name):
            yield path, Owner.parse(found["owner"])
