"""Finding and naming every kind of damage to a store. Repairing it is the job of `cache.repair`.

The quick check reads records, sizes, small files, and the first and last checksum of each shard file: it finds what is
missing, truncated, swapped, stale or foreign, at a few kilobytes a shard. The deep check reads every byte. Shards that
are found damaged are noted in `damaged/`, here and by readers, so that the next `store_repair` finds them without
reading everything again. Nothing else of a store is changed here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cache.commits import ArrayFile, Commit, check_commit, committed_shards, note_damage, noted_damage
from cache.create import metadata_faults
from cache.errors import CorruptShardError, command_that_made
from cache.files import BYTES_LOST
from cache.shards import CRC_BYTES, expected_index, read_chunks, read_index
from cache.store import FeatureStore

Kind = Literal[
    "missing",
    "size",
    "content",
    "record",  # of a commit: damaged, or of another shard, plan or fingerprint
    "plan",
    "metadata",
    "seal",
    "unreadable",  # the disk has lost the bytes
    "out_of_reach",  # no permission, no connection: the bytes may be intact, so they are never removed
]
SMALL_BYTES = 4 << 30  # a store up to this size is read completely before a repair: seconds
NUM_THREADS = 4  # that check shards: two keep a disk busy, a network file system likes more


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with a store."""

    kind: Kind
    shard: int | None  # None: it does not belong to one shard
    path: str  # inside the store
    message: str  # what was found, what was expected, what to do

    @property
    def is_lost(self) -> bool:
        """Whether something has to be made again."""
        return self.kind != "out_of_reach"


def find_faults(
    store: FeatureStore, *, deep: bool | None = False, progress: Callable[[int], None] | None = None
) -> Iterator[Fault]:
    """Find what is wrong with a store, one fault after the other; being unfinished is not a fault.

    Damaged shards are noted as they are found, for the next `store_repair`, if the store is writable.

    Args:
        deep: read every byte; None: only if the store is small. Shards that were noted as damaged are always read
            completely.
        progress: called with each shard after it was checked.

    Yields:
        The faults: those that belong to no shard first, then shard by shard. None: the store is intact.
    """
    for name, found in metadata_faults(store.path, store.header).items():
        yield _fault(store, "plan" if name == "plan.parquet" else "metadata", None, name, found)
    shards = committed_shards(store.layout)
    yield from _seal_faults(store, shards)
    if deep is None:
        deep = store.num_shards * store.rows_per_shard * store.header.bytes_per_row <= SMALL_BYTES
    noted = noted_damage(store.layout)
    pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="verify")
    try:
        results = [pool.submit(check_shard, store, shard, deep=deep or shard in noted) for shard in shards]
        for shard, faults in zip(shards, results, strict=True):
            for fault in faults.result():
                note_damage(store.layout, shard)
                yield fault
            if progress is not None:
                progress(shard)
    finally:
        pool.shutdown(cancel_futures=True)  # the caller may stop early


def store_verify(store: FeatureStore, *, deep: bool | None = False) -> list[Fault]:
    """List what is wrong with a store; see `find_faults`. Empty: the store is intact."""
    return list(find_faults(store, deep=deep))


def _seal_faults(store: FeatureStore, shards: list[int]) -> Iterator[Fault]:
    """Compare a sealed store with its seal; nothing for a store that is not sealed."""
    if not store.is_sealed:
        return
    layout = store.layout
    for shard in sorted(set(range(store.num_shards)) - set(shards)):
        yield _fault(store, "missing", shard, layout.commit(shard), "the store is sealed but the record is missing")
    try:
        seal = json.loads(layout.sealed.read_text())
        content = layout.sealed_commits.read_bytes()
        if hashlib.sha256(content).hexdigest() != seal["root"]:
            yield _fault(store, "seal", None, layout.sealed_commits, "the records are not those that were sealed")
        else:
            for shard, line in enumerate(content.splitlines(keepends=True)):
                with contextlib.suppress(OSError):  # found by the check of the shard
                    if layout.commit(shard).read_bytes() != line:
                        yield _fault(store, "seal", shard, layout.commit(shard), "it is not the record that was sealed")
        if hashlib.sha256(layout.sealed_index.read_bytes()).hexdigest() != seal["index_sha256"]:
            yield _fault(store, "seal", None, layout.sealed_index, "it is not the index that was sealed")
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield _fault(store, "seal", None, layout.sealed, f"the seal is unreadable ({error})")


