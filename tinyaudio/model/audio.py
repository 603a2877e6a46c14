"""Audio in: any file, bytes or array becomes mono float32 samples at 16 kHz.

`decoding` decodes files, `structure` finds out what is in them. soxr resamples at its "HQ" setting; as this changes
features, it is part of a feature store's fingerprint. Files are read in blocks, so memory depends on the samples
decoded, not on what a header promises.

Of models, this module knows the frame formula of HuBERT and wav2vec 2.0 only.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .decoding import OnWarning, block_size, decode
from .errors import AudioError
from .mixing import Mixer
from .source import AudioSource, Part, describe, open_source
from .structure import recordings

SAMPLING_RATE = 16_000  # Hz; what HuBERT and wav2vec 2.0 were trained on
WINDOW_LENGTH = 400  # samples, 25 ms: receptive field of the convolutions (kernels 10,3,3,3,3,2,2)
HOP_LENGTH = 320  # samples, 20 ms: product of their strides (5,2,2,2,2,2,2)
RESAMPLER = "soxr-HQ"

MIN_SOURCE_RATE, MAX_SOURCE_RATE = 1_000, 768_000  # Hz; other values are broken headers, not recordings
Samples = NDArray[np.float32]


def num_frames(num_samples: int) -> int:
    """Count the encoder frames of samples at 16 kHz. A recording shorter than a window is padded to one first.

    Returns:
        (num_samples - 400) // 320 + 1, at least 1. One second is 49 frames.

    Source: the convolution arithmetic of wav2vec 2.0 (Baevski et al. 2020, arXiv 2006.11477, section 2).
    """
    return (max(num_samples, WINDOW_LENGTH) - WINDOW_LENGTH) // HOP_LENGTH + 1


def pad_to_window(samples: Samples) -> Samples:
    """Zero-pad a recording that is shorter than one encoder window: (S,) at 16 kHz becomes (max(S, 400),)."""
    missing = WINDOW_LENGTH - len(samples)
    return np.pad(samples, (0, missing)) if missing > 0 else samples


def load_audio(
    source: AudioSource | NDArray[Any],
    sampling_rate: int | None = None,
    on_warning: OnWarning = lambda code: None,
) -> Samples:
    """Read a whole recording.

    Args:
        source: path, encoded bytes, binary file object, or an array of samples: (S,), (channels, S) or (S, channels).
        sampling_rate: of an array, in Hz; None is 16,000. Files carry their own.
        on_warning: see `iter_audio`.

    Returns:
        (S,) float32, mono (mean of the channels), 16 kHz, S >= 1.

    Raises:
        AudioError: missing, empty or undecodable input, no samples, or samples that are not finite.
    """
    blocks = list(iter_audio(source, sampling_rate, on_warning))
    if not blocks:
        raise AudioError(f"{describe(source)} contains no samples; expected at least one")
    if len(blocks) == 1 and not isinstance(source, np.ndarray):  # a block of an array is a view of the caller's memory
        return blocks[0]
    return np.concatenate(blocks)


def iter_audio(
    source: AudioSource | NDArray[Any],
    sampling_rate: int | None = None,
    on_warning: OnWarning = lambda code: None,
    track: int | None = None,
) -> Iterator[Samples]:
    """Read one recording in blocks of about ten seconds; arguments and errors as `load_audio`.

    Args:
        on_warning: called with a code of `guard.CODES`: `input_truncated`, `input_damaged`, `channels_cancel`,
            `several_tracks`.
        track: number of a file's audio track, from 1; None is its default track.

    Yields:
        (n,) float32 at 16 kHz; concatenated they are what `load_audio` returns.
    """
    if isinstance(source, np.ndarray):
        decoded = _array_blocks(source, SAMPLING_RATE if sampling_rate is None else sampling_rate, on_warning)
    else:
        if sampling_rate is not None:
            raise AudioError("expected sampling_rate with an array only; files carry their own")
        decoded = _file_blocks(source, on_warning, track)
    try:
        yield from _resample(decoded, describe(source))
    except OSError as error:  # the disk fails, or is full while a pipe is copied
        raise AudioError(f"{describe(source)} cannot be read: {error.strerror or error}") from error


def probe_duration_s(source: str | os.PathLike[str] | bytes) -> float | None:
    """Return the seconds that a file's header states, where its bytes do not contradict it; else None.

    Without decoding, nothing is known of an MP3 without a Xing header, of FLAC from a pipe, or of MP4 and WebM.
    """
    import soundfile

    try:
        if not isinstance(source, bytes) and not Path(source).is_file():
            return None
        with open_source(source) as stream:
            duration_s = 0.0
            for recording in recordings(stream):
                stated_s = recording.stated_s
                if recording.by_libsndfile:
                    part = Part(stream, recording.begin, recording.end, recording.patches)
                    info = soundfile.info(part)
                    stated_s = info.frames / info.samplerate
                if not stated_s or recording.is_cut:
                    return None
                duration_s += stated_s
            return duration_s
    except (soundfile.LibsndfileError, RuntimeError, ValueError, OSError, ZeroDivisionError):
        return None


def _array_blocks(array: NDArray[Any], rate: int, on_warning: OnWarning) -> Iterator[tuple[Samples, int]]:
    """Slice an array of samples into mono blocks, so that a long recording is never copied as a whole."""
    if array.ndim not in (1, 2):
        raise AudioError(f"expected an array of shape (samples,) or (channels, samples), found {array.shape}")
    if array.dtype.kind not in "fiu":
        raise AudioError(f"expected an array of real numbers, found {array.dtype}")
    if not array.size:
        raise AudioError(f"array of shape {array.shape} contains no samples; expected at least one")
    rows = array[:, None] if array.ndim == 1 else array.T if array.shape[0] <= array.shape[1] else array
    size, mixer = block_size(rate, rows.shape[1]), Mixer()
    for begin in range(0, len(rows), size):
        block = rows[begin : begin + size]
        if block.dtype.kind != "f":  # integers are scaled to [-1, 1) by their type's range
            info = np.iinfo(block.dtype)
            half = (int(info.max) + 1 - int(info.min)) // 2
            block = (block.astype(np.float64) - (info.max + 1 - half)) / half
        yield mixer.mix(np.asarray(block, dtype=np.float32), rate), rate
    if mixer.num_cancelled:
        on_warning("channels_cancel")


def _file_blocks(source: AudioSource, on_warning: OnWarning, track: int | None) -> Iterator[tuple[Samples, int]]:
    name = describe(source)
    with open_source(source) as stream:
        if not stream.read(1):
            raise AudioError(f"{name} is empty (0 bytes); expected an audio file")
        yield from decode(stream, name, track, on_warning)


def _resample(decoded: Iterator[tuple[Samples, int]], name: str) -> Iterator[Samples]:
    """Bring blocks to 16 kHz; the filter's state is carried from block to block."""
    import soxr

    resampler: soxr.ResampleStream | None = None
    resampled_rate = 0
    for block, rate in decoded:
        if not MIN_SOURCE_RATE <= rate <= MAX_SOURCE_RATE:
            expected = f"{MIN_SOURCE_RATE} to {MAX_SOURCE_RATE} Hz"
            raise AudioError(f"{name} claims a sampling rate of {rate} Hz; expected {expected}")
        if not np.isfinite(block).all():
            raise AudioError(f"{name} holds samples that are NaN or infinite; expected finite values")
        if resampler is not None and rate != resampled_rate:  # the next of several joined recordings
            yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
            resampler = None
        if rate != SAMPLING_RATE:
            if resampler is None:
                resampler = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32", quality="HQ")
                resampled_rate = rate
            block = resampler.resample_chunk(block)
        if len(block):
            yield block
    if resampler is not None:
        tail = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        if len(tail):
            yield tail
