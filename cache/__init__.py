"""A feature store: ragged float frames under string ids, in a Zarr array that plain Zarr opens. See FORMAT.md."""

from cache.errors import CacheError
from cache.plan import make_plan
from cache.quantize import Calibration, Moments, Quantized
from cache.reader import FeatureReader
from cache.store import FeatureStore
from cache.verify import Fault, store_repair, store_verify
from cache.writer import ShardWriter

__all__ = [
    "CacheError",
    "Calibration",
    "Fault",
    "FeatureReader",
    "FeatureStore",
    "Moments",
    "Quantized",
    "ShardWriter",
    "make_plan",
    "store_repair",
    "store_verify",
]
