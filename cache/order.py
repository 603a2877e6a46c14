"""The batch order of training: well shuffled, little padding, nearly sequential reads, the same on any number of ranks.

    order = epoch_order(reader.starts, costs, budget=4096, block_rows=store.header.block_rows, seed=0, epoch=3)
    for number, positions in order.batches(start=1200, rank=2, world=8): ...

A block is the unit that is read from disk at once. How an epoch is ordered:

1. Every block is assigned to one of `num_streams` streams, at random among blocks of similar cost.
2. Each stream shuffles its blocks and cuts them into windows of `window_blocks` blocks of similar cost.
3. The utterances of a window are split at random into pools. Each pool is sorted by cost and cut into batches.
4. The batches of a window are shuffled.
5. The streams take turns: batch `n` is from stream `n % num_streams`.

Rank `r` of `world` ranks gets batches `r, r + world, ...`. If `world` divides `num_streams`, these are the batches of
whole streams, so each block is read by one rank, and once. (The last few batches of an epoch are an exception, when
some streams have ended.)

Example: utterances u0 to u7 of costs 2 3 2 3 9 8 9 8, two in a block; `num_streams` 2, `window_blocks` 1, `budget` 18,
`seed` 1, `epoch` 0.

    1. Blocks 0 and 1 (mean cost 2.5) are similar, and so are 2 and 3 (8.5). Of each pair, each stream gets one.
    2. Windows in order of use: stream 0: block 2, block 0; stream 1: block 3, block 1.
    3. Each window is one pool here, and one batch: at most 18 = number of utterances x largest cost.
       Stream 0: u5 u4 (costs 8 9), u0 u1. Stream 1: u7 u6, u2 u3.
    4. There is nothing to shuffle in a window of one batch.
    5. Batches 0 to 3: u5 u4 | u7 u6 | u0 u1 | u2 u3.

Invariants: a pure function of (starts, costs, budget, seed, epoch); every utterance occurs once an epoch; resuming
means starting at a batch number. Memory: num_streams / world * window_blocks blocks in use at a time on each rank.
Knows nothing of features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.layout import BLOCK_ROWS

NUM_STREAMS = 8  # ranks of one machine; a power of two
WINDOW_BLOCKS = 16  # of a stream; 8 x 16 blocks are 4 GiB at float16, 2 GiB at int8, over all ranks together
WINDOWS_PER_GROUP = 8  # at most: their shuffled blocks are sorted together; more pads less and shuffles less
POOL_UTTERANCES = 1024  # sorted together; as above
RANDOM_BITS = 16  # of a sort key, that order equal costs

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The batches of one epoch, by number."""

    positions: Ints  # (N,) every utterance once, batch after batch
    bounds: Ints  # (M + 1,) batch n is positions[bounds[n]:bounds[n + 1]]
    num_streams: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> Ints:
        """Return the utterances of batch `number`, as positions in the index."""
        return self.positions[self.bounds[number] : self.bounds[number + 1]]

    def batches(self, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Ints]]:
        """Iterate over one rank's batches with their numbers, from `start` on; earlier ones are not computed."""
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of a world of {world} does not exist; it must be 0 to {world - 1}.")
        for number in range(start + (rank - start) % world, len(self), world):
            yield number, self[number]

    def padding(self, costs: Sequence[int] | Ints) -> float:
        """Compute the fraction of the batches that is padding, 0..1."""
        if not len(self):
            return 0.0
        ordered = np.asarray(costs)[self.positions]
        padded = np.maximum.reduceat(ordered, self.bounds[:-1]) * np.diff(self.bounds)
        return 1.0 - float(ordered.sum() / padded.sum())


