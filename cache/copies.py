"""Merging stores of one plan, and exporting a part of a store."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cache.commits import check_sizes
from cache.create import require_same
from cache.errors import CorruptShardError, LostClaimError
from cache.files import sync, temporary_of
from cache.info import Paths
from cache.plan import make_plan
from cache.reader import FeatureReader
from cache.repair import store_repair
from cache.store import FeatureStore
from cache.verify import check_files
from cache.writer import claim_shard, commit_shard


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What `store_merge` did."""

    adopted: list[int]  # shards copied
    present: list[int]  # shards that the destination had already
    pending: list[int]  # shards that no store had


def store_merge(destination: Paths, sources: Sequence[Paths]) -> Merged:
    """Copy the finished shards of stores made elsewhere from the same plan; seal the store if it is then complete.

    Every byte is checked against its commit record. If it is interrupted, the same call resumes; shards of the
    destination that are damaged are copied again.

    Args:
        destination: a store; if it does not exist, an empty one like the first source is made.
        sources: stores with the same plan and fingerprint, as `extract --shard i/N` on several machines leaves them.

    Raises:
        StoreMismatchError: a source is another extraction; the fields are named.
        CorruptShardError: a shard of a source is damaged.
    """
    stores = [FeatureStore.open(source) for source in sources]
    store = _create_like(stores[0], destination, stores[0].plan())
    for source in stores:
        require_same(store.path, store.header, source.header)
    store_repair(store)
    present, adopted = store.committed_shards(), []
    for source in stores:
        for shard in source.committed_shards():
            if shard not in present and shard not in adopted and _copy_shard(store, source, shard):
                adopted.append(shard)
    pending = store.pending_shards()
    if not pending:
        store.seal()
    return Merged(adopted=sorted(adopted), present=present, pending=pending)


def _create_like(store: FeatureStore, destination: Paths, plan: pa.Table) -> FeatureStore:
    """Create, open or repair a store of this plan that holds the same kind of rows as another."""
    return FeatureStore.create(
        destination,
        plan=plan,
        dim=store.dim,
        encoding=store.encoding,
        rows_per_shard=store.rows_per_shard,
        calibration=store.calibration,
        fingerprint={name: value for name, value in store.fingerprint.items() if name != "store"},
    )


def _copy_shard(store: FeatureStore, source: FeatureStore, shard: int) -> bool:
    """Copy one shard, check the copy, and commit it under the same record; False if another process does so."""
    claim = claim_shard(store.layout, store.header, shard)
    if claim is None:
        return False
    commit = source.commit(shard)
    names = (*commit.arrays, *commit.files)
    copies = {name: temporary_of(store.path / name, claim.owner) for name in names}
    try:
        check_sizes(source.path, commit)
        for name, copy in copies.items():
            shutil.copyfile(source.path / name, copy)
            sync(copy)
        if faults := check_files(source, commit, copies, deep=True):
            raise CorruptShardError(source.path, shard, f"{faults[0].path} is not what was committed")
        commit_shard(store.layout, claim, shard, [store.path / name for name in names], commit)
        return True
    except LostClaimError:
        return False
    finally:
        for copy in copies.values():
            copy.unlink(missing_ok=True)
        claim.release()


def store_export(
    source: Paths, destination: Paths, *, max_hours: float | None = None, split: str | None = None, seed: int = 0
) -> FeatureStore:
    """Copy some utterances into a smaller store, for quick ablations; their frames stay bit-identical.

    If it is interrupted or the copy is damaged, the same call resumes or repairs it.

    Args:
        max_hours: at most this much audio of each split, drawn at random; None for all.

    Raises:
        ValueError: no utterance is selected.
        StoreMismatchError: the destination is another store.
    """
    reader = FeatureReader(source)
    splits = np.asarray(reader.index["split"].to_pylist(), dtype=object)
    keep = np.ones(len(reader), dtype=bool) if split is None else splits == split
    if max_hours is not None:
        order = np.random.default_rng(seed).permutation(len(reader))
        durations = np.asarray(reader.index["duration_s"])
        for name in set(splits[keep]):
            drawn = order[(keep & (splits == name))[order]]
            keep[drawn[np.cumsum(durations[drawn]) > max_hours * 3600]] = False
    chosen = np.flatnonzero(keep)
    if not len(chosen):
        raise ValueError(f"no utterance of {str(reader.store.path)!r} is selected; change --split or --max-hours.")
    index = reader.index.take(chosen)
    table = pa.table(
        {
            "utterance_id": index["utterance_id"],
            "split": index["split"],
            "num_frames": index["num_frames"],
            "source_id": pa.array(chosen).cast(pa.string()),
        }
    )
    plan = make_plan(table, rows_per_shard=reader.store.rows_per_shard, margin_frames=0)
    store = _create_like(reader.store, destination, plan)
    store_repair(store)
    for shard in store.pending_shards():
        writer = store.write_shard(shard)
        if writer is None:
            continue
        positions = np.sort(np.asarray(writer.plan["source_id"].to_pylist(), dtype=np.int64))
        with writer:
            for position, row in zip(positions.tolist(), reader.index.take(positions).to_pylist(), strict=True):
                writer.append_rows(reader.rows_of(position), row)
    store.seal()
    return store
