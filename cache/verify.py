"""Find every way in which a store can be damaged, name it, and undo exactly the damaged shards.

The quick check reads records, sizes, small files and two chunks of each shard: it finds what is missing, cut, swapped,
stale or foreign. The deep check reads every byte. What it finds is noted in `damaged/`, so that the next `store_repair`
knows without reading everything again. Good shards are never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cache.commits import ArrayFile, Commit, committed_shards, root_digest
from cache.durable import exclusive, place, remove
from cache.errors import CorruptShardError
from cache.layout import Header
from cache.plan import plan_digest, read_plan
from cache.shards import expected_index, read_chunks, read_index
from cache.skeleton import encode_rejected, metadata_faults
from cache.store import FeatureStore

Kind = Literal[
    "missing",
    "size",
    "bit_flip",
    "swapped",
    "shard_index",
    "commit_record",
    "foreign_fingerprint",
    "stale_plan",
    "index",
    "quarantine",
    "metadata",
    "calibration",
    "seal",
]
SMALL_BYTES = 4 << 30  # a store up to this size is repaired by reading all of it: seconds


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with a store."""

    kind: Kind
    shard: int | None  # None: not one shard's
    path: str  # inside the store
    message: str  # what was found, what was expected, what to type

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def store_verify(
    store: FeatureStore, *, deep: bool = False, progress: Callable[[int], None] | None = None
) -> list[Fault]:
    """List what is wrong with a store; an unfinished one is not wrong.

    Args:
        deep: read every byte. What is found is noted, for the next `store_repair`.
        progress: called after each shard with the bytes checked.

    Returns:
        The faults, those of the whole store first, then by shard. Empty: the store is sound.
    """
    shards = committed_shards(store.layout)
    faults = [*_store_faults(store), *_seal_faults(store, shards)]
    for found in _check_shards(store, shards, deep, progress):
        faults += found
    if deep:
        _note(store, {fault.shard for fault in faults if fault.shard is not None})
    return faults


def store_repair(store: FeatureStore, *, deep: bool | None = None) -> list[Fault]:
    """Take back the commits of damaged shards, so that they are pending again; sound ones are not touched.

    Args:
        deep: read every byte first. None: only of shards that an earlier deep check found damaged, or of all if the
            store is small.

    Returns:
        The faults found. Those of the whole store (plan, metadata, calibration) are mended by `FeatureStore.create`.
    """
    shards = committed_shards(store.layout)
    noted = {int(path.stem) for path in _notes(store).glob("[0-9]*")}
    if deep is None:
        deep = store.num_shards * store.rows_per_shard * store.header.bytes_per_row <= SMALL_BYTES
    faults = [*_store_faults(store), *_seal_faults(store, shards)]
    for shard in shards:
        faults += check_shard(store, shard, deep=deep or shard in noted)
    damaged = sorted({fault.shard for fault in faults if fault.shard is not None})
    if damaged or any(fault.kind == "seal" for fault in faults):
        _take_back(store, damaged)
    for path in _notes(store).glob("[0-9]*"):
        path.unlink(missing_ok=True)
    return faults


def check_shard(store: FeatureStore, shard: int, *, deep: bool) -> list[Fault]:
    """List what is wrong with one committed shard."""
    try:
        commit = Commit.decode(store.layout.commit(shard).read_bytes())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [_fault(store, "commit_record", shard, store.layout.commit(shard), f"it is unreadable ({error})")]
    paths = {name: store.path / name for name in (*commit.arrays, *commit.files)}
    return [*_foreign(store, shard, commit), *check_files(store, commit, paths, deep=deep)]


