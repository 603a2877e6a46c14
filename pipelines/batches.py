"""Batches of stage two: stored features and tokenised transcripts, in an order that is a pure function of the seed.

`TrainingBatches[i]` is the i-th batch of a whole run, whatever came before: resuming is counting. Batches are cut by a
budget of decoder positions (prompt, projected frames and target, padding included) from lengths that the store knows
exactly. Features of an int8 store leave here as codes and scales; they are dequantised on the training device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import FeatureReader
from pipelines.errors import RunError
from tinyaudio.modeling_tinyaudio import IGNORED_LABEL
from tinyaudio.prompt import prompt_ids, transcript_ids

BUCKET_UTTERANCES = 4096  # utterances sorted by length among themselves before batches are cut


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
    """Tokenise transcripts as `prompt.transcript_ids` does."""
    rows = [transcript_ids(tokenizer, text) for text in transcripts]
    offsets = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    return Targets(ids=np.fromiter((i for row in rows for i in row), np.int32, int(offsets[-1])), offsets=offsets)


def positions_needed(reader: FeatureReader, targets: Targets, tokenizer: Any, stack_factor: int) -> NDArray[np.int64]:
    """Count the decoder positions of every utterance: (N,)."""
    prefix, suffix = prompt_ids(tokenizer)
    projected = -(-reader.num_frames.astype(np.int64) // stack_factor)
    return len(prefix) + projected + len(suffix) + targets.lengths


def collate(reader: FeatureReader, targets: Targets, positions: Sequence[int]) -> dict[str, Any]:
    """Read utterances and pad them into one batch.

    Returns:
        features (B, T, D) float16, or int8 with scales (B, T) float16; num_frames (B,); labels (B, L), -100 behind each
        end; utterance_ids, for messages.
    """
    rows = reader.read_rows(positions)
    counts = [len(row.features) for row in rows]
    features = np.zeros((len(rows), max(counts), reader.store.dim), rows[0].features.dtype)
    labels = np.full((len(rows), int(targets.lengths[list(positions)].max())), IGNORED_LABEL, np.int64)
    scales = None if rows[0].scales is None else np.zeros(features.shape[:2], np.float16)
    for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
        features[i, : counts[i]] = row.features
        if scales is not None:
            scales[i, : counts[i]] = row.scales
        target = targets[position]
        labels[i, : len(target)] = target
    batch: dict[str, Any] = {
        "features": torch.from_numpy(features),
        "num_frames": torch.tensor(counts),
        "labels": torch.from_numpy(labels),
        "utterance_ids": reader.index["utterance_id"].take(np.asarray(positions)).to_pylist(),
    }
    return batch if scales is None else {**batch, "scales": torch.from_numpy(scales)}


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


class TrainingBatches(torch.utils.data.Dataset[dict[str, Any]]):
    """All batches of a run, by number."""

    def __init__(
        self, reader: FeatureReader, targets: Targets, costs: NDArray[np.int64], *, budget: int, seed: int, num_batches: int
    ) -> None:
        """Check that every utterance fits the budget.

        Raises:
            RunError: an empty split, or an utterance that alone exceeds the budget.
        """
        if not len(reader):
            raise RunError(f"{str(reader.store.path)!r} holds no utterance of split {reader.split!r}; run `tinyaudio extract`")
        if int(costs.max()) > budget:
            raise RunError(
                f"the longest utterance needs {int(costs.max())} decoder positions and train.batch_tokens is {budget}; "
                "raise it, or lower corpus.max_duration_s"
            )
        self.reader, self.targets, self.costs = reader, targets, costs
        self.budget, self.seed, self.num_batches = budget, seed, num_batches
        self._epochs: list[list[NDArray[np.int64]]] = []

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, number: int) -> dict[str, Any]:
        following = self.positions(number + 1) if number + 1 < self.num_batches else []
        batch = collate(self.reader, self.targets, self.positions(number))
        self.reader.prefetch(following)
        return batch

    def positions(self, number: int) -> list[int]:
        """Return the utterances of batch `number`, as rows of the reader's index."""
        epoch = 0
        while True:
            while len(self._epochs) <= epoch:
                self._epochs.append(list(epoch_batches(self.costs, self.budget, self.seed, len(self._epochs))))
            if number < len(self._epochs[epoch]):
                return [int(position) for position in self._epochs[epoch][number]]
            number -= len(self._epochs[epoch])
            epoch += 1


def epoch_batches(costs: NDArray[np.int64], budget: int, seed: int, epoch: int) -> Iterator[NDArray[np.int64]]:
    """Shuffle, sort by length within buckets, cut by budget, shuffle the batches: a pure function of its arguments."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(costs))
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), BUCKET_UTTERANCES):
        bucket = order[start : start + BUCKET_UTTERANCES]
        batches += cut_by_budget(bucket[np.argsort(costs[bucket], kind="stable")], costs, budget)
    yield from (batches[i] for i in random.permutation(len(batches)))


def cut_by_budget(ordered: NDArray[np.int64], costs: NDArray[np.int64], budget: int) -> list[NDArray[np.int64]]:
    """Cut utterances of ascending cost into batches whose padded size, count times longest, stays within the budget."""
    batches, start = [], 0
    for stop in range(1, len(ordered) + 1):
        if stop == len(ordered) or (stop - start + 1) * costs[ordered[stop]] > budget:
            batches.append(ordered[start:stop])
            start = stop
    return batches
