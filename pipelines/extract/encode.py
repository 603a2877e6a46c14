"""Run batches of recordings through the frozen encoder, on a CPU or a GPU, and encode the features for the store.

The device computes float16 and codes too. One core with numpy narrows float32 at 4,000 times real time, which is slower
than a GPU encodes; and only a half to an eleventh of the bytes are copied back.

`open_batch_encoder` chooses the class. Both return at once from `encode`; calling what it returns waits for the result:

- `CpuBatchEncoder` encodes several batches at the same time, each in one thread. Matrix products of this size gain
  little from a second thread (lanes are 1.8 times as fast on two cores), and with one thread their last bits do not
  depend on the number of cores.
- `GpuBatchEncoder` queues the work; copies to and from the GPU overlap with computing.
"""

import contextlib
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
from cache.quantize import CLIPS, CODE_MAX, SMALLEST_SCALE, pack, packed_bytes, zero_code
from pipelines.encoders import LoadedEncoder
from tinyaudio.model.audio import WINDOW_LENGTH, Samples
from tinyaudio.model.encoder import encode, encoder_inputs

CPU_BATCH_S = 15.0  # seconds; 15 to 120 are equally fast within noise, and memory grows with it
MAX_LANES = 8  # batches at the same time on a CPU: each of HuBERT-large takes about a gigabyte of activations


@dataclass(frozen=True)
class Inputs:
    """One normalised and padded batch; for a GPU, in pinned memory."""

    values: Tensor  # (B, S) float32
    mask: Tensor  # (B, S) bool
    lengths: list[int]  # samples of each recording, at least a window

    @property
    def num_samples(self) -> int:
        """Samples of all recordings, without padding."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Encoded:
    """What the encoder computed from one recording."""

    features: NDArray[Any]  # (T, D) float32 or float16, or codes as `quantize_tensor` gives them
    scales: NDArray[np.float16] | None = None  # (T,) of codes
    is_finite: bool = True  # no feature was NaN or infinite; not checked for float32
    num_clamped: int = 0  # values beyond float16, which were clamped


@dataclass(frozen=True)
class EncodedBatch:
    """What the encoder computed from one batch, and the seconds that the device took."""

    recordings: list[Encoded]
    seconds: float

    @classmethod
    def cut(cls, host: Mapping[str, NDArray[Any]], counts: Sequence[int], seconds: float) -> "EncodedBatch":
        """Cut the padding off.

        Args:
            host: features (B, T, D); what else the encoding has, by the names of `encode_tensor`, (B, T) each.
            counts: frames of each recording.
        """
        recordings = []
        for i, count in enumerate(counts):
            of = {name: array[i][:count] for name, array in host.items()}
            is_finite, num_clamped = of.get("is_finite"), of.get("num_clamped")
            recordings.append(
                Encoded(
                    of["features"],
                    of.get("scales"),
                    is_finite is None or bool(is_finite.all()),
                    0 if num_clamped is None else int(num_clamped.sum()),
                )
            )
        return cls(recordings, seconds)


class BatchEncoder:
    """A frozen encoder that takes prepared batches, and encodes the features; arguments as `open_batch_encoder`."""

    num_lanes = 1  # batches computed at the same time

    def __init__(
        self, encoder: LoadedEncoder, encoding: str = "float32", calibration: Calibration | None = None
    ) -> None:
        self.encoder, self.device, self.encoding = encoder, encoder.model.device, encoding
        self.family = encoder.family
        self._calibration = None if calibration is None else torch.from_numpy(calibration.array).to(self.device)

    @contextlib.contextmanager
    def lanes(self) -> Iterator[None]:
        """Compute `num_lanes` batches at the same time inside this block; outside it, `encode` itself computes."""
        yield

    def batch_s(self, wanted: float) -> float:
        """Limit the recipe's seconds of audio per batch to what is fast on this device."""
        return wanted

    def prepare(self, recordings: Sequence[Samples]) -> Inputs:
        """Normalise and pad recordings, (S_i,) float32 at 16 kHz each."""
        is_pinned = self.device.type == "cuda"
        values, mask = encoder_inputs(self.encoder.feature_extractor, recordings, is_pinned=is_pinned)
        return Inputs(values, mask, [max(len(samples), WINDOW_LENGTH) for samples in recordings])

    def encode(self, inputs: Inputs) -> Callable[[], EncodedBatch]:
        """Start to compute a batch; call the result to wait for it."""
        raise NotImplementedError

    def _counts(self, inputs: Inputs) -> list[int]:
        return [self.family.num_frames(length) for length in inputs.lengths]

    def _compute(self, values: Tensor, mask: Tensor, lengths: list[int]) -> dict[str, Tensor]:
        """Compute the tensors that `EncodedBatch.cut` takes."""
        with torch.inference_mode():
            features, _ = encode(self.encoder.model, values, mask, self.encoder.precision, lengths=lengths)
            return encode_tensor(features, self.encoding, self._calibration)


