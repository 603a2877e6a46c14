"""Find every way in which a store can be damaged, and name it. To undo it is `cache.repair`'s business.

The quick check reads records, sizes, small files and the first and last checksum of each shard: it finds what is
missing, cut, swapped, stale or foreign, at a few kilobytes a shard. The deep check reads every byte. What it finds is
noted in `damaged/`, as is what a reader stumbles over, so that the next `store_repair` knows without reading everything
again. Nothing else of a store is changed here.
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

from cache.commits import ArrayFile, Commit, committed_shards, note_damage, noted_damage, root_digest
from cache.create import encode_rejected, metadata_faults
from cache.errors import command_that_made
from cache.files import is_lost
from cache.layout import Header
from cache.plan import plan_digest, read_plan
from cache.shards import CRC_BYTES, expected_index, read_chunks, read_index
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
    "unreadable",  # the disk no longer gives the bytes
    "restored",  # only from `store_repair`: a lost record that is back
    "out_of_reach",  # no permission, no connection: the bytes may be sound, so they are never taken back
]
SMALL_BYTES = 4 << 30  # a store up to this size is repaired by reading all of it: seconds
NUM_THREADS = 4  # that check shards: two keep a disk busy, a network file system likes more


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong with a store."""

    kind: Kind
    shard: int | None  # None: not one shard's
    path: str  # inside the store
    message: str  # what was found, what was expected, what to type

    @property
    def is_lost(self) -> bool:
        """Whether something has to be made again: it is neither merely out of reach nor back already."""
        return self.kind not in ("out_of_reach", "restored")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_faults(
    store: FeatureStore, *, deep: bool | None = False, progress: Callable[[int], None] | None = None
) -> Iterator[Fault]:
    """Find what is wrong with a store, one fault after the other; an unfinished one is not wrong.

    Damaged shards are noted as they are found, for the next `store_repair`, wherever the store may be written to.

    Args:
        deep: read every byte. None: if the store is small. Of shards that were found damaged before, every byte is read
            anyway.
        progress: called after each shard with the bytes checked.

    Yields:
        The faults, those of the whole store first, then by shard. None: the store is sound.
    """
    shards = committed_shards(store.layout)
    yield from store_faults(store)
    yield from seal_faults(store, shards)
    for faults in check_shards(store, shards, deep, progress):
        for fault in faults:
            if fault.shard is not None:
                note_damage(store.layout, fault.shard)
            yield fault


def store_verify(store: FeatureStore, *, deep: bool | None = False) -> list[Fault]:
    """List what is wrong with a store; see `find_faults`. Empty: the store is sound."""
    return list(find_faults(store, deep=deep))


def check_shard(store: FeatureStore, shard: int, *, deep: bool) -> list[Fault]:
    """List what is wrong with one committed shard."""
    path = store.layout.commit(shard)
    try:
        commit = Commit.decode(path.read_bytes())
    except OSError as error:
        return [_unreadable(store, shard, path, error)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [_fault(store, "commit_record", shard, path, f"it is unreadable ({error})")]
    paths = {name: store.path / name for name in (*commit.arrays, *commit.files)}
    return [*foreign_faults(store, shard, commit), *check_files(store, commit, paths, deep=deep)]


def check_files(store: FeatureStore, commit: Commit, paths: Mapping[str, Path], *, deep: bool) -> list[Fault]:
    """Compare files with the record of their shard.

    Args:
        paths: where each file is by its name in the record: in the store, or on its way into another.
    """
    faults: list[Fault] = []
    for name, path in paths.items():
        try:
            faults += _check_file(store, commit, name, path, deep)
        except OSError as error:
            faults.append(_unreadable(store, commit.shard, name, error))
    return faults


# ------------------------------------------------------------------------------------------- one shard


def check_shards(
    store: FeatureStore, shards: list[int], deep: bool | None, progress: Callable[[int], None] | None = None
) -> Iterator[list[Fault]]:
    """Check shards side by side; left early, it drops what it has not begun."""
    if deep is None:
        deep = store.num_shards * store.rows_per_shard * store.header.bytes_per_row <= SMALL_BYTES
    noted = noted_damage(store.layout)
    pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="verify")
    try:
        results = [pool.submit(check_shard, store, shard, deep=deep or shard in noted) for shard in shards]
        for shard, faults in zip(shards, results, strict=True):
            yield faults.result()
            if progress is not None:
                progress(sum(path.stat().st_size for path in _data(store, shard) if path.exists()))
    finally:
        pool.shutdown(cancel_futures=True)


def _data(store: FeatureStore, shard: int) -> list[Path]:
    return [store.layout.array(name, shard) for name in store.header.arrays]


