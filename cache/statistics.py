"""Exact mean and standard deviation of every dimension over a store, in one sequential pass.

For a projector that starts by whitening its input. Knows nothing of projectors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cache.quantize import Moments, Quantized
from cache.reader import FeatureReader

UTTERANCES_AT_ONCE = 64


def feature_moments(reader: FeatureReader, *, progress: Callable[[int], None] | None = None) -> Moments:
    """Accumulate count, mean and standard deviation per dimension over all utterances of a reader.

    Args:
        reader: a store, or one split of it; each block is read once.
        progress: called now and then with the frames counted since the last call.

    Raises:
        CorruptShardError: the bytes are not those that were committed.
    """
    moments = Moments(reader.store.dim)
    for first in range(0, len(reader), UTTERANCES_AT_ONCE):
        positions = range(first, min(first + UTTERANCES_AT_ONCE, len(reader)))
        reader.prefetch(np.arange(positions.stop, min(positions.stop + UTTERANCES_AT_ONCE, len(reader))))
        for stored in reader.read(positions):
            moments.update(stored.dequantize() if isinstance(stored, Quantized) else stored)
        if progress is not None:
            progress(int(reader.num_frames[positions.start : positions.stop].sum()))
    return moments