def epoch_order(
    starts: Ints,
    costs: Sequence[int] | Ints,
    *,
    budget: int,
    seed: int,
    epoch: int,
    block_rows: int = BLOCK_ROWS,
    num_streams: int = NUM_STREAMS,
    window_blocks: int = WINDOW_BLOCKS,
) -> EpochOrder:
    """Sort the utterances of an index into the batches of one epoch.

    Args:
        starts: (N,) first row of each utterance.
        costs: (N,) size of each utterance in a batch, in any unit (frames, decoder positions), at least 1.
        budget: most that a batch may cost: its number of utterances times its largest cost.
        num_streams: ranks among which blocks can be divided; fewer are used for a corpus of few blocks.
        window_blocks: blocks of each stream that are in use at a time.

    Raises:
        ValueError: an utterance alone exceeds the budget.
    """
    costs = np.asarray(costs, dtype=np.int64)
    if not len(costs):
        return EpochOrder(np.zeros(0, np.int64), np.zeros(1, np.int64), 1)
    if costs.max() > budget or costs.min() < 1:
        raise ValueError(
            f"costs range from {costs.min()} to {costs.max()}, expected 1 to the budget of {budget}. "
            "Raise the budget, or omit the longest utterances."
        )
    block = np.asarray(starts, dtype=np.int64) // block_rows
    is_in_row_order = not (np.diff(block) < 0).any()
    if is_in_row_order:
        block = np.cumsum(np.diff(block, prepend=block[0]) != 0)  # the same as below, without a sort
    else:
        block = np.unique(block, return_inverse=True)[1].astype(np.int64)
    num_blocks = int(block.max()) + 1
    if num_blocks <= num_streams * window_blocks:  # everything fits in memory: one window
        num_streams, window_blocks = 1, num_blocks
    else:  # the largest power of two that leaves each stream at least two windows
        num_streams = max(1, min(num_streams, num_blocks // (2 * window_blocks)))
        num_streams = 1 << (num_streams.bit_length() - 1)
    mean_cost = np.bincount(block, weights=costs) / np.bincount(block)
    rng = np.random.default_rng([seed, epoch])

    stream_of_block = _assign_streams(mean_cost, num_streams, rng)
    window_of_block, stream_of_window = _make_windows(mean_cost, stream_of_block, window_blocks, rng)
    positions, sorted_costs, pool_bounds, window_of_pool = _sort_pools(window_of_block[block], costs, rng)
    ends = _cut_batches(sorted_costs, pool_bounds, budget)
    window_of_batch = window_of_pool[np.searchsorted(pool_bounds, ends, side="left") - 1]
    shuffled = _group_by(window_of_batch, rng.permutation(len(ends)))
    return _interleave(positions, ends, stream_of_window[window_of_batch], shuffled, num_streams)


def _assign_streams(mean_cost: NDArray[np.float64], num_streams: int, rng: np.random.Generator) -> Ints:
    """Choose the stream of each block by stratified sampling, so that all streams have similar costs.

    Blocks are sorted by cost; of every `num_streams` consecutive ones, each stream gets one at random.
    """
    by_cost = np.argsort(mean_cost, kind="stable")
    num_strata = -(-len(by_cost) // num_streams)
    permutations = rng.random((num_strata, num_streams)).argsort(axis=1, kind="stable")
    stream = np.empty(len(by_cost), np.int64)
    stream[by_cost] = permutations.reshape(-1)[: len(by_cost)]
    return stream


def _make_windows(
    mean_cost: NDArray[np.float64], stream_of_block: Ints, window_blocks: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Divide the shuffled blocks of each stream into windows of similar cost, numbered in order of use.

    A stream's shuffled blocks are divided into groups of several windows. A group is sorted by cost, then cut into
    windows, whose order within the group is shuffled again. Returns the window of each block and the stream of each
    window.
    """
    num_blocks = len(stream_of_block)
    order = _group_by(stream_of_block, rng.permutation(num_blocks))
    place_in_stream = _count_in_runs(stream_of_block[order])
    windows_per_group = min(WINDOWS_PER_GROUP, int(place_in_stream.max()) // (3 * window_blocks) + 1)
    group_in_stream = place_in_stream // (windows_per_group * window_blocks)
    order = order[np.lexsort((order, mean_cost[order], group_in_stream, stream_of_block[order]))]
    group = stream_of_block[order] * num_blocks + group_in_stream  # grows along `order`
    is_first = (np.diff(group, prepend=-1) != 0) | (_count_in_runs(group) % window_blocks == 0)
    window = np.cumsum(is_first) - 1
    stream_of_window, group_of_window = stream_of_block[order][is_first], group[is_first]
    shuffled = _group_by(group_of_window, rng.permutation(len(group_of_window)))
    number_of_window = np.empty(len(shuffled), np.int64)
    number_of_window[shuffled] = np.arange(len(shuffled))
    window_of_block = np.empty(num_blocks, np.int64)
    window_of_block[order] = number_of_window[window]
    return window_of_block, stream_of_window[shuffled]


def _sort_pools(window: Ints, costs: Ints, rng: np.random.Generator) -> tuple[Ints, Ints, Ints, Ints]:
    """Split the utterances of each window at random into pools, and sort each by cost, equal costs at random.

    Each utterance becomes one integer, which is sorted instead of indices: several times faster, and the same on every
    processor, since no two are equal. From the highest bit to the lowest it consists of

        pool | cost | random | utterance

    Returns:
        The utterances, pool after pool (N,), and their costs (N,); the bounds of the pools (P + 1,); the window of
        each pool (P,).
    """
    pools_in_window = -(-np.bincount(window) // POOL_UTTERANCES)
    first_pool = np.cumsum(pools_in_window) - pools_in_window
    pool = first_pool[window]
    if pools_in_window.max() > 1:
        pool += rng.integers(0, pools_in_window[window])

    utterance_bits, cost_bits = len(costs).bit_length(), int(costs.max()).bit_length()
    random_bits = min(RANDOM_BITS, 63 - int(pool.max()).bit_length() - cost_bits - utterance_bits)
    assert random_bits >= 0
    cost_shift = utterance_bits + random_bits
    pool_shift = cost_shift + cost_bits
    key = (pool << pool_shift) | (costs << cost_shift)
    key |= rng.integers(0, 1 << random_bits, len(key)) << utterance_bits
    key |= np.arange(len(key))
    key.sort()
    utterances = key & ((1 << utterance_bits) - 1)
    sorted_costs = (key >> cost_shift) & ((1 << cost_bits) - 1)

    num_pools = int(pools_in_window.sum())
    sizes = np.bincount(pool, minlength=num_pools)
    window_of_pool = np.repeat(np.arange(len(pools_in_window)), pools_in_window)
    return utterances, sorted_costs, np.append(0, np.cumsum(sizes[sizes > 0])), window_of_pool[sizes > 0]


def _cut_batches(costs: Ints, pool_bounds: Ints, budget: int) -> Ints:
    """Cut every pool into the fewest batches within the budget, by a binary search in all pools at a time.

    `costs` (N,) ascend inside each pool. Returns the end of each batch, ascending.
    """
    begin, stop = pool_bounds[:-1].copy(), pool_bounds[1:]
    ends = []
    while len(begin):
        low, high = begin + 1, stop.copy()  # the largest end within the budget lies between these
        while (low < high).any():
            middle = (low + high + 1) // 2
            fits = (middle - begin) * costs[middle - 1] <= budget
            low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
        ends.append(low)
        begin, stop = low[low < stop], stop[low < stop]
    return np.sort(np.concatenate(ends))


def _interleave(positions: Ints, ends: Ints, stream: Ints, order: Ints, num_streams: int) -> EpochOrder:
    """Let the streams take turns, and halve a few batches so that their number is a multiple of `num_streams`.

    Args:
        positions: (N,) the utterances, batch after batch.
        ends: (M,) the end of each batch in `positions`, ascending.
        stream: (M,) the stream of each batch.
        order: (M,) the batches of each stream in order of use.
    """
    order = _group_by(stream, order)
    turn = _count_in_runs(stream[order])
    order = order[np.lexsort((stream[order], turn))]
    begins, ends = np.append(0, ends[:-1])[order], ends[order]
    surplus = -len(ends) % num_streams
    halved = np.flatnonzero(ends - begins > 1)[-surplus:] if surplus else np.zeros(0, np.int64)
    middle = (begins[halved] + ends[halved]) // 2
    begins, ends = np.append(begins, middle), np.append(ends, ends[halved])
    ends[halved] = middle
    sizes = ends - begins
    bounds = np.append(0, np.cumsum(sizes))
    source = np.repeat(begins - bounds[:-1], sizes) + np.arange(len(positions))
    return EpochOrder(positions[source], bounds, num_streams)


def _group_by(group: Ints, order: Ints) -> Ints:
    """Sort a permutation by group; inside each group it keeps its order."""
    return order[np.argsort(group[order], kind="stable")]


def _count_in_runs(values: Ints) -> Ints:
    """Count up from 0 inside each run of equal values: 7 7 7 4 4 gives 0 1 2 0 1."""
    firsts = np.flatnonzero(np.diff(values, prepend=-1))
    lengths = np.diff(np.append(firsts, len(values)))
    return np.arange(len(values)) - np.repeat(firsts, lengths)
