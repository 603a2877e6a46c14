"""Writing files whole or not at all."""

import contextlib
import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, also after a crash, finds the old content or the new, never a part.

    Raises:
        OSError: naming the file, which a full disk's own error does not.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
