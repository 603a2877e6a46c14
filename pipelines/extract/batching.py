"""Group the recordings of one shard into encoder batches with little padding.

A grouping depends on lengths and ids alone, so a stored row does not depend on which process computed it, or when.
"""

import math
from collections.abc import Mapping

from tinyaudio.model.audio import SAMPLING_RATE

BATCH_COST_S = 2.0  # seconds of audio that could be encoded while a batch is started; keeps padding below 3 %


def cut_batches(lengths: Mapping[str, int], batch_s: float) -> list[list[str]]:
    """Group recordings of similar length at the least cost: padded samples, and a fixed cost per batch.

    Dynamic programming over the recordings in order of length: `best[n]` is the least cost of the n shortest, and
    `start_of[n]` is the first recording of the last batch among them.

    Args:
        lengths: samples by id.
        batch_s: seconds of audio in one batch, padding included; a longer recording is a batch of its own.

    Returns:
        Ids, longest last.
    """
    ordered = sorted(lengths.items(), key=lambda item: (item[1], item[0]))
    sizes = [length for _, length in ordered]
    best, start_of = [0.0], [0]
    for end in range(1, len(sizes) + 1):
        longest, least, start = sizes[end - 1], math.inf, end - 1
        while start >= 0 and (start == end - 1 or longest * (end - start) <= batch_s * SAMPLING_RATE):
            cost = best[start] + longest * (end - start) + BATCH_COST_S * SAMPLING_RATE
            if cost < least:
                least, chosen = cost, start
            start -= 1
        best.append(least)
        start_of.append(chosen)
    batches, end = [], len(sizes)
    while end:
        batches.append([source_id for source_id, _ in ordered[start_of[end] : end]])
        end = start_of[end]
    return batches[::-1]
