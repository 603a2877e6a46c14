"""Who competes in `bench train`: this stage two, the encoder in the loop, a plain loop, and each saving switched off.

The encoder in the loop gets our batches, our loss and a thread that prepares its audio and its labels; the plain loop
prepares what it needs when it needs it, as a DataLoader without workers does.
"""

import importlib.util
import shutil
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache import FeatureReader
from pipelines.bench import losses
from pipelines.bench.models import Parts
from pipelines.train.batches import BATCHES_AHEAD, Dequantizer, TrainingBatches, collate, pad_labels
from tinyaudio.model.audio import SAMPLING_RATE
from tinyaudio.model.encoder import encoder_inputs

OURS, LIVE, PLAIN = "this stage two", "encoder in the loop", "plain transformers loop"

Batch = dict[str, Any]


@dataclass(kw_only=True)
class Contestant:
    """One way to train."""

    name: str
    next_batch: Callable[[], Batch]
    loss: losses.Loss
    needs_encoder: bool = False
    fits: bool = True  # into the GPU's memory
    speeds: list[float] = field(default_factory=list)  # audio seconds per second, by turn
    token_speeds: list[float] = field(default_factory=list)
    peak_bytes: int = 0  # beyond the weights
    total_bytes: int = 0  # with the weights that it needs, and the optimizer's state

    def to_dict(self, ours: "Contestant") -> dict[str, Any]:
        return {
            "fits": self.fits,
            "audio_seconds_per_second": statistics.median(self.speeds) if self.fits else None,
            "tokens_per_second": statistics.median(self.token_speeds) if self.fits else None,
            "ours_is_faster_by": ours.faster_than(self),
            "peak_bytes": self.peak_bytes if self.fits else None,
            "total_bytes": self.total_bytes if self.fits else None,
        }

    def faster_than(self, other: "Contestant") -> float | None:
        """How many times as fast this one is: the median over the turns; None if the other does not fit."""
        if not other.fits:
            return None
        return statistics.median(a / b for a, b in zip(self.speeds, other.speeds, strict=True))


def contestants(parts: Parts) -> list[Contestant]:
    cached, codes = _endless(our_batches(parts, parts.reader)), _endless(our_batches(parts, parts.int8))
    ordered = _positions_in_order(parts)
    live = _Source(parts, ordered, is_encoded=False, num_ahead=BATCHES_AHEAD)
    plain = _Source(parts, _shuffled(parts), is_encoded=False, num_ahead=0)  # as a DataLoader without workers
    unsorted = _Source(parts, _shuffled(parts), is_encoded=True, num_ahead=BATCHES_AHEAD)
    found = [
        Contestant(name=OURS, next_batch=cached, loss=losses.own),
        Contestant(name=LIVE, next_batch=live, loss=losses.own, needs_encoder=True),
        Contestant(name=PLAIN, next_batch=plain, loss=losses.as_a_user_would, needs_encoder=True),
    ]
    dequantize, on_host = Dequantizer(parts.int8), _endless(our_batches(parts, parts.int8, kind=_FloatsOnTheHost))
    rows: list[tuple[str, Callable[[], Batch], losses.Loss]] = [
        ("logits at every position", cached, losses.full_logits),
        ("label logits in one chunk", cached, losses.one_chunk),
        ("attention mask over padding", cached, losses.with_mask),
        ("packed, block-diagonal attention", cached, losses.packed),
        ("shuffled batches of a fixed count", unsorted, losses.own),
        ("no thread makes batches ahead", _endless(our_batches(parts, parts.reader, num_ahead=0)), losses.own),
        ("int8 store, floats on the device", codes, lambda m, b: losses.own(m, {**b, "features": dequantize(b)})),
        ("int8 store, floats on the host", on_host, losses.own),
        ("gradients for the frozen weights", cached, _with_weight_gradients),
        ("activations checkpointed", cached, _checkpointed),
    ]
    if _can_compile(parts.device):
        rows.append(("torch.compile", cached, losses.Compiled()))
    return [*found, *(Contestant(name=name, next_batch=batch, loss=loss) for name, batch, loss in rows)]