def check_files(store: FeatureStore, commit: Commit, paths: Mapping[str, Path], *, deep: bool) -> list[Fault]:
    """Compare files with the record of their shard.

    Args:
        paths: where each file is by its name in the record: in the store, or on its way into another.
    """
    faults: list[Fault] = []
    for name, path in paths.items():
        expected = commit.arrays.get(name) or commit.files[name]
        if not path.exists():
            faults.append(_fault(store, "missing", commit.shard, name, "it is not there"))
        elif path.stat().st_size != expected.size_bytes:
            faults.append(
                _fault(
                    store,
                    "size",
                    commit.shard,
                    name,
                    f"it has {path.stat().st_size:,} bytes, committed with {expected.size_bytes:,}",
                )
            )
        elif isinstance(expected, ArrayFile):
            faults += _check_array(store, commit.shard, name, path, expected, deep)
        elif hashlib.sha256(path.read_bytes()).hexdigest() != expected.sha256:
            kind: Kind = "index" if name.startswith("index/") else "quarantine"
            found = "it is not the file that was committed (its sha256 differs)"
            faults.append(_fault(store, kind, commit.shard, name, found))
    return faults


# ------------------------------------------------------------------------------------------- one shard


def _check_shards(
    store: FeatureStore, shards: list[int], deep: bool, progress: Callable[[int], None] | None
) -> Iterator[list[Fault]]:
    with ThreadPoolExecutor(2, thread_name_prefix="verify") as pool:
        results = pool.map(lambda shard: check_shard(store, shard, deep=deep), shards)
        for shard, faults in zip(shards, results, strict=True):
            if progress is not None:
                progress(sum(path.stat().st_size for path in _data(store, shard) if path.exists()))
            yield faults


def _data(store: FeatureStore, shard: int) -> list[Path]:
    return [store.layout.array(name, shard) for name in store.header.arrays]


def _foreign(store: FeatureStore, shard: int, commit: Commit) -> Iterator[Fault]:
    path, header = store.layout.commit(shard), store.header
    if commit.shard != shard:
        yield _fault(store, "swapped", shard, path, f"it is the record of shard {commit.shard}")
    if commit.plan_id != header.plan_id:
        yield _fault(
            store,
            "stale_plan",
            shard,
            path,
            f"it was written for plan {commit.plan_id[:12]}, the store has plan {header.plan_id[:12]}",
        )
    if commit.fingerprint_id != header.fingerprint_id:
        yield _fault(
            store,
            "foreign_fingerprint",
            shard,
            path,
            f"it was written for fingerprint {commit.fingerprint_id[:12]}, the store has {header.fingerprint_id[:12]}",
        )


def _check_array(
    store: FeatureStore, shard: int, name: str, path: Path, file: ArrayFile, deep: bool
) -> Iterator[Fault]:
    header = store.header
    chunks = list(range(len(file.checksums)))
    if not deep:
        chunks = sorted({*chunks[:1], *chunks[-1:]})
    wrong, sound = _compare_chunks(path, header, file, chunks)
    if wrong and sound == len(wrong):
        yield _fault(
            store,
            "swapped",
            shard,
            name,
            f"{len(wrong)} of {len(chunks)} chunks read are sound but not those of this shard: "
            "another file is in its place",
        )
    elif wrong:
        yield _fault(
            store,
            "bit_flip",
            shard,
            name,
            f"chunk {wrong[0]} is not the one that was committed"
            + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""),
        )
    if not _has_expected_index(path, header, len(file.checksums)):
        yield _fault(store, "shard_index", shard, name, "the Zarr shard index at its end is damaged")


def _compare_chunks(path: Path, header: Header, file: ArrayFile, chunks: list[int]) -> tuple[list[int], int]:
    """Read chunks and compare them with the record.

    Returns:
        The chunks that differ, and how many of those agree with their own checksum in the file.
    """
    features = path.parent.name == "features"
    shape = (header.chunk_rows, header.dim) if features else (header.chunk_rows,)
    wrong, sound = [], 0
    fd = os.open(path, os.O_RDONLY)
    try:
        for chunk in chunks:
            dtype = header.dtype if features else np.dtype("<f2")
            _, (found,), (computed,) = read_chunks(fd, chunk, 1, shape, dtype)
            if not file.checksums[chunk] == found == computed:
                wrong.append(chunk)
                sound += int(found == computed)
    finally:
        os.close(fd)
    return wrong, sound


