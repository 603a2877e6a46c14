"""The order of training: well shuffled, little padded, read nearly sequentially, and the same on any number of ranks.

    order = epoch_order(reader.starts, costs, budget=4096, block_rows=store.header.block_rows, seed=0, epoch=3)
    for number, positions in order.batches(start=1200, rank=2, world=8): ...

In each epoch the blocks are dealt to canonical streams. Each stream shuffles its blocks and takes them by the window:
some blocks of about one length. The utterances of a window are parted at random into pools,
each pool sorted by cost and cut into batches by the budget, and the batches of the window shuffled. Batch `n` is of
stream `n % num_streams`, so rank `r` of any `world` that divides the streams finds all it needs in its own blocks: each
block is read by one rank, and once (but for the last few batches of an epoch, where some streams have run dry).

Invariants: a pure function of (starts, costs, budget, seed, epoch); every utterance occurs once an epoch; to resume is
to count. Memory: num_streams / world * window_blocks blocks in use at a time on each rank. Knows nothing of features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.layout import BLOCK_ROWS

NUM_STREAMS = 8  # ranks of one machine; a power of two
WINDOW_BLOCKS = 16  # of a stream; 8 x 16 blocks are 4 GiB at float16, 2 GiB at int8, over all ranks together
WINDOWS_TOGETHER = 8  # most windows that share out their shuffled blocks by length; more pads less and shuffles less
POOL_UTTERANCES = 1024  # sorted together; as above

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
        """Give the utterances of batch `number`, as positions in the index."""
        return self.positions[self.bounds[number] : self.bounds[number + 1]]

    def batches(self, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[tuple[int, Ints]]:
        """Go through one rank's batches with their numbers, from `start` on; nothing is replayed."""
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of a world of {world} does not exist; it must be 0 to {world - 1}.")
        for number in range(start + (rank - start) % world, len(self), world):
            yield number, self[number]

    def padding(self, costs: Sequence[int] | Ints) -> float:
        """Compute the share of the batches that is padding, 0..1."""
        if not len(self):
            return 0.0
        ordered = np.asarray(costs)[self.positions]
        padded = np.maximum.reduceat(ordered, self.bounds[:-1]) * np.diff(self.bounds)
        return 1.0 - float(ordered.sum() / padded.sum())

    def digest(self) -> str:
        """Compute the sha256 over all batches: equal digests, equal epochs."""
        digest = hashlib.sha256(self.bounds.astype("<i8").tobytes())
        digest.update(self.positions.astype("<i8").tobytes())
        return digest.hexdigest()


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
    """Put the utterances of an index into the batches of one epoch.

    Args:
        starts: (N,) first row of each utterance.
        costs: (N,) what each takes in a batch, in any unit (frames, decoder positions), at least 1.
        budget: most that a batch may take: its number of utterances times its largest cost.
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
            f"costs reach from {costs.min()} to {costs.max()} and a batch may take {budget}: costs must "
            "be from 1 to the budget. Raise the budget, or leave the longest utterances out."
        )
    block, num_blocks = _blocks(starts, block_rows)
    if num_blocks <= num_streams * window_blocks:  # all of it fits in memory: shuffle all of it
        num_streams, window_blocks = 1, num_blocks
    else:
        num_streams = _usable_streams(num_streams, num_blocks, window_blocks)
    mean_cost = np.bincount(block, weights=costs) / np.bincount(block)
    rng = np.random.default_rng([seed, epoch])
    stream_of_block = _deal(mean_cost, num_streams, rng)
    window_of_block, stream_of_window = _windows(mean_cost, stream_of_block, window_blocks, rng)
    positions, sorted_costs, pools, pool_windows = _pools(window_of_block[block], costs, rng)
    ends = _cut(sorted_costs, pools, budget)
    stream_of_batch, sequence = _shuffle_batches(ends, pools, pool_windows, stream_of_window, rng)
    return _interleave(positions, ends, stream_of_batch, sequence, num_streams)


def _blocks(starts: Ints, block_rows: int) -> tuple[Ints, int]:
    """Number the blocks that occur: each utterance's block, and how many there are."""
    block = np.asarray(starts, dtype=np.int64) // block_rows
    if (np.diff(block) < 0).any():  # not a whole index
        block = np.unique(block, return_inverse=True)[1].astype(np.int64)
    else:
        block = np.cumsum(np.diff(block, prepend=block[0]) != 0)
    return block, int(block.max()) + 1


