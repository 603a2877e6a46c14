"""Undo damage: exactly the damaged shards become pending again, so that the next extraction makes them anew.

Invariants: a sound shard is never touched; one that has lost nothing but its record gets it back from under the seal; a
file that is merely out of reach is not taken for damaged.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from cache.claims import Claim
from cache.commits import Commit, check_commit, committed_shards, forget_damage, noted_damage, sealed_commits
from cache.create import FOLDERS, encode_calibration
from cache.errors import CorruptShardError
from cache.files import exclusive, is_lost, place, remove
from cache.store import FeatureStore
from cache.verify import (
    NUM_THREADS,
    Fault,
    check_files,
    check_shard,
    check_shards,
    foreign_faults,
    seal_faults,
    store_faults,
)


def store_repair(store: FeatureStore, *, deep: bool | None = None) -> list[Fault]:
    """Take back the commits of damaged shards, so that they are pending again; sound ones are not touched.

    Lost or damaged records of sound shards come back from under the seal, and a lost calibration from its copy.

    Args:
        deep: as `find_faults`.

    Returns:
        The faults found. Shards with a fault that `is_lost` are pending now; the plan and the metadata are mended by
        `FeatureStore.create`.
    """
    for folder in FOLDERS:
        (store.path / folder).mkdir(exist_ok=True)
    noted = noted_damage(store.layout)
    restored = _restore_records(store)
    shards = committed_shards(store.layout)
    faults = [*store_faults(store), *seal_faults(store, shards)]
    for found in check_shards(store, shards, deep):
        faults += found
    damaged = sorted({fault.shard for fault in faults if fault.shard is not None and fault.is_lost})
    if damaged or any(fault.kind == "seal" for fault in faults):
        _take_back(store, damaged)
    _restore_calibration(store)
    forget_damage(store.layout, noted)
    return [*restored, *faults]


def _restore_records(store: FeatureStore) -> list[Fault]:
    """Put back lost and damaged commit records from under the seal, where the files of the shard are all sound.

    Returns:
        The faults that are undone by that.
    """
    lost = [commit for commit in sealed_commits(store.layout) if not _has_record(store, commit.shard)]
    with ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="restore") as pool:
        return [fault for fault in pool.map(lambda commit: _restore_record(store, commit), lost) if fault is not None]


def _has_record(store: FeatureStore, shard: int) -> bool:
    try:
        check_commit(store.layout, store.header, shard, store.layout.commit(shard).read_bytes())
    except (CorruptShardError, FileNotFoundError):
        return False
    except OSError as error:
        return not is_lost(error)
    return True


def _restore_record(store: FeatureStore, commit: Commit) -> Fault | None:
    path = store.layout.commit(commit.shard)
    if commit.shard not in range(store.num_shards) or any(foreign_faults(store, commit.shard, commit)):
        return None
    claim = Claim.take(store.layout, commit.shard)
    if claim is None:
        return None
    try:
        files = {name: store.path / name for name in (*commit.arrays, *commit.files)}
        if check_files(store, commit, files, deep=True) or _has_record(store, commit.shard):
            return None
        with exclusive(store.layout.lock):
            remove(path)
            place(path, [commit.encode()], claim.owner)
    finally:
        claim.release()
    name = path.relative_to(store.path).as_posix()
    message = f"{name} (shard {commit.shard}): it was lost, and is restored from commits.jsonl. Nothing is left to do."
    return Fault(kind="restored", shard=commit.shard, path=name, message=message)


def _restore_calibration(store: FeatureStore) -> None:
    """Write the calibration's file again from its copy in the header."""
    if store.header.calibration_id is None or store.calibration_file() is not None:
        return
    if (copy := store.calibration_copy()) is not None:
        path = store.layout.calibration
        path.parent.mkdir(exist_ok=True)
        with exclusive(store.layout.lock):
            remove(path)
            place(path, [encode_calibration(copy)])


def _take_back(store: FeatureStore, shards: list[int]) -> None:
    """Unseal, and remove shards: the record first, so that no reader meets half a shard."""
    layout = store.layout
    with exclusive(layout.lock):
        for path in (layout.sealed, layout.sealed_commits, layout.sealed_index):
            remove(path)
        for shard in shards:
            if not layout.commit(shard).exists() or not any(
                fault.is_lost for fault in check_shard(store, shard, deep=True)
            ):
                continue  # another process has made it again in the meantime
            remove(layout.commit(shard))
            for path in layout.files_of(shard, store.header).values():
                remove(path)
