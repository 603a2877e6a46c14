"""Batches of recordings through the frozen encoder, with copies to and from a GPU beside the computing.

For an int8 store the features are quantised where they were computed, to the bits of `cache.quantize.quantize`.

Batches are made of one shard's utterances in order of length, so a stored row never depends on who computed it or when.
On a CPU several batches are encoded side by side, each by one thread: products of this size gain little from a second
thread, and their last bits then do not depend on the number of cores either.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache import Calibration
from cache.blocks import Rows
from cache.quantize import CODE_MAX
from pipelines.encoders import LoadedEncoder
from tinyaudio.model.audio import SAMPLING_RATE, WINDOW_LENGTH, Samples, num_frames
from tinyaudio.model.encoder import encode, encoder_inputs

CPU_BATCH_S = 15.0  # seconds; 15 to 120 are alike within noise, and the activations of every line grow with it
MAX_LINES = 8  # batches side by side on a CPU: each of HuBERT-large holds about a gigabyte of activations

SMALLEST_SCALE = float(np.finfo(np.float16).smallest_subnormal)

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
    mask: Tensor  # (B, S) bool
    lengths: list[int]  # samples of each recording, at least a window

    @property
    def num_samples(self) -> int:
        """Samples of recordings, padding not counted."""
        return sum(self.lengths)

    @property
    def frames(self) -> list[int]:
        """Frames that each recording will give."""
        return [num_frames(length) for length in self.lengths]


Stored = NDArray[np.float32] | Rows | None  # (T, D) features, or codes with their scales; None: NaN or infinity in them
Host = tuple[NDArray[Any], ...]  # what comes back of a batch: features; or codes, scales and which frames are finite


class Encoded:
    """Features on their way back; reading them waits for the encoder."""

    def __init__(self, frames: list[int], wait: Callable[[], tuple[Host, float]]) -> None:
        """Set up; `wait` gives what is in the host's memory and the seconds it took to compute it."""
        self._frames, self._wait = frames, wait

    def read(self) -> tuple[list[NDArray[np.float32]], float]:
        """Wait.

        Returns:
            Each recording's features, (T_i, D) float32, and the seconds in which the device computed this batch.
        """
        (features,), seconds = self._wait()
        return [row[:count] for row, count in zip(features, self._frames, strict=True)], seconds

    def read_stored(self) -> tuple[Sequence[Stored], float]:
        """Wait for what a store takes; as `read`, but quantised if the line has a calibration."""
        host, seconds = self._wait()
        if len(host) == 1:
            return [row[:count] for row, count in zip(host[0], self._frames, strict=True)], seconds
        return [
            Rows(codes[:count], scales[:count]) if is_finite[:count].all() else None
            for codes, scales, is_finite, count in zip(*host, self._frames, strict=True)
        ], seconds


def quantize_tensor(features: Tensor, calibration: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `cache.quantize.quantize` computes, on the device of the features.

    Args:
        features: (..., T, D) float32. calibration: (2, D) float32, mean and standard deviation.

    Returns:
        codes (..., T, D) int8 and scales (..., T) float16.
    """
    normal = (features - calibration[0]) / calibration[1]
    peak = normal.abs().amax(-1)
    peak = peak / torch.full_like(peak, CODE_MAX)  # by a number a GPU would multiply with its reciprocal: other bits
    scales = peak.clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max).to(torch.float16)
    codes = (normal / scales.float().unsqueeze(-1)).round().clamp(-CODE_MAX, CODE_MAX).to(torch.int8)
    return codes, scales


class EncoderLine:
    """A frozen encoder that takes prepared batches and gives features without waiting where the device allows it."""

    def __init__(self, encoder: LoadedEncoder, calibration: Calibration | None = None) -> None:
        """Set up; with a calibration, features come quantised."""
        self.encoder, self.device = encoder, encoder.model.device
        self._is_cuda = self.device.type == "cuda"
        if self._is_cuda:
            self._to_device, self._to_host = _stream(self.device), _stream(self.device)
        self._calibration = None if calibration is None else torch.from_numpy(calibration.array).to(self.device)
        self.num_lines = 1 if self._is_cuda else min(torch.get_num_threads(), MAX_LINES)
        self._pool: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def side_by_side(self) -> Iterator[None]:
        """Inside, encode as many batches at once as there are cores (a GPU takes one after the other as ever)."""
        if self._is_cuda:
            yield
            return
        num_threads = torch.get_num_threads()
        pool = ThreadPoolExecutor(self.num_lines, "encode", initializer=torch.set_num_threads, initargs=(1,))
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
        mask = mask.bool()
        if self._is_cuda:
            with torch.cuda.device(self.device):
                values, mask = values.pin_memory(), mask.pin_memory()
        return Inputs(values, mask, [max(len(samples), WINDOW_LENGTH) for samples in recordings])

    def encode(self, inputs: Inputs) -> Encoded:
        """Compute features; on a GPU, and side by side, only queue the work."""
        if self._is_cuda:
            with torch.cuda.device(self.device):  # events and pinned memory are of a thread's current device
                return self._encode_on_gpu(inputs)
        if self._pool is not None:
            return Encoded(inputs.frames, self._pool.submit(self._encode_here, inputs).result)
        done = self._encode_here(inputs)
        return Encoded(inputs.frames, lambda: done)

    def _compute(self, values: Tensor, mask: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
        """Compute what is to be stored of a batch."""
        with torch.inference_mode():
            features, _ = encode(self.encoder.model, values, mask, self.encoder.precision, lengths=lengths)
            if self._calibration is None:
                return (features,)
            return (*quantize_tensor(features, self._calibration), features.isfinite().all(-1))

    def _encode_here(self, inputs: Inputs) -> tuple[Host, float]:
        begun = time.perf_counter()
        results = self._compute(inputs.values, inputs.mask, inputs.lengths)
        return tuple(result.numpy() for result in results), time.perf_counter() - begun

    def _encode_on_gpu(self, inputs: Inputs) -> Encoded:
        """Queue a batch: copies run on streams of their own, so that computing never waits for them."""
        compute = torch.cuda.current_stream(self.device)
        begin, end, copied = (torch.cuda.Event(enable_timing=True) for _ in range(3))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._to_device):
            values = inputs.values.to(self.device, non_blocking=True)
            mask = inputs.mask.to(self.device, non_blocking=True)
        compute.wait_stream(self._to_device)
        for tensor in (values, mask):
            tensor.record_stream(compute)
        begin.record(compute)
        results = self._compute(values, mask, inputs.lengths)
        end.record(compute)
        hosts = [torch.empty(result.shape, dtype=result.dtype, pin_memory=True) for result in results]
        with torch.cuda.stream(self._to_host):
            self._to_host.wait_event(end)
            for host, result in zip(hosts, results, strict=True):
                host.copy_(result, non_blocking=True)
                result.record_stream(self._to_host)
            copied.record(self._to_host)

        def wait() -> tuple[Host, float]:
            copied.synchronize()
            return tuple(host.numpy() for host in hosts), float(begin.elapsed_time(end)) / 1000

        return Encoded(inputs.frames, wait)


def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
