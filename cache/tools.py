"""What one does with finished stores: look inside, compare, join, cut out. Returns values; printing is the caller's."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cache.claims import Claim
from cache.commits import check_sizes
from cache.durable import Owner, exclusive, link_into_place, place, sync_directory, temporary_of
from cache.errors import CorruptShardError, StoreMismatchError
from cache.index import decode_quarantine, read_committed
from cache.plan import make_plan
from cache.reader import FeatureReader
from cache.skeleton import compare_fields
from cache.store import FeatureStore
from cache.verify import check_files

DURATION_EDGES_S = (0, 1, 2, 5, 10, 15, 20, 30, 60)  # the last class is open
Paths = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What is in a store, by whom, how much, how complete."""

    path: str
    format: int
    encoding: str
    dim: int
    fingerprint_id: str
    fingerprint: dict[str, Any]
    plan_id: str
    calibration_id: str | None
    num_shards: int
    num_committed: int
    is_sealed: bool
    num_planned: int
    num_utterances: int
    num_frames: int
    num_clamped: int
    hours: float
    size_bytes: int
    splits: dict[str, dict[str, float]]  # split -> utterances, hours, shards
    quarantine: dict[str, int]  # reason -> utterances
    durations: dict[str, int]  # "2-5 s" -> utterances
    writers: dict[str, int]  # host -> shards
    first_commit: str | None  # UTC, ISO 8601
    last_commit: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_table(self) -> str:
        """Write it for people."""
        lines = [
            f"store        {self.path}",
            f"holds        {self.num_utterances:,} utterances, {self.hours:,.2f} h, {self.num_frames:,} frames of "
            f"{self.dim} x {self.encoding}, {self.size_bytes / 1e9:,.3f} GB",
            f"complete     {self.num_committed:,} of {self.num_shards:,} shards"
            + (", sealed" if self.is_sealed else ", not sealed"),
            f"fingerprint  {self.fingerprint_id[:12]}    plan {self.plan_id[:12]}"
            + (f"    calibration {self.calibration_id[:12]}" if self.calibration_id else ""),
        ]
        lines += [
            f"split        {name:<12} {int(part['utterances']):>10,} utterances {part['hours']:>10,.2f} h"
            for name, part in self.splits.items()
        ]
        lines += [f"duration     {name:<12} {count:>10,} utterances" for name, count in self.durations.items() if count]
        lines += [f"quarantine   {reason:<22} {count:>10,}" for reason, count in self.quarantine.items()]
        lines += [f"written by   {host:<22} {count:>10,} shards" for host, count in self.writers.items()]
        if self.num_clamped:
            lines.append(f"clamped      {self.num_clamped:,} values to the range of float16")
        if self.last_commit:
            lines.append(f"written      {self.first_commit} to {self.last_commit}")
        return "\n".join(lines)


def store_info(path: Paths) -> StoreInfo:
    """Describe a store from its records and indexes, without reading features.

    Raises:
        StoreNotFoundError, CorruptShardError: as `FeatureReader`.
    """
    reader = FeatureReader(path)
    store, commits = reader.store, reader.commits.values()
    splits: dict[str, dict[str, float]] = {}
    for commit in commits:
        part = splits.setdefault(commit.split, {"utterances": 0, "hours": 0.0, "shards": 0})
        part["utterances"] += commit.num_utterances
        part["hours"] += commit.duration_s / 3600
        part["shards"] += 1
    finished = sorted(commit.finished_at for commit in commits)
    return StoreInfo(
        path=str(store.path),
        format=store.header.format,
        encoding=store.encoding,
        dim=store.dim,
        fingerprint_id=store.fingerprint_id,
        fingerprint=store.fingerprint,
        plan_id=store.header.plan_id,
        calibration_id=store.header.calibration_id,
        num_shards=store.num_shards,
        num_committed=len(commits),
        is_sealed=store.is_sealed,
        num_planned=store.header.num_planned,
        num_utterances=sum(commit.num_utterances for commit in commits),
        num_frames=sum(commit.num_frames for commit in commits),
        num_clamped=sum(commit.num_clamped for commit in commits),
        hours=sum(commit.duration_s for commit in commits) / 3600,
        size_bytes=sum(commit.size_bytes for commit in commits),
        splits=splits,
        quarantine=dict(_quarantine(store, reader).most_common()),
        durations=_durations(reader),
        writers=dict(Counter(commit.writer.partition("+")[0] for commit in commits)),
        first_commit=finished[0] if finished else None,
        last_commit=finished[-1] if finished else None,
    )


