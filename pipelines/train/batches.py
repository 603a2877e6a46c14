"""Batches of stage two: stored features and tokenised transcripts, in an order that is a pure function of the seed.

`TrainingBatches[i]` is the i-th batch of a whole run, whatever came before: resuming is counting. The store's own order
(`cache.order`) cuts batches by a budget of decoder positions (prompt, projected frames and target, padding included)
from lengths that it knows exactly, and keeps together what lies together on the disk. A thread reads and pads the next
batches while the model works on this one. Features of an int8 store leave here as codes and scales, and become features
on the training device.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import FeatureReader, FeatureStore
from cache.order import NUM_STREAMS, WINDOW_BLOCKS, EpochOrder, epoch_order
from pipelines.errors import RunError
from pipelines.train.derived import remembered
from tinyaudio.model.modeling_tinyaudio import IGNORED_LABEL
from tinyaudio.model.prompt import many_transcript_ids, prompt_ids

BATCHES_AHEAD = 2  # batches made while the model works; a batch of 4,096 positions is 40 MB and takes some 20 ms
BLOCKS_AHEAD = 16  # batches of which the blocks are read in advance, so that a new window of blocks is no stall
TOKENIZED_AT_ONCE = 16_384  # transcripts in one call; a Python number takes 36 bytes where the array takes 4


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Token ids of all transcripts, flat: utterance i is ids[offsets[i]:offsets[i + 1]], end-of-text included."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]

    def __getitem__(self, position: int) -> NDArray[np.int32]:
        return self.ids[self.offsets[position] : self.offsets[position + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


def tokenize(tokenizer: Any, transcripts: Sequence[str]) -> Targets:
    """Tokenise transcripts as `prompt.transcript_ids` does, on all threads."""
    ids, lengths = [np.zeros(0, np.int32)], [np.zeros(1, np.int64)]
    with _threads_of_the_tokenizer():
        for first in range(0, len(transcripts), TOKENIZED_AT_ONCE):
            rows = many_transcript_ids(tokenizer, transcripts[first : first + TOKENIZED_AT_ONCE])
            ids.append(np.concatenate([np.asarray(row, np.int32) for row in rows]))
            lengths.append(np.asarray([len(row) for row in rows], np.int64))
    return Targets(ids=np.concatenate(ids), offsets=np.cumsum(np.concatenate(lengths)))


@contextlib.contextmanager
def _threads_of_the_tokenizer() -> Iterator[None]:
    """Let the Rust tokenizer use its threads; afterwards the setting is back, and with it safety for who forks."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def stored_targets(reader: FeatureReader, tokenizer: Any, say: Callable[[str], None] = print) -> Targets:
    """Tokenise the transcripts of a split, once for a store: every start, rank and cell needs all of them."""

    def work_out() -> dict[str, NDArray[Any]]:
        targets = tokenize(tokenizer, reader.column("transcript").to_pylist())
        return {"ids": targets.ids, "offsets": targets.offsets}

    depends_on = {"split": reader.split, "tokenizer": tokenizer_digest(tokenizer), "targets": 1}
    return Targets(**remembered(reader.store, "token-ids", depends_on, work_out, say))


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest what decides token ids: the tokenizer with its added tokens, and the one that ends a transcript."""
    whole = f"{tokenizer.backend_tokenizer.to_str()}\n{tokenizer.eos_token_id}"
    return hashlib.sha256(whole.encode()).hexdigest()


def positions_needed(reader: FeatureReader, targets: Targets, tokenizer: Any, stack_factor: int) -> NDArray[np.int64]:
    """Count the decoder positions of every utterance: (N,)."""
    prefix, suffix = prompt_ids(tokenizer)
    projected = -(-reader.num_frames.astype(np.int64) // stack_factor)
    return len(prefix) + projected + len(suffix) + targets.lengths


def collate(
    reader: FeatureReader, targets: Targets, positions: Sequence[int], dropped: Sequence[int] | None = None
) -> dict[str, Any]:
    """Read utterances and pad them into one batch.

    Args:
        dropped: first frames of each utterance to leave out; one frame always stays.

    Returns:
        features (B, T, D) float16, or int8 with scales (B, T) float16; num_frames (B,); labels (B, L), -100 behind each
        end; host_counts, num_frames and label lengths as numbers; utterance_ids, for messages.
    """
    rows = reader.read_rows(positions)
    firsts = [min(drop, len(row.features) - 1) for drop, row in zip(dropped or [0] * len(rows), rows, strict=True)]
    counts = [len(row.features) - first for first, row in zip(firsts, rows, strict=True)]
    features = np.zeros((len(rows), max(counts), reader.store.dim), rows[0].features.dtype)
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
    """Pad token ids into (B, L) int64, -100 behind each end; and give their lengths."""
    lengths = [len(targets[position]) for position in positions]
    labels = torch.full((len(lengths), max(lengths)), IGNORED_LABEL)
    for row, position, length in zip(labels, positions, lengths, strict=True):
        row[:length] = torch.from_numpy(targets[position])
    return labels, lengths


def dequantize(codes: Tensor, scales: Tensor, num_frames: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Turn int8 codes into features on whatever device they are.

    Args:
        codes: (B, T, D) int8. scales: (B, T). num_frames: (B,). mean, std: (D,) of the store's calibration.

    Returns:
        (B, T, D) float32, zero behind each end.
    """
    features = codes.float() * scales.float()[:, :, None] * std + mean
    valid = torch.arange(codes.shape[1], device=codes.device)[None, :] < num_frames[:, None]
    return features * valid[:, :, None]


