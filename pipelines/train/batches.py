"""Batches of stage two: stored features and target token ids, in an order that is a pure function of the seed.

`TrainingBatches[i]` is the i-th batch of the whole run, so resuming only needs a number. The store's order
(`cache.order`) cuts batches by a budget of decoder positions (prompt, projected frames and target, padding included)
from exact lengths, and keeps utterances together that are close on the disk. A thread reads and pads the next batches
while the model computes. Features of a quantised store stay codes and scales until they are on the training device.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import FeatureReader, FeatureStore
from cache.order import NUM_STREAMS, WINDOW_BLOCKS, EpochOrder, epoch_order
from cache.quantize import unpack, zero_code
from pipelines.errors import RunError
from pipelines.train.targets import Targets
from tinyaudio.model.modeling_tinyaudio import IGNORED_LABEL
from tinyaudio.model.prompt import prompt_ids

BATCHES_AHEAD = 2  # prepared while the model computes; a batch of 4,096 positions is 40 MB and takes about 20 ms
BLOCKS_AHEAD = 16  # batches ahead at which their blocks are read, so that a new window of blocks causes no wait


def positions_needed(reader: FeatureReader, targets: Targets, tokenizer: Any, stack_factor: int) -> NDArray[np.int64]:
    """Count the decoder positions of every utterance: (N,)."""
    prefix, suffix = prompt_ids(tokenizer)
    projected = -(-reader.num_frames.astype(np.int64) // stack_factor)
    return len(prefix) + projected + len(suffix) + targets.lengths


def ctc_coverage(reader: FeatureReader, targets: Targets, stack_factor: int) -> str:
    """Describe how many utterances the CTC loss leaves out: those with more tokens than projected frames."""
    projected = -(-reader.num_frames.astype(np.int64) // stack_factor)
    same = np.append(targets.ids[1:] == targets.ids[:-1], False)  # between two equal tokens CTC needs a blank
    same[targets.offsets[1:] - 1] = False
    needed = targets.lengths - 1 + np.add.reduceat(same, targets.offsets[:-1], dtype=np.int64)
    return (
        f"the CTC loss is over {len(np.unique(targets.ids)) - 1:,} tokens; it leaves out "
        f"{(needed > projected).sum():,} of {len(reader):,} utterances, which have more tokens than projected frames"
    )


def collate(
    reader: FeatureReader, targets: Targets, positions: Sequence[int], dropped: Sequence[int] | None = None
) -> dict[str, Any]:
    """Read utterances and pad them into one batch.

    Args:
        dropped: number of first frames to drop from each utterance; at least one frame stays.

    Returns:
        features (B, T, D) float16, or codes as stored with scales (B, T) float16; num_frames (B,); labels (B, L), -100
        after each end; host_counts: num_frames and label lengths as numbers; utterance_ids, for messages.
    """
    rows = reader.read_rows(positions)
    firsts = [min(drop, len(row.features) - 1) for drop, row in zip(dropped or [0] * len(rows), rows, strict=True)]
    counts = [len(row.features) - first for first, row in zip(firsts, rows, strict=True)]
    features = np.zeros((len(rows), max(counts), rows[0].features.shape[1]), rows[0].features.dtype)
    labels, lengths = pad_labels(targets, positions)
    scales = None if rows[0].scales is None else np.zeros(features.shape[:2], np.float16)
    for i, row in enumerate(rows):
        features[i, : counts[i]] = row.features[firsts[i] :]
        if scales is not None and row.scales is not None:
            scales[i, : counts[i]] = row.scales[firsts[i] :]
    batch: dict[str, Any] = {
        "features": torch.from_numpy(features),
        "num_frames": torch.tensor(counts),
        "labels": labels,
        "host_counts": (counts, lengths),
        "utterance_ids": reader.column("utterance_id").take(np.asarray(positions)).to_pylist(),
    }
    return batch if scales is None else {**batch, "scales": torch.from_numpy(scales)}


def pad_labels(targets: Targets, positions: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Pad token ids to (B, L) int64, -100 after each end; also return their lengths."""
    lengths = [len(targets[position]) for position in positions]
    labels = torch.full((len(lengths), max(lengths)), IGNORED_LABEL)
    for row, position, length in zip(labels, positions, lengths, strict=True):
        row[:length] = torch.from_numpy(targets[position])
    return labels, lengths


