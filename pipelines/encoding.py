"""Batches of recordings through the frozen encoder, with copies to and from a GPU beside the computing.

Batches are made of one shard's utterances in order of length, so a stored row never depends on who computed it or when.
On a CPU several batches are encoded side by side, each by one thread: products of this size gain little from a second
thread, and their last bits then do not depend on the number of cores either.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.identity import LoadedEncoder
from tinyaudio.audio import SAMPLING_RATE, Samples, num_frames
from tinyaudio.encoder import encode, encoder_inputs

# oneDNN keeps a compiled kernel for each of the last 1,024 shapes, and no two batches have the same: 250 MB for nothing
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

CPU_BATCH_S = 15.0  # seconds; 15 to 120 are alike within noise, and the activations of every line grow with it
MAX_LINES = 8  # batches side by side on a CPU: each of HuBERT-large holds about a gigabyte of activations

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

    def __init__(self, frames: list[int], wait: Callable[[], tuple[Tensor, float]]) -> None:
        """Set up; `wait` gives the features in the host's memory and the seconds it took to compute them."""
        self._frames, self._wait = frames, wait

    def read(self) -> tuple[list[NDArray[np.float32]], float]:
        """Wait.

        Returns:
            Each recording's features, (T_i, D) float32, and the seconds in which the device computed this batch.
        """
        features, seconds = self._wait()
        return [row[:count] for row, count in zip(features.numpy(), self._frames, strict=True)], seconds


class EncoderLine:
    """A frozen encoder that takes prepared batches and gives features without waiting where the device allows it."""

    def __init__(self, encoder: LoadedEncoder) -> None:
        self.encoder, self.device = encoder, encoder.model.device
        self._is_cuda = self.device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(self.device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self.num_lines = 1 if self._is_cuda else min(torch.get_num_threads(), MAX_LINES)
        self._pool: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def side_by_side(self) -> Iterator[None]:
        """Inside, encode as many batches at once as there are cores (a GPU takes one after the other as ever)."""
        if self._is_cuda:
            yield
            return
        num_threads = torch.get_num_threads()
        each = max(1, num_threads // self.num_lines)
        pool = ThreadPoolExecutor(self.num_lines, "encode", initializer=torch.set_num_threads, initargs=(each,))
        self._pool = pool
        try:
            yield
        finally:
            self._pool = None
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)  # MKL's is one number for the whole process

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
        """Compute features; on a GPU, and side by side, only queue the work."""
        if self._copies is not None:
            return self._encode_on_gpu(inputs, self._copies)
        if self._pool is not None:
            return Encoded(inputs.frames, self._pool.submit(self._encode_here, inputs).result)
        done = self._encode_here(inputs)
        return Encoded(inputs.frames, lambda: done)

    def _encode_here(self, inputs: Inputs) -> tuple[Tensor, float]:
        begun = time.perf_counter()
        with torch.inference_mode():
            features, _ = encode(self.encoder.model, inputs.values, inputs.mask, self.encoder.precision)
        return features, time.perf_counter() - begun

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

        def wait() -> tuple[Tensor, float]:
            copied.synchronize()
            return host, float(begin.elapsed_time(end)) / 1000

        return Encoded(inputs.frames, wait)