def _can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds what it writes its kernels for: Triton, or a C++ compiler."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def our_batches(
    parts: Parts,
    reader: FeatureReader,
    num_ahead: int = BATCHES_AHEAD,
    kind: type[TrainingBatches] = TrainingBatches,
) -> TrainingBatches:
    """Plan batches without end, as stage two does."""
    made = kind(
        reader,
        parts.targets,
        parts.costs,
        budget=parts.budget,
        seed=0,
        num_batches=1_000_000,
        is_pinned=parts.device.type == "cuda",
    )
    made.num_ahead = num_ahead
    return made


class _FloatsOnTheHost(TrainingBatches):
    """Our batches of an int8 store, dequantised by the thread that reads them."""

    def _make(self, number: int) -> Batch:
        batch = super()._make(number)
        features = Dequantizer(self.reader)(batch).half()
        return {**batch, "features": features.pin_memory() if self._is_pinned else features}


def _endless(batches: TrainingBatches) -> Callable[[], Batch]:
    numbers = iter(range(len(batches)))
    return lambda: batches[next(numbers)]


def _positions_in_order(parts: Parts) -> Iterator[list[int]]:
    order = our_batches(parts, parts.reader)
    return (order.positions(number) for number in range(len(order)))


def _shuffled(parts: Parts) -> Iterator[list[int]]:
    """Draw batches of a fixed count, the mean of ours."""
    order = our_batches(parts, parts.reader)
    count = round(statistics.mean(len(order.positions(number)) for number in range(8)))
    random = np.random.default_rng(0)
    while True:
        permutation = random.permutation(len(parts.reader))
        for start in range(0, len(permutation) - count + 1, count):
            yield [int(position) for position in permutation[start : start + count]]


class _Source:
    """Batches of stored features, or of audio for an encoder in the loop, made some ahead by a thread of their own."""

    def __init__(self, parts: Parts, positions: Iterator[list[int]], *, is_encoded: bool, num_ahead: int) -> None:
        self.parts, self.is_encoded, self.num_ahead = parts, is_encoded, num_ahead
        self._positions = positions
        self._pool = ThreadPoolExecutor(1)
        self._ahead: deque[Future[Batch]] = deque()

    def __call__(self) -> Batch:
        while len(self._ahead) <= self.num_ahead:
            self._ahead.append(self._pool.submit(self._make, next(self._positions)))
        return self._ahead.popleft().result()

    def _make(self, positions: list[int]) -> Batch:
        parts = self.parts
        batch = collate(parts.reader, parts.targets, positions) if self.is_encoded else self._audio(positions)
        if self.num_ahead and parts.device.type == "cuda":
            batch = {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
        batch["num_tokens"] = int(parts.costs[positions].sum())
        batch["duration_s"] = sum(len(parts.recordings[p]) for p in positions) / SAMPLING_RATE
        return batch

    def _audio(self, positions: list[int]) -> Batch:
        parts = self.parts
        values, mask = encoder_inputs(parts.feature_extractor, [parts.recordings[p] for p in positions])
        labels, lengths = pad_labels(parts.targets, positions)
        counts = (parts.reader.num_frames[positions].tolist(), lengths)
        return {"input_values": values, "attention_mask": mask, "labels": labels, "host_counts": counts}


def _with_weight_gradients(model: Any, batch: Batch) -> Tensor:
    """Forget to freeze the decoder: its gradients are computed and thrown away."""
    model.decoder.requires_grad_(True)
    return losses.one_chunk(model, batch)


def _checkpointed(model: Any, batch: Batch) -> Tensor:
    """Recompute activations in the backward pass."""
    model.checkpoint_activations()
    model.decoder.train()
    return losses.own(model, batch)