def _quarantine(store: FeatureStore, reader: FeatureReader) -> Counter[str]:
    lines = decode_quarantine(store.layout.rejected.read_bytes())
    for commit in reader.commits.values():
        if commit.num_quarantined:
            lines += decode_quarantine(read_committed(store.path, commit, "quarantine"))
    return Counter(line["reason"] for line in lines)


def _durations(reader: FeatureReader) -> dict[str, int]:
    edges = [*DURATION_EDGES_S, np.inf]
    counts, _ = np.histogram(np.asarray(reader.index["duration_s"]), edges)
    names = [f"{low}-{high} s" for low, high in pairwise(DURATION_EDGES_S)]
    return dict(zip([*names, f"{DURATION_EDGES_S[-1]} s or more"], counts.tolist(), strict=True))


def store_diff(path: Paths, other: Paths) -> dict[str, tuple[Any, Any]]:
    """Compare what two stores hold.

    Returns:
        Field -> (value in the first, value in the second), for the fields that differ; empty: the same extraction.
    """
    headers = [FeatureStore.open(each).header.to_attributes()["feature_store"] for each in (path, other)]
    return compare_fields(headers[0], headers[1])


# ------------------------------------------------------------------------------------------- joining


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What `store_merge` did."""

    adopted: list[int]  # shards copied
    present: list[int]  # shards that were there already
    pending: list[int]  # shards that no store had

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def store_merge(destination: Paths, sources: Sequence[Paths]) -> Merged:
    """Adopt the finished shards of stores made elsewhere from the same plan, and seal the store if it is then complete.

    Every byte is checked against its commit record on the way. Interrupted, it continues when called again.

    Args:
        destination: a store; if there is none, an empty one like the first source is made.
        sources: stores with the same plan and fingerprint, as `extract --shard i/N` on several machines leaves them.

    Raises:
        StoreMismatchError: a source is another extraction; the fields are named.
        CorruptShardError: a shard of a source is damaged.
    """
    stores = [FeatureStore.open(source) for source in sources]
    root = Path(destination)
    if not root.exists():
        like = stores[0]
        FeatureStore.create(
            root,
            plan=like.plan(),
            dim=like.dim,
            encoding=like.encoding,
            rows_per_shard=like.rows_per_shard,
            calibration=like.calibration,
            fingerprint={name: value for name, value in like.fingerprint.items() if name != "store"},
        )
    store = FeatureStore.open(root)
    present, adopted = store.committed_shards(), []
    for source in stores:
        if differences := compare_fields(store.header.to_attributes(), source.header.to_attributes()):
            raise StoreMismatchError(store.path, differences)
        for shard in source.committed_shards():
            if shard not in present and shard not in adopted and _adopt(store, source, shard):
                adopted.append(shard)
    if not store.pending_shards():
        store.seal()
    return Merged(adopted=sorted(adopted), present=present, pending=store.pending_shards())


def _adopt(store: FeatureStore, source: FeatureStore, shard: int) -> bool:
    """Copy one shard, check the copy, and commit it under the record it has."""
    claim = Claim.take(store.layout, shard)
    if claim is None:
        return False
    commit = source.commit(shard)
    check_sizes(source.path, commit)
    names = [*commit.arrays, *commit.files]
    try:
        for name in names:
            _copy(source.path / name, temporary_of(store.path / name, claim.owner))
        _check_copy(store, source, shard, claim.owner)
        with exclusive(store.layout.lock):
            if store.layout.commit(shard).exists():
                return False
            for name in names:
                (store.path / name).unlink(missing_ok=True)
                link_into_place(temporary_of(store.path / name, claim.owner), store.path / name)
            for directory in {(store.path / name).parent for name in names}:
                sync_directory(directory)
            place(store.layout.commit(shard), [commit.encode()], claim.owner)
        return True
    finally:
        for name in names:
            temporary_of(store.path / name, claim.owner).unlink(missing_ok=True)
        claim.release()


def _copy(path: Path, target: Path) -> None:
    shutil.copyfile(path, target)
    fd = os.open(target, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_copy(store: FeatureStore, source: FeatureStore, shard: int, owner: Owner) -> None:
    commit = source.commit(shard)
    paths = {name: temporary_of(store.path / name, owner) for name in (*commit.arrays, *commit.files)}
    if faults := check_files(source, commit, paths, deep=True):
        raise CorruptShardError(source.path, shard, faults[0].message)


# ------------------------------------------------------------------------------------------- cutting out


def store_export(
    source: Paths,
    destination: Paths,
    *,
    max_hours: float | None = None,
    split: str | None = None,
    ids: Collection[str] | None = None,
    seed: int = 0,
) -> FeatureStore:
    """Copy some utterances into a smaller store of their own, for quick ablations; frames are bit for bit the same.

    Args:
        max_hours: at most so much audio of each split, drawn at random; None for all.
        split: only this split.
        ids: only these utterances.
        seed: of the draw.

    Raises:
        ValueError: nothing is left to export.
        StoreMismatchError: the destination is another store.
    """
    reader = FeatureReader(source)
    chosen = _choose(reader, max_hours, split, ids, seed)
    if not len(chosen):
        raise ValueError(
            f"no utterance of {str(reader.store.path)!r} is left to export; loosen --split, --max-hours "
            "or the list of ids."
        )
    index = reader.index.take(chosen)
    table = pa.table(
        {
            "utterance_id": index["utterance_id"],
            "split": index["split"],
            "num_frames": index["num_frames"],
            "source_id": pa.array(chosen).cast(pa.string()),
        }
    )
    store = FeatureStore.create(
        destination,
        plan=make_plan(table, rows_per_shard=reader.store.rows_per_shard, margin_frames=0),
        dim=reader.store.dim,
        encoding=reader.store.encoding,
        rows_per_shard=reader.store.rows_per_shard,
        calibration=reader.store.calibration,
        fingerprint={name: value for name, value in reader.store.fingerprint.items() if name != "store"},
    )
    for shard in store.pending_shards():
        _export_shard(reader, store, shard)
    store.seal()
    return store


def _choose(
    reader: FeatureReader, max_hours: float | None, split: str | None, ids: Collection[str] | None, seed: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    splits = np.asarray(reader.index["split"].to_pylist(), dtype=object)
    keep = np.ones(len(reader), dtype=bool) if split is None else splits == split
    if ids is not None:
        wanted = set(ids)
        keep &= np.fromiter((name in wanted for name in reader.index["utterance_id"].to_pylist()), bool, len(reader))
    if max_hours is not None:
        order = np.random.default_rng(seed).permutation(len(reader))
        durations = np.asarray(reader.index["duration_s"])
        for name in set(splits[keep]):
            drawn = order[(keep & (splits == name))[order]]
            keep[drawn[np.cumsum(durations[drawn]) > max_hours * 3600]] = False
    return np.flatnonzero(keep)


def _export_shard(reader: FeatureReader, store: FeatureStore, shard: int) -> None:
    writer = store.write_shard(shard)
    if writer is None:
        return
    positions = np.sort(np.asarray(writer.plan["source_id"].to_pylist(), dtype=np.int64))
    with writer:
        for row, rows in zip(reader.index.take(positions).to_pylist(), reader.read_rows(positions), strict=True):
            writer.append_rows(rows, row)