def _has_expected_index(path: Path, header: Header, num_chunks: int) -> bool:
    chunks_per_shard = header.rows_per_shard // header.chunk_rows
    chunk_bytes = header.chunk_rows * (header.dim * header.dtype.itemsize if path.parent.name == "features" else 2)
    try:
        found = read_index(path, chunks_per_shard)
    except ValueError:
        return False
    return np.array_equal(found, expected_index(num_chunks, chunks_per_shard, chunk_bytes))


# ------------------------------------------------------------------------------------------- the whole store


def _store_faults(store: FeatureStore) -> Iterator[Fault]:
    layout, header = store.layout, store.header
    try:
        store.calibration  # noqa: B018  # reads and checks it
    except CorruptShardError:
        yield _fault(store, "calibration", None, layout.calibration, "it is not the calibration that the header names")
    for name in metadata_faults(store.path, header):
        yield _fault(store, "metadata", None, name, "it does not describe the array of this store")
    try:
        plan = read_plan(layout.plan)
    except (OSError, pa.ArrowException) as error:
        yield _fault(store, "stale_plan", None, layout.plan, f"it is unreadable ({error})")
        return
    if plan_digest(plan) != header.plan_id:
        yield _fault(
            store,
            "stale_plan",
            None,
            layout.plan,
            f"it is plan {plan_digest(plan)[:12]}, the store was made with plan {header.plan_id[:12]}",
        )
    elif not layout.rejected.exists() or layout.rejected.read_bytes() != encode_rejected(plan):
        yield _fault(store, "quarantine", None, layout.rejected, "it does not list what the plan rejected")


def _seal_faults(store: FeatureStore, shards: list[int]) -> Iterator[Fault]:
    if not store.is_sealed:
        return
    layout = store.layout
    for shard in sorted(set(range(store.num_shards)) - set(shards)):
        yield _fault(store, "missing", shard, layout.commit(shard), "the store is sealed and the record is not there")
    try:
        seal = json.loads(layout.sealed.read_text())
        lines = layout.sealed_commits.read_bytes()
        if root_digest(Commit.decode(line) for line in lines.splitlines()) != seal["root"]:
            yield _fault(store, "seal", None, layout.sealed_commits, "the records are not those that were sealed")
        for shard, line in enumerate(lines.splitlines(keepends=True)):
            if shard in shards and layout.commit(shard).read_bytes() != line:
                yield _fault(store, "seal", shard, layout.commit(shard), "it is not the record that was sealed")
        if hashlib.sha256(layout.sealed_index.read_bytes()).hexdigest() != seal["index_sha256"]:
            yield _fault(store, "seal", None, layout.sealed_index, "it is not the index that was sealed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield _fault(store, "seal", None, layout.sealed, f"the seal is unreadable ({error})")


# ------------------------------------------------------------------------------------------- undoing


def _take_back(store: FeatureStore, shards: list[int]) -> None:
    """Unseal, and remove shards: the record first, so that no reader meets half a shard."""
    layout = store.layout
    with exclusive(layout.lock):
        for path in (layout.sealed, layout.sealed_commits, layout.sealed_index):
            remove(path)
        for shard in shards:
            if not layout.commit(shard).exists() or not check_shard(store, shard, deep=True):
                continue  # another process has made it again in the meantime
            remove(layout.commit(shard))
            for path in layout.files_of(shard, store.header).values():
                remove(path)


def _notes(store: FeatureStore) -> Path:
    return store.path / "damaged"


def _note(store: FeatureStore, shards: set[int]) -> None:
    for shard in shards:
        _notes(store).mkdir(exist_ok=True)
        path = _notes(store) / f"{shard:06d}"
        if not path.exists():
            place(path, [b""])


def _fault(store: FeatureStore, kind: Kind, shard: int | None, path: Path | str, found: str) -> Fault:
    name = path if isinstance(path, str) else path.relative_to(store.path).as_posix()
    where = name if shard is None else f"{name} (shard {shard})"
    again = "everything else stays" if shard is None else "exactly this shard is made again"
    return Fault(
        kind=kind,
        shard=shard,
        path=name,
        message=(f"{where}: {found}. Type the `tinyaudio extract` command that made the store: {again}."),
    )
