"""Batches of recordings through the frozen encoder, with copies to and from a GPU beside the computing.

Batches are made of one shard's utterances in order of length, so a stored row never depends on who computed it or when.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.identity import LoadedEncoder
from tinyaudio.audio import SAMPLING_RATE, Samples, num_frames
from tinyaudio.encoder import encode, encoder_inputs

CPU_BATCH_S = 30.0  # seconds; 15 to 120 are alike within noise on two cores, and activations grow with it

BATCH_PRICE_S = 2.0  # seconds of audio that could be encoded while a batch is started; with it padding stays below 3 %


def cut_batches(lengths: Mapping[str, int], batch_s: float) -> list[list[str]]:
    """Group recordings of like length, at the least cost: padded samples, and a fixed price for every batch.

    Args:
        lengths: samples by id.
        batch_s: seconds of audio in one batch, padding included; a longer recording makes a batch of its own.

    Returns:
        Ids, longest last; the grouping depends on the lengths and ids only.
    """
    ordered = sorted(lengths.items(), key=lambda item: (item[1], item[0]))
    sizes = [length for _, length in ordered]
    best, start_of = [0.0], [0]
    for end in range(1, len(sizes) + 1):
        longest, cost, start = sizes[end - 1], math.inf, end - 1
        while start >= 0 and (start == end - 1 or longest * (end - start) <= batch_s * SAMPLING_RATE):
            this = best[start] + longest * (end - start) + BATCH_PRICE_S * SAMPLING_RATE
            if this < cost:
                cost, chosen = this, start
            start -= 1
        best.append(cost)
        start_of.append(chosen)
    batches, end = [], len(sizes)
    while end:
        batches.append([source_id for source_id, _ in ordered[start_of[end] : end]])
        end = start_of[end]
    return batches[::-1]


@dataclass(frozen=True)
class Inputs:
    """One batch, normalised, padded and, for a GPU, in memory that it can fetch by itself."""

    values: Tensor  # (B, S) float32
    mask: Tensor  # (B, S) int64
    num_samples: int  # of recordings, padding not counted
    frames: list[int]  # that each recording will give


class Encoded:
    """Features on their way back; reading them waits for the encoder."""

    def __init__(self, features: Tensor, frames: list[int], seconds: Callable[[], float]) -> None:
        self._features, self._frames, self._seconds = features, frames, seconds

    def read(self) -> tuple[list[NDArray[np.float32]], float]:
        """Wait.

        Returns:
            Each recording's features, (T_i, D) float32, and the seconds in which the device computed this batch.
        """
        seconds = self._seconds()
        host = self._features.numpy()
        return [row[:count] for row, count in zip(host, self._frames, strict=True)], seconds


class EncoderLine:
    """A frozen encoder that takes prepared batches and gives features without waiting where the device allows it."""

    def __init__(self, encoder: LoadedEncoder) -> None:
        self.encoder, self.device = encoder, encoder.model.device
        self._is_cuda = self.device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(self.device) if self._is_cuda else None  # type: ignore[no-untyped-call]

    def batch_s(self, wanted: float) -> float:
        """Limit a recipe's batch to what serves this device."""
        return wanted if self._is_cuda else min(wanted, CPU_BATCH_S)

    def prepare(self, recordings: Sequence[Samples]) -> Inputs:
        """Normalise and pad recordings, (S_i,) float32 at 16 kHz each."""
        values, mask = encoder_inputs(self.encoder.feature_extractor, recordings)
        if self._is_cuda:
            values, mask = values.pin_memory(), mask.pin_memory()
        lengths = [len(samples) for samples in recordings]
        return Inputs(values, mask, sum(lengths), [num_frames(length) for length in lengths])

    def encode(self, inputs: Inputs) -> Encoded:
        """Compute features; on a GPU only queue the work."""
        if self._copies is not None:
            return self._encode_on_gpu(inputs, self._copies)
        begun = time.perf_counter()
        with torch.inference_mode():
            features, _ = encode(self.encoder.model, inputs.values, inputs.mask, self.encoder.precision)
        seconds = time.perf_counter() - begun
        return Encoded(features, inputs.frames, lambda: seconds)

    def _encode_on_gpu(self, inputs: Inputs, copies: Any) -> Encoded:
        """Queue a batch: copies run on a stream of their own, so that computing never waits for them."""
        values = inputs.values.to(self.device, non_blocking=True)
        mask = inputs.mask.to(self.device, non_blocking=True)
        events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(3)]  # type: ignore[no-untyped-call]
        begin, end, copied = events
        begin.record()
        with torch.inference_mode():
            features, _ = encode(self.encoder.model, values, mask, self.encoder.precision)
        end.record()
        host = torch.empty(features.shape, dtype=torch.float32, pin_memory=True)
        with torch.cuda.stream(copies):
            copies.wait_event(end)
            host.copy_(features, non_blocking=True)
            copied.record(copies)
        features.record_stream(copies)

        def wait() -> float:
            copied.synchronize()
            return float(begin.elapsed_time(end)) / 1000

        return Encoded(host, inputs.frames, wait)
