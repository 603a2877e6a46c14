"""Atomic writes: a reader finds the old file or the new one, never a part, also after a crash."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; what the caller creates there replaces `path` at the end.

    Raises:
        OSError: with the name of `path`, which the error of a full disk lacks. The temporary file is removed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # also unique among machines
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # usually gone: it is `path` now
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically (UTF-8, "\\n"), flushed to the disk; errors as `replacing`."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What torch.save and numpy.save say, without a number, when a file ends before what they wrote
# (torch/csrc/jit/serialization and torch/csrc/generic/serialization.cpp; numpy/_core/src/multiarray/convert.c).
_CANNOT_WRITE = re.compile(
    r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed writing|file write failed|basic_ios::clear: iostream error"
    r"|write\(\): fd \d+ failed with (No space|File too large|Disk quota)|\d+ requested and \d+ written"
)


def full_disk(error: BaseException | None) -> str | None:
    """Return why a write failed, if the disk, the quota or the file size limit is exhausted; None for another error.

    safetensors, torch and numpy raise errors of their own, which have no number.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return error.strerror or "no space left on device"
    number = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    if number and int(number[1]) in _FULL:
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError | OSError) and _CANNOT_WRITE.search(str(error)):
        return "a file ended before what was written to it, as on a full disk"
    return None
