"""What can be worked out from a store alone, worked out once: token ids, mean and deviation.

    <store>/derived/<name>-<key>.npz

The key digests all that the arrays depend on, so a store that has grown, or another tokenizer, finds nothing and works
it out anew. One process does the work while others wait for its lock (ranks, or cells of an ablation, on machines that
share the disk's locks). What is absent or damaged is worked out again; a store that cannot be written to costs a line
and the work. Deleting the folder is always safe.
"""

import contextlib
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache import FeatureStore
from cache.commits import root_digest
from cache.files import canonical_json, exclusive, place, remove

Arrays = dict[str, NDArray[Any]]
Say = Callable[[str], None]


def remembered(
    store: FeatureStore, name: str, depends_on: Mapping[str, Any], work_out: Callable[[], Arrays], say: Say
) -> Arrays:
    """Return arrays that belong to a store: as kept beside it, else worked out and kept.

    Args:
        name: what they are, for the file's name and for messages.
        depends_on: JSON values that decide them, beside the store's content.
        say: receives a line when there is work to do, or when its result cannot be kept.
    """
    path = store.path / "derived" / f"{name}-{_key(store, depends_on)}.npz"
    if (found := _read(path)) is not None:
        return found
    with contextlib.ExitStack() as held:
        try:
            path.parent.mkdir(exist_ok=True)
            held.enter_context(exclusive(path.with_suffix(".lock")))
        except OSError as error:
            reason = f"cannot be kept there ({error.strerror}); every start works them out"
            say(f"warning: the {name} of {store.path} {reason}")
            return work_out()
        if (found := _read(path)) is not None:  # another process did it while we waited
            return found
        state = "are damaged" if path.exists() else "are not there yet"
        say(f"working out the {name} of {store.path}, which {state}; kept in {path.parent.name}/{path.name}")
        found = work_out()
        _keep(path, found, say)
        return found


def content_digest(store: FeatureStore) -> str:
    """Digest what a store holds at the moment: its root digest once sealed, else the same over the commits so far."""
    if store.is_sealed:
        return str(json.loads(store.layout.sealed.read_bytes())["root"])
    return root_digest(store.commit(shard) for shard in store.committed_shards())


def _key(store: FeatureStore, depends_on: Mapping[str, Any]) -> str:
    whole = {"content": content_digest(store), **depends_on}
    return hashlib.sha256(canonical_json(whole)).hexdigest()[:24]


def _read(path: Path) -> Arrays | None:
    """Read a file back; None if it is not there or not whole (every array in it carries a CRC)."""
    try:
        with np.load(path) as kept:
            return {name: kept[name] for name in kept.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def _keep(path: Path, arrays: Arrays, say: Say) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]  # it takes them for its flag
    try:
        remove(path)  # a damaged one
        with contextlib.suppress(FileExistsError):  # a disk without locks: another process has kept the same
            place(path, [content.getbuffer()])
    except OSError as error:
        say(f"warning: {path} cannot be kept ({error}); the next start works it out again")