class Dequantizer:
    """Give the features of a batch: dequantised on their device if they are codes, untouched if not."""

    def __init__(self, reader: FeatureReader) -> None:
        calibration = reader.calibration
        self._mean_std = None if calibration is None else torch.from_numpy(calibration.array)

    def __call__(self, batch: dict[str, Any]) -> Tensor:
        features: Tensor = batch["features"]
        if self._mean_std is None:
            return features
        self._mean_std = self._mean_std.to(features.device)
        return dequantize(features, batch["scales"], batch["num_frames"], self._mean_std[0], self._mean_std[1])


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
            jitter_frames: leave out up to so many first frames of an utterance, so that the projector, which stacks
                frames, meets the same sounds at every place of its stack.
            world_size: this process uses every so many-th batch; what it reads ahead follows that.
            is_pinned: put batches into page-locked memory, from which a GPU copies by itself.

        Raises:
            RunError: an empty split, or an utterance that alone exceeds the budget.
        """
        if not len(reader):
            raise RunError(
                f"{str(reader.store.path)!r} holds no utterance of split {reader.split!r}; run `tinyaudio extract`"
            )
        if int(costs.max()) > budget:
            raise RunError(
                f"the longest utterance needs {int(costs.max())} decoder positions and train.batch_tokens is {budget}; "
                "raise it, or lower corpus.max_duration_s"
            )
        self.reader, self.targets, self.costs = reader, targets, costs
        self.budget, self.seed, self.num_batches = budget, seed, num_batches
        self.chosen = np.arange(len(reader)) if chosen is None else chosen
        self.num_ahead = BATCHES_AHEAD
        self.waited_s = 0.0  # time that the training loop has spent waiting for batches
        self._durations = np.asarray(reader.column("duration_s"), dtype=np.float64)
        self._world_size, self._is_pinned, self._jitter_frames = world_size, is_pinned, jitter_frames
        self._orders: dict[int, EpochOrder] = {}
        self._lengths: list[int] = []  # batches of each epoch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[dict[str, Any]]] = {}

    def __len__(self) -> int:
        return self.num_batches

    def progress(self) -> dict[str, Any]:
        """Say what a resume needs to know: the batches of each epoch so far, and of how many utterances."""
        return {"batches_per_epoch": list(self._lengths), "utterances_in_split": len(self.reader)}

    def restore(self, progress: dict[str, Any]) -> None:
        """Go on from `progress`, without the orders of epochs that are over.

        Raises:
            RunError: the split has grown or shrunk, so no batch would be what it was.
        """
        before = progress.get("utterances_in_split", len(self.reader))
        if before != len(self.reader):
            raise RunError(
                f"{str(self.reader.store.path)!r} holds {len(self.reader):,} utterances of split {self.reader.split!r} "
                f"and held {before:,} when the run was last saved; expected the same, or the order of training would "
                "change. Start a new --run"
            )
        self._lengths = list(progress.get("batches_per_epoch", []))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Give a batch as `collate` does, with its `num_tokens` (decoder positions), `num_targets` and `duration_s`."""
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
        batch = collate(self.reader, self.targets, positions, self._dropped(number, len(positions)))
        if self._is_pinned:
            batch = {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
        batch["num_tokens"] = int(self.costs[positions].sum())
        batch["num_targets"] = int(self.targets.lengths[positions].sum())
        batch["duration_s"] = float(self._durations[positions].sum())
        return batch

    def _dropped(self, number: int, count: int) -> list[int]:
        """Draw how many first frames each utterance of batch `number` loses, from the seed and the number alone."""
        return np.random.default_rng((self.seed, number)).integers(0, self._jitter_frames + 1, count).tolist()

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
        """Give the order of an epoch; two are kept, for reading ahead into the next."""
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
    """Open a store so that all the blocks fit into memory which training has in use at a time, and those read ahead.

    These are a window of each stream, and the next window of up to four streams that change theirs at a time.
    """
    streams = max(1, NUM_STREAMS // world_size)
    blocks = WINDOW_BLOCKS * (streams + min(streams, 4))
    size_bytes = blocks * store.header.block_rows * store.header.bytes_per_row
    return FeatureReader(store, split=split, cache_bytes=size_bytes)


def longest_batch(costs: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Choose the longest utterances, as many as fill one batch: where memory runs out, it does so on these."""
    return np.sort(np.argsort(costs, kind="stable")[-max(1, budget // int(costs.max())) :])


def cut_by_budget(ordered: NDArray[np.int64], costs: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Cut utterances of ascending cost into batches whose padded size, count times longest, stays within the budget."""
    batches, start = [], 0
    for stop in range(1, len(ordered) + 1):
        if stop == len(ordered) or (stop - start + 1) * costs[ordered[stop]] > budget:
            batches.append(ordered[start:stop])
            start = stop
    return batches