def check_shard(store: FeatureStore, shard: int, *, deep: bool) -> list[Fault]:
    """List what is wrong with one committed shard."""
    path = store.layout.commit(shard)
    try:
        commit = check_commit(store.layout, store.header, shard, path.read_bytes())
    except CorruptShardError as error:
        return [_fault(store, "record", shard, path, error.found)]
    except OSError as error:
        return [_unreadable(store, shard, path, error)]
    paths = {name: store.path / name for name in (*commit.arrays, *commit.files)}
    return check_files(store, commit, paths, deep=deep)


def check_files(store: FeatureStore, commit: Commit, paths: Mapping[str, Path], *, deep: bool) -> list[Fault]:
    """Compare files with the record of their shard.

    Args:
        paths: where each file is, by its name in the record: in the store, or a temporary copy.
    """
    faults: list[Fault] = []
    for name, path in paths.items():
        expected = commit.arrays.get(name) or commit.files[name]
        try:
            size = path.stat().st_size
            if size != expected.size_bytes:
                found = f"it has {size:,} bytes, expected {expected.size_bytes:,}"
                faults.append(_fault(store, "size", commit.shard, name, found))
            elif isinstance(expected, ArrayFile):
                if found := _compare_array(store, name, path, expected, deep):
                    faults.append(_fault(store, "content", commit.shard, name, found))
            elif hashlib.sha256(path.read_bytes()).hexdigest() != expected.sha256:
                found = "it is not the file that was committed (its sha256 differs)"
                faults.append(_fault(store, "content", commit.shard, name, found))
        except OSError as error:
            faults.append(_unreadable(store, commit.shard, name, error))
    return faults


def _compare_array(store: FeatureStore, name: str, path: Path, expected: ArrayFile, deep: bool) -> str:
    """Compare a shard file of the committed size with its record: what is wrong; empty if nothing is.

    Without `deep`, of the chunks only the checksums that stand in the file after the first and the last one are
    compared: eight bytes find a file in the wrong place.
    """
    header, array = store.header, name.partition("/")[0]
    spec, chunk_bytes, num_chunks = header.arrays[array], header.chunk_bytes(array), len(expected.checksums)
    chunks = list(range(num_chunks))
    wrong = []
    fd = os.open(path, os.O_RDONLY)
    try:
        for chunk in chunks if deep else chunks[:1] + chunks[1:][-1:]:
            committed = int(expected.checksums[chunk])
            label = os.pread(fd, CRC_BYTES, (chunk + 1) * (chunk_bytes + CRC_BYTES) - CRC_BYTES)
            is_same = int.from_bytes(label, "little") == committed
            if deep and is_same:
                _, _, (computed,) = read_chunks(fd, chunk, 1, (header.chunk_rows, *spec.row_shape), spec.dtype)
                is_same = int(computed) == committed
            if not is_same:
                wrong.append(chunk)
    finally:
        os.close(fd)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return f"chunk {wrong[0]} is not the one that was committed{more}"
    chunks_per_shard = header.rows_per_shard // header.chunk_rows
    wanted = expected_index(num_chunks, chunks_per_shard, chunk_bytes)
    with contextlib.suppress(ValueError):  # incomplete, or its checksum is wrong
        if np.array_equal(read_index(path, chunks_per_shard), wanted):
            return ""
    return "the Zarr shard index at its end is damaged"


def _unreadable(store: FeatureStore, shard: int, path: Path | str, error: OSError) -> Fault:
    """Name a file that cannot be read: missing, lost on the disk, or out of reach."""
    if isinstance(error, FileNotFoundError):
        return _fault(store, "missing", shard, path, "it does not exist")
    kind: Kind = "unreadable" if error.errno in BYTES_LOST else "out_of_reach"
    return _fault(store, kind, shard, path, f"it cannot be read ({error.strerror})")


def _fault(store: FeatureStore, kind: Kind, shard: int | None, path: Path | str, found: str) -> Fault:
    name = path if isinstance(path, str) else path.relative_to(store.path).as_posix()
    where = name if shard is None else f"{name} (shard {shard})"
    if kind == "out_of_reach":
        advice = "Make it readable, then check again: it may be intact"
    else:
        repaired = "no shard is touched" if shard is None else "only this shard is made again"
        advice = f"Run {command_that_made(store.path)} again to repair it; {repaired}"
    return Fault(kind=kind, shard=shard, path=name, message=f"{where}: {found}. {advice}.")
