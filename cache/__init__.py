"""A feature store: ragged float frames under string ids, in a Zarr array that plain Zarr opens. See FORMAT.md.

    plan = make_plan(table)                                     which utterance goes where, from lengths alone
    store = FeatureStore.create(path, plan=plan, ...)           create or resume; a different store is refused
    for shard in store.pending_shards():
        if (writer := store.write_shard(shard)) is not None:    None: finished, or claimed by another writer
            with writer: writer.append(...) or writer.quarantine(...)
    store.seal()

    reader = FeatureReader(path, split="train")                 checked frames, by position in reader.index
    order = epoch_order(reader.starts, costs, ...)              the batches of an epoch, on any number of ranks

    store_verify, store_repair                                  find damage; make exactly the damaged shards pending
    store_info, store_diff, store_merge, store_export           describe, compare, merge, export a part

Knows nothing of speech, models or torch.
"""

from cache.copies import store_export, store_merge
from cache.create import compare_fields
from cache.errors import CacheError
from cache.info import store_diff, store_info
from cache.order import EpochOrder, epoch_order
from cache.plan import make_plan
from cache.quantize import Calibration, Moments, Quantized
from cache.reader import FeatureReader
from cache.repair import store_repair
from cache.store import FeatureStore
from cache.verify import Fault, find_faults, store_verify
from cache.writer import ShardWriter

__all__ = [
    "CacheError",
    "Calibration",
    "EpochOrder",
    "Fault",
    "FeatureReader",
    "FeatureStore",
    "Moments",
    "Quantized",
    "ShardWriter",
    "compare_fields",
    "epoch_order",
    "find_faults",
    "make_plan",
    "store_diff",
    "store_export",
    "store_info",
    "store_merge",
    "store_repair",
    "store_verify",
]
