"""A feature store: ragged float frames under string ids, in a Zarr array that plain Zarr opens. See FORMAT.md."""

from cache.errors import CacheError
from cache.order import EpochOrder, epoch_order
from cache.plan import make_plan
from cache.quantize import Calibration, Moments, Quantized
from cache.reader import FeatureReader
from cache.statistics import feature_moments
from cache.store import FeatureStore
from cache.tools import store_diff, store_export, store_info, store_merge
from cache.verify import Fault, store_repair, store_verify
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
    "epoch_order",
    "feature_moments",
    "make_plan",
    "store_diff",
    "store_export",
    "store_info",
    "store_merge",
    "store_repair",
    "store_verify",
]