class Dequantizer:
    """Gives the features of a batch: codes become float32 on the device they are on, float16 stays as it is."""

    def __init__(self, reader: FeatureReader) -> None:
        calibration, self._bits = reader.calibration, reader.store.header.bits or 8
        self._mean_std = None if calibration is None else torch.from_numpy(calibration.array)  # (2, D)

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        """Return (B, T, D); dequantized frames after each end are zero."""
        features: Tensor = batch["features"]
        if self._mean_std is None:
            return features
        self._mean_std = self._mean_std.to(features.device)
        mean, std = self._mean_std
        codes = features
        if self._bits < 8:
            codes = features.new_empty((*features.shape[:2], len(mean)))
            unpack(features, codes, self._bits)
        floats = (codes.float() - zero_code(self._bits)) * batch["scales"].float()[:, :, None] * std + mean
        frame_numbers = torch.arange(features.shape[1], device=features.device)
        return floats * (frame_numbers[None, :] < batch["num_frames"][:, None])[:, :, None]


class TrainingBatches(torch.utils.data.Dataset[dict[str, Any]]):
    """All batches of a run, by number."""

    def __init__(
        self,
        reader: FeatureReader,
        targets: Targets,
        costs: NDArray[np.int64],
        *,
        budget: int,
        seed: int,
        num_batches: int,
        chosen: NDArray[np.int64] | None = None,
        jitter_frames: int = 0,
        world_size: int = 1,
        is_pinned: bool = False,
    ) -> None:
        """Check that every utterance fits the budget.

        Args:
            costs: (N,) decoder positions of each utterance.
            budget: decoder positions in one batch, padding included.
            chosen: rows of the index to train on; None for all.
            jitter_frames: drop up to this many first frames of an utterance, at random, so that the projector sees the
                same sounds at every position of its stack.
            world_size: number of processes; each uses every world_size-th batch and reads those ahead.
            is_pinned: put batches into page-locked memory, from which copies to a GPU run in the background.

        Raises:
            RunError: the split is empty, or one utterance alone exceeds the budget.
        """
        if not len(reader):
            raise RunError(
                f"store {str(reader.store.path)!r} has no utterances of split {reader.split!r}; run `tinyaudio extract`"
            )
        if int(costs.max()) > budget:
            raise RunError(
                f"the longest utterance needs {int(costs.max())} decoder positions; expected at most {budget}. "
                "Raise train.batch_tokens or lower corpus.max_duration_s"
            )
        self.reader, self.targets, self.costs = reader, targets, costs
        self.budget, self.seed, self.num_batches = budget, seed, num_batches
        self.chosen = np.arange(len(reader)) if chosen is None else chosen
        self.num_ahead = BATCHES_AHEAD
        self.waited_s = 0.0  # time that the training loop has waited for batches
        self._durations = np.asarray(reader.column("duration_s"), dtype=np.float64)
        self._world_size, self._is_pinned, self._jitter_frames = world_size, is_pinned, jitter_frames
        self._orders: dict[int, EpochOrder] = {}
        self._lengths: list[int] = []  # batches of each epoch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return self.num_batches

    def coverage(self, accumulate: int) -> str:
        """Describe how much audio all batches are, and which share of the chosen utterances that is.

        Args:
            accumulate: batches in one step.
        """
        epochs, epoch_h = self.num_batches / self._length(0), float(self._durations[self.chosen].sum()) / 3600
        share = f"{epochs:.1f} epochs" if epochs >= 1 else f"{100 * epochs:.0f} %"
        size = f"{self.budget:,} positions" + ("" if accumulate == 1 else f" x {accumulate} batches")
        return (
            f"{self.num_batches // accumulate:,} steps of {size} are about {epochs * epoch_h:,.1f} h of audio: {share} "
            f"of the {epoch_h:,.1f} h in split {self.reader.split!r}"
        )

    def progress(self) -> dict[str, Any]:
        """Return what a resumed run needs: the number of batches of each epoch so far, and of utterances."""
        return {"batches_per_epoch": list(self._lengths), "utterances_in_split": len(self.reader)}

    def restore(self, progress: dict[str, Any]) -> None:
        """Continue from `progress` without computing the orders of finished epochs.

        Raises:
            RunError: the split has grown or shrunk, which would change every batch.
        """
        before = progress.get("utterances_in_split", len(self.reader))
        if before != len(self.reader):
            raise RunError(
                f"split {self.reader.split!r} of {str(self.reader.store.path)!r} has {len(self.reader):,} utterances; "
                f"expected {before:,} as at the last checkpoint, since the order depends on them. Start a new --run"
            )
        self._lengths = list(progress.get("batches_per_epoch", []))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Return a batch as `collate` does, with `num_tokens` (decoder positions), `num_targets` and `duration_s`."""
        started = time.monotonic()
        wanted = range(number, min(number + 1 + self.num_ahead * self._world_size, self.num_batches), self._world_size)
        self._ahead = {n: self._ahead.get(n) or self._pool.submit(self._make, n) for n in wanted}
        batch = self._ahead.pop(number).result()
        self.waited_s += time.monotonic() - started
        return batch

    def _make(self, number: int) -> dict[str, Any]:
        positions, later = self.positions(number), number + BLOCKS_AHEAD * self._world_size
        if later < self.num_batches:
            self.reader.prefetch(self.positions(later))
        # The jitter of a batch depends on the seed and its number alone.
        dropped = np.random.default_rng((self.seed, number)).integers(0, self._jitter_frames + 1, len(positions))
        batch = collate(self.reader, self.targets, positions, dropped.tolist())
        if self._is_pinned:
            batch = {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
        batch["num_tokens"] = int(self.costs[positions].sum())
        batch["num_targets"] = int(self.targets.lengths[positions].sum())
        batch["duration_s"] = float(self._durations[positions].sum())
        return batch

    def positions(self, number: int) -> list[int]:
        """Return the utterances of batch `number`, as rows of the reader's index."""
        epoch, first = 0, 0
        while number >= first + self._length(epoch):
            first += self._length(epoch)
            epoch += 1
        return [int(position) for position in self.chosen[self._order(epoch)[number - first]]]

    def _length(self, epoch: int) -> int:
        while len(self._lengths) <= epoch:
            self._lengths.append(len(self._order(len(self._lengths))))
        return self._lengths[epoch]

    def _order(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch; the previous one is kept, since reading ahead alternates between two."""
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = epoch_order(
                self.reader.starts[self.chosen],
                self.costs[self.chosen],
                budget=self.budget,
                seed=self.seed,
                epoch=epoch,
                block_rows=self.reader.store.header.block_rows,
            )
        return self._orders[epoch]


def open_training_reader(store: FeatureStore, split: str, world_size: int) -> FeatureReader:
    """Open a split with memory for all blocks that training uses at a time, and for those read ahead.

    These are one window of blocks for each stream, and the next window for up to four streams that change theirs.
    """
    streams = max(1, NUM_STREAMS // world_size)
    blocks = WINDOW_BLOCKS * (streams + min(streams, 4))
    size_bytes = blocks * store.header.block_rows * store.header.bytes_per_row
    return FeatureReader(store, split=split, cache_bytes=size_bytes)


def longest_batch(costs: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Choose the longest utterances, as many as fill one batch: the batch that needs most memory."""
    return np.sort(np.argsort(costs, kind="stable")[-max(1, budget // int(costs.max())) :])


def cut_by_budget(ordered: NDArray[np.int64], costs: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Cut utterances of ascending cost into batches whose padded size, count times longest, fits the budget."""
    batches, start = [], 0
    for stop in range(1, len(ordered) + 1):
        if stop == len(ordered) or (stop - start + 1) * costs[ordered[stop]] > budget:
            batches.append(ordered[start:stop])
            start = stop
    return batches
