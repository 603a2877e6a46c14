"""Joining stores and cutting parts out of one."""

import os
import shlex
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cache.commits import check_sizes
from cache.create import compare_fields
from cache.errors import MADE_BY, RECIPE, REQUEST, CorruptShardError, LostClaimError, StoreMismatchError
from cache.files import temporary_of, write_temporary
from cache.info import Paths
from cache.owners import Owner
from cache.plan import make_plan
from cache.reader import FeatureReader
from cache.repair import store_repair
from cache.store import FeatureStore
from cache.verify import check_files
from cache.writer import claim_shard, commit_shard

IDS = "ids.txt"  # in an exported store: the ids that were asked for


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

    Every byte is checked against its commit record on the way. Interrupted, it continues when called again; what is
    damaged of the destination is adopted again.

    Args:
        destination: a store; if there is none, an empty one like the first source is made.
        sources: stores with the same plan and fingerprint, as `extract --shard i/N` on several machines leaves them. If
            all were made by one recipe, the destination keeps it, and `tinyaudio extract` can go on with it.

    Raises:
        StoreMismatchError: a source is another extraction; the fields are named.
        CorruptShardError: a shard of a source is damaged.
    """
    stores = [FeatureStore.open(source) for source in sources]
    store = _create_like(stores[0], destination, stores[0].plan())
    for source in stores:
        if differences := compare_fields(store.header.identity(), source.header.identity()):
            raise StoreMismatchError(store.path, differences)
    store_repair(store)
    if not _adopt_recipe(store, stores):
        _replace(store.path / MADE_BY, _command("merge", destination, *sources))
    present, adopted = store.committed_shards(), []
    for source in stores:
        for shard in source.committed_shards():
            if shard not in present and shard not in adopted and _adopt(store, source, shard):
                adopted.append(shard)
    if not store.pending_shards():
        store.seal()
    return Merged(adopted=sorted(adopted), present=present, pending=store.pending_shards())


def _create_like(store: FeatureStore, destination: Paths, plan: pa.Table) -> FeatureStore:
    """Make, open or mend a store of this plan that holds the same kind of rows as another."""
    return FeatureStore.create(
        destination,
        plan=plan,
        dim=store.dim,
        encoding=store.encoding,
        rows_per_shard=store.rows_per_shard,
        calibration=store.calibration,
        fingerprint={name: value for name, value in store.fingerprint.items() if name != "store"},
    )


def _adopt_recipe(store: FeatureStore, sources: Sequence[FeatureStore]) -> bool:
    """Copy what `tinyaudio extract` needs to go on with a store, if all sources agree on it.

    Returns:
        Whether the store has it now.
    """
    if (store.path / RECIPE).is_file():
        return True
    for name in (REQUEST, RECIPE):
        found = {(source.path / name).read_bytes() if (source.path / name).is_file() else b"" for source in sources}
        if len(found) != 1 or b"" in found:
            return False
        _replace(store.path / name, found.pop().decode())
    return True


def _command(verb: str, *paths: Paths, **options: object) -> str:
    """Spell a command so that it can be typed in any folder; options that are None are left out."""
    words = ["tinyaudio", "store", verb, *(str(Path(path).absolute()) for path in paths)]
    for name, value in options.items():
        words += [] if value is None else [name, str(value)]
    return shlex.join(words)


def _replace(path: Path, text: str) -> None:
    """Write a small text file that may be there already."""
    write_temporary(path, [text.encode()], Owner.me()).replace(path)


def _adopt(store: FeatureStore, source: FeatureStore, shard: int) -> bool:
    """Copy one shard, check the copy, and commit it under the record it has."""
    claim = claim_shard(store.layout, store.header, shard)
    if claim is None:
        return False
    commit = source.commit(shard)
    paths = [store.path / name for name in (*commit.arrays, *commit.files)]
    try:
        check_sizes(source.path, commit)
        for path in paths:
            _copy(source.path / path.relative_to(store.path), temporary_of(path, claim.owner))
        _check_copy(store, source, shard, claim.owner)
        commit_shard(store.layout, claim, shard, paths, commit)
        return True
    except LostClaimError:
        return False
    finally:
        for path in paths:
            temporary_of(path, claim.owner).unlink(missing_ok=True)
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
        raise CorruptShardError(source.path, shard, f"{faults[0].path} is not what was committed ({faults[0].kind})")


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

    Interrupted or damaged, it is finished or repaired by the same call.

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
    plan = make_plan(table, rows_per_shard=reader.store.rows_per_shard, margin_frames=0)
    store = _create_like(reader.store, destination, plan)
    store_repair(store)
    options: dict[str, object] = {"--max-hours": max_hours, "--split": split, "--seed": seed or None}
    if ids is not None:
        _replace(store.path / IDS, "".join(f"{utterance_id}\n" for utterance_id in sorted(set(ids))))
        options["--ids"] = (store.path / IDS).absolute()
    _replace(store.path / MADE_BY, _command("export", source, destination, **options))
    for shard in store.pending_shards():
        _export_shard(reader, store, shard)
    store.seal()
    return store


def unknown_ids(source: Paths, ids: Collection[str]) -> list[str]:
    """List the ids that a store does not hold, in their order."""
    stored = set(FeatureReader(source).index["utterance_id"].to_pylist())
    return [utterance_id for utterance_id in dict.fromkeys(ids) if utterance_id not in stored]


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
        for position, row in zip(positions.tolist(), reader.index.take(positions).to_pylist(), strict=True):
            writer.append_rows(reader.rows_of(position), row)