class CpuBatchEncoder(BatchEncoder):
    """Batches side by side, one thread each."""

    def __init__(
        self, encoder: LoadedEncoder, encoding: str = "float32", calibration: Calibration | None = None
    ) -> None:
        super().__init__(encoder, encoding, calibration)
        self.num_lanes = min(torch.get_num_threads(), MAX_LANES)
        self._pool: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def lanes(self) -> Iterator[None]:
        num_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.num_lanes, "encode", initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield
        finally:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            torch.set_num_threads(num_threads)  # MKL has one number for the whole process

    def batch_s(self, wanted: float) -> float:
        return min(wanted, CPU_BATCH_S)

    def encode(self, inputs: Inputs) -> Callable[[], EncodedBatch]:
        if self._pool is not None:
            return self._pool.submit(self._encode_here, inputs).result
        batch = self._encode_here(inputs)
        return lambda: batch

    def _encode_here(self, inputs: Inputs) -> EncodedBatch:
        started = time.perf_counter()
        results = self._compute(inputs.values, inputs.mask, inputs.lengths)
        seconds = time.perf_counter() - started
        host = {name: result.numpy() for name, result in results.items()}
        return EncodedBatch.cut(host, self._counts(inputs), seconds)


class GpuBatchEncoder(BatchEncoder):
    """Batches in a queue of the GPU; copies run on streams of their own, so that computing never waits for them."""

    def __init__(
        self, encoder: LoadedEncoder, encoding: str = "float32", calibration: Calibration | None = None
    ) -> None:
        super().__init__(encoder, encoding, calibration)
        self._to_device, self._to_host = (torch.cuda.Stream(self.device) for _ in range(2))  # type: ignore[no-untyped-call]

    def prepare(self, recordings: Sequence[Samples]) -> Inputs:
        with torch.cuda.device(self.device):  # pinned memory and events belong to a thread's current device
            return super().prepare(recordings)

    def encode(self, inputs: Inputs) -> Callable[[], EncodedBatch]:
        with torch.cuda.device(self.device):
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
            hosts = {
                name: torch.empty(result.shape, dtype=result.dtype, pin_memory=True) for name, result in results.items()
            }
            with torch.cuda.stream(self._to_host):
                self._to_host.wait_event(end)
                for name, result in results.items():
                    hosts[name].copy_(result, non_blocking=True)
                    result.record_stream(self._to_host)
                copied.record(self._to_host)

        def wait() -> EncodedBatch:
            copied.synchronize()
            seconds = float(begin.elapsed_time(end)) / 1000
            return EncodedBatch.cut({name: host.numpy() for name, host in hosts.items()}, self._counts(inputs), seconds)

        return wait


def open_batch_encoder(
    encoder: LoadedEncoder, encoding: str = "float32", calibration: Calibration | None = None
) -> BatchEncoder:
    """Wrap a loaded encoder for its device.

    Args:
        encoding: of the store; or "float32", which leaves features as they are.
        calibration: of a quantised store.
    """
    kind = GpuBatchEncoder if encoder.model.device.type == "cuda" else CpuBatchEncoder
    return kind(encoder, encoding, calibration)


def encode_tensor(features: Tensor, encoding: str, calibration: Tensor | None) -> dict[str, Tensor]:
    """Encode features as a store keeps them, on their own device.

    Args:
        features: (..., T, D) float32.
        encoding: "float32" or that of a store. calibration: (2, D) float32, if it is quantised.

    Returns:
        features (..., T, D); scales (..., T) float16, of codes; is_finite (..., T) bool, of the given features;
        num_clamped (..., T) int32, values beyond float16.
    """
    if encoding == "float32":
        return {"features": features}
    if encoding != "float16":
        assert calibration is not None
        codes, scales = quantize_tensor(features, calibration, int(encoding.removeprefix("int")))
        return {"features": codes, "scales": scales, "is_finite": features.isfinite().all(-1)}
    halves = features.half()
    largest = torch.finfo(torch.float16).max
    return {
        "features": halves.clamp(-largest, largest),
        "is_finite": features.isfinite().all(-1),
        "num_clamped": halves.isinf().sum(-1, dtype=torch.int32),
    }


def quantize_tensor(features: Tensor, calibration: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Compute the bits of `cache.quantize.quantize`, on the device of the features.

    Args:
        features: (..., T, D) float32. calibration: (2, D) float32, mean and standard deviation.

    Returns:
        Codes (..., T, D) int8, or packed (..., T, bytes) uint8 below 8 bits; and scales (..., T) float16.
    """
    normal = (features - calibration[0]) / calibration[1]
    peak = normal.abs().amax(-1)
    zero, top = zero_code(bits), 2**bits - 1
    # A tensor, since a GPU multiplies with the reciprocal of a number: other bits.
    peak = peak / torch.full_like(peak, zero or CODE_MAX)
    if bits == 8:
        scales = _as_scales(peak)
        return (normal / scales.float().unsqueeze(-1)).round().clamp(-CODE_MAX, CODE_MAX).to(torch.int8), scales
    scales = torch.zeros_like(peak, dtype=torch.float16)
    codes = torch.zeros_like(normal, dtype=torch.uint8)
    least = torch.full_like(peak, torch.inf, dtype=torch.float64)
    for clip in CLIPS:
        tried = _as_scales(peak * clip)
        steps = tried.float().unsqueeze(-1)
        rounded = (normal / steps + zero).round().clamp(0, top)
        error = ((rounded - zero) * steps - normal).square().sum(-1, dtype=torch.float64)
        better = error < least
        scales, least = torch.where(better, tried, scales), torch.where(better, error, least)
        codes = torch.where(better.unsqueeze(-1), rounded.to(torch.uint8), codes)
    packed = codes.new_zeros((*codes.shape[:-1], packed_bytes(codes.shape[-1], bits)))
    pack(codes, packed, bits)
    return packed, scales


def _as_scales(steps: Tensor) -> Tensor:
    return steps.clamp(SMALLEST_SCALE, torch.finfo(torch.float16).max).to(torch.float16)
