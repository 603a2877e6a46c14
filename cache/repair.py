"""Repairing a store: exactly the damaged shards become pending again, so that the next extraction makes them again.

Invariants: an intact shard is never touched; a file that cannot be reached is not treated as damaged.
"""

from __future__ import annotations

from cache.commits import noted_damage
from cache.create import FOLDERS
from cache.files import exclusive, remove
from cache.store import FeatureStore
from cache.verify import Fault, check_shard, store_verify


def store_repair(store: FeatureStore, *, deep: bool | None = None) -> list[Fault]:
    """Remove damaged shards, so that they are pending again, and return the faults found; `deep` as in `find_faults`.

    Shards with a fault that `is_lost` are pending now; plan and metadata are repaired by `FeatureStore.create`.
    """
    for folder in FOLDERS:
        (store.path / folder).mkdir(exist_ok=True)
    layout = store.layout
    noted = noted_damage(layout)
    faults = store_verify(store, deep=deep)
    damaged = sorted({fault.shard for fault in faults if fault.shard is not None and fault.is_lost})
    if damaged or any(fault.kind == "seal" for fault in faults):
        with exclusive(layout.lock):
            for path in (layout.sealed, layout.sealed_commits, layout.sealed_index):
                remove(path)
            for shard in damaged:
                if not layout.commit(shard).exists():
                    continue
                if not any(fault.is_lost for fault in check_shard(store, shard, deep=True)):
                    continue  # another process has made it again in the meantime, or only the seal was damaged
                remove(layout.commit(shard))  # first, so that no reader finds half a shard
                for path in layout.files_of(shard, store.header).values():
                    remove(path)
    for shard in noted.union(damaged) - {fault.shard for fault in faults if not fault.is_lost}:
        (layout.damaged / f"{shard:06d}").unlink(missing_ok=True)
    return faults