def _check_file(store: FeatureStore, commit: Commit, name: str, path: Path, deep: bool) -> Iterator[Fault]:
    expected = commit.arrays.get(name) or commit.files[name]
    size = path.stat().st_size
    if size != expected.size_bytes:
        found = f"it has {size:,} bytes, committed with {expected.size_bytes:,}"
        yield _fault(store, "size", commit.shard, name, found)
    elif isinstance(expected, ArrayFile):
        yield from _check_array(store, commit.shard, name, path, expected, deep)
    elif hashlib.sha256(path.read_bytes()).hexdigest() != expected.sha256:
        kind: Kind = "index" if name.startswith("index/") else "quarantine"
        yield _fault(store, kind, commit.shard, name, "it is not the file that was committed (its sha256 differs)")


def foreign_faults(store: FeatureStore, shard: int, commit: Commit) -> Iterator[Fault]:
    """Find out whether a record is another shard's, plan's or extraction's."""
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
    header, last = store.header, len(file.checksums) - 1
    chunks = list(range(last + 1))
    if not deep:
        chunks = [chunk for chunk in sorted({0, last}) if last >= 0 and not _is_labelled(path, header, file, chunk)]
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


def _is_labelled(path: Path, header: Header, file: ArrayFile, chunk: int) -> bool:
    """Say whether the checksum written after a chunk is the committed one: four bytes tell a file in its place."""
    with path.open("rb", buffering=0) as stream:
        stream.seek((chunk + 1) * (_chunk_bytes(path, header) + CRC_BYTES) - CRC_BYTES)
        return stream.read(CRC_BYTES) == file.checksums[chunk].astype("<u4").tobytes()


def _chunk_bytes(path: Path, header: Header) -> int:
    return header.chunk_rows * (header.dim * header.dtype.itemsize if path.parent.name == "features" else 2)


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
    try:
        found = read_index(path, chunks_per_shard)
    except ValueError:
        return False
    return np.array_equal(found, expected_index(num_chunks, chunks_per_shard, _chunk_bytes(path, header)))


# ------------------------------------------------------------------------------------------- the whole store


def store_faults(store: FeatureStore) -> Iterator[Fault]:
    """Find what is wrong with header, plan and calibration."""
    layout, header = store.layout, store.header
    yield from _calibration_faults(store)
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


def _calibration_faults(store: FeatureStore) -> Iterator[Fault]:
    if store.header.calibration_id is None:
        return
    is_copied, name = store.calibration_copy() is not None, store.header.calibration_id[:12]
    if store.calibration_file() is None:
        other = "the copy in zarr.json is whole" if is_copied else "and there is no whole copy of it in zarr.json"
        found = f"it is not the calibration {name} that the header names; {other}"
        yield _fault(store, "calibration", None, store.layout.calibration, found)
    if not is_copied and store.header.calibration is not None:
        found = f"the copy of the calibration in it is not the calibration {name} that it names"
        yield _fault(store, "calibration", None, "zarr.json", found)


def seal_faults(store: FeatureStore, shards: list[int]) -> Iterator[Fault]:
    """Find what a sealed store lacks of what was sealed; nothing in one that is not."""
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
        committed = set(shards)
        for shard, line in enumerate(lines.splitlines(keepends=True)):
            if shard in committed and _is_other(layout.commit(shard), line):
                yield _fault(store, "seal", shard, layout.commit(shard), "it is not the record that was sealed")
        if hashlib.sha256(layout.sealed_index.read_bytes()).hexdigest() != seal["index_sha256"]:
            yield _fault(store, "seal", None, layout.sealed_index, "it is not the index that was sealed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield _fault(store, "seal", None, layout.sealed, f"the seal is unreadable ({error})")


def _is_other(path: Path, content: bytes) -> bool:
    """Say whether a file that can be read has another content; one that cannot is another check's business."""
    try:
        return path.read_bytes() != content
    except OSError:
        return False


# ------------------------------------------------------------------------------------------- naming


def _unreadable(store: FeatureStore, shard: int, path: Path | str, error: OSError) -> Fault:
    """Name a file that cannot be read: absent, lost on the disk, or merely out of reach."""
    if isinstance(error, FileNotFoundError):
        return _fault(store, "missing", shard, path, "it is not there")
    return _fault(
        store, "unreadable" if is_lost(error) else "out_of_reach", shard, path, f"it cannot be read ({error.strerror})"
    )


def _fault(store: FeatureStore, kind: Kind, shard: int | None, path: Path | str, found: str) -> Fault:
    name = path if isinstance(path, str) else path.relative_to(store.path).as_posix()
    where = name if shard is None else f"{name} (shard {shard})"
    if kind == "out_of_reach":
        advice = "Make it readable, then check again: it may be sound"
    else:
        again = "everything else stays" if shard is None else "exactly this shard is repaired"
        advice = f"Type {command_that_made(store.path)}: {again}"
    return Fault(kind=kind, shard=shard, path=name, message=f"{where}: {found}. {advice}.")