def _usable_streams(num_streams: int, num_blocks: int, window_blocks: int) -> int:
    """Take the largest power of two that leaves each stream several windows."""
    most = max(1, min(num_streams, num_blocks // (2 * window_blocks)))
    return 1 << (most.bit_length() - 1)


def _deal(mean_cost: NDArray[np.float64], num_streams: int, rng: np.random.Generator) -> Ints:
    """Give each stream one block at random of every few of about one length, so that all streams are alike."""
    order = np.argsort(mean_cost, kind="stable")
    hands = rng.random((-(-len(order) // num_streams), num_streams)).argsort(axis=1, kind="stable")
    stream = np.empty(len(order), np.int64)
    stream[order] = hands.reshape(-1)[: len(order)]
    return stream


def _windows(
    mean_cost: NDArray[np.float64], stream_of_block: Ints, window_blocks: int, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Gather shuffled blocks of each stream into windows of about one length, numbered in order of use.

    Returns:
        The window of each block, and the stream of each window.
    """
    num_blocks = len(stream_of_block)
    order = _grouped(stream_of_block, rng.permutation(num_blocks))
    rank = _rank_in_group(stream_of_block[order])
    together = min(WINDOWS_TOGETHER, int(rank.max()) // (3 * window_blocks) + 1)
    super_window = rank // (together * window_blocks)
    order = order[np.lexsort((order, mean_cost[order], super_window, stream_of_block[order]))]
    group = stream_of_block[order] * num_blocks + super_window
    changes = (np.diff(group, prepend=-1) != 0) | (_rank_in_group(group) % window_blocks == 0)
    window = np.cumsum(changes) - 1
    stream_of_window, group_of_window = stream_of_block[order][changes], group[changes]
    shuffled = _grouped(group_of_window, rng.permutation(len(group_of_window)))  # windows change places in their group
    renumbered = np.empty(len(shuffled), np.int64)
    renumbered[shuffled] = np.arange(len(shuffled))
    window_of_block = np.empty(num_blocks, np.int64)
    window_of_block[order] = renumbered[window]
    return window_of_block, stream_of_window[shuffled]


def _pools(window: Ints, costs: Ints, rng: np.random.Generator) -> tuple[Ints, Ints, Ints, Ints]:
    """Part the utterances of each window at random into pools, and sort each by cost, equal costs at random.

    Sorts plain numbers (pool, cost, chance, utterance from the highest bit to the lowest): several times faster than
    sorting indices, and the same on every processor since no two are equal.

    Returns:
        The utterances, pool after pool, and their costs; the bounds of the pools (P + 1,); the window of each (P,).
    """
    parts = -(-np.bincount(window) // POOL_UTTERANCES)
    first = np.cumsum(parts) - parts
    pool = first[window]
    if parts.max() > 1:
        pool += rng.integers(0, parts[window])
    cost_bits, utterance_bits = int(costs.max()).bit_length(), len(costs).bit_length()
    chance_bits = min(16, 63 - int(pool.max()).bit_length() - cost_bits - utterance_bits)
    assert chance_bits >= 0
    key = (pool << cost_bits | costs) << chance_bits + utterance_bits
    key |= rng.integers(0, 1 << chance_bits, len(key)) << utterance_bits | np.arange(len(key))
    key.sort()
    ordered = key & (1 << utterance_bits) - 1
    sorted_costs = key >> chance_bits + utterance_bits & (1 << cost_bits) - 1
    sizes = np.bincount(pool, minlength=int(parts.sum()))
    window_of_pool = np.repeat(np.arange(len(parts)), parts)
    return ordered, sorted_costs, np.append(0, np.cumsum(sizes[sizes > 0])), window_of_pool[sizes > 0]


def _cut(costs: Ints, pools: Ints, budget: int) -> Ints:
    """Cut every pool into the fewest batches within the budget, all pools at a time.

    Args:
        costs: (N,) ascending inside each pool.

    Returns:
        The end of each batch, ascending.
    """
    begin, stop = pools[:-1].copy(), pools[1:]
    ends = []
    while len(begin):
        low, high = begin + 1, stop.copy()
        while (low < high).any():  # the largest end that the budget allows
            middle = (low + high + 1) // 2
            fits = (middle - begin) * costs[middle - 1] <= budget
            low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
        ends.append(low)
        begin, stop = low[low < stop], stop[low < stop]
    return np.sort(np.concatenate(ends))


def _shuffle_batches(
    ends: Ints, pools: Ints, pool_windows: Ints, stream_of_window: Ints, rng: np.random.Generator
) -> tuple[Ints, Ints]:
    """Shuffle the batches inside each window.

    Returns:
        The stream of each batch, and the batches in order of stream and use.
    """
    window = pool_windows[np.searchsorted(pools, ends, side="left") - 1]
    stream = stream_of_window[window]
    order = _grouped(window, rng.permutation(len(ends)))
    return stream, order[np.argsort(stream[order], kind="stable")]


def _interleave(positions: Ints, ends: Ints, stream: Ints, sequence: Ints, num_streams: int) -> EpochOrder:
    """Deal the batches of all streams in turn, and halve a few so that an epoch ends with all streams level."""
    begins = np.append(0, ends[:-1])[sequence]
    ends = ends[sequence]
    turn = _rank_in_group(stream[sequence])
    order = np.lexsort((stream[sequence], turn))
    begins, ends = begins[order], ends[order]
    surplus = -len(ends) % num_streams
    halved = np.flatnonzero(ends - begins > 1)[-surplus:] if surplus else np.zeros(0, np.int64)
    middle = (begins[halved] + ends[halved]) // 2
    begins, ends = np.append(begins, middle), np.append(ends, ends[halved])
    ends[halved] = middle
    sizes = ends - begins
    bounds = np.append(0, np.cumsum(sizes))
    taken = np.repeat(begins - bounds[:-1], sizes) + np.arange(len(positions))
    return EpochOrder(positions[taken], bounds, num_streams)


def _grouped(group: Ints, order: Ints) -> Ints:
    """Sort a permutation by group, keeping its order inside each."""
    return order[np.argsort(group[order], kind="stable")]


def _rank_in_group(group: Ints) -> Ints:
    """Count up inside each run of equal values."""
    firsts = np.flatnonzero(np.diff(group, prepend=-1))
    lengths = np.diff(np.append(firsts, len(group)))
    return np.arange(len(group)) - np.repeat(firsts, lengths)
