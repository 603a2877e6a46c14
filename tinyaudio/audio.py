"""Audio in: any file, bytes or array becomes mono float32 samples at 16 kHz.

Decoding is libsndfile's (soundfile) and, for what it cannot read (M4A, AAC, WebM, ...), FFmpeg's libraries inside the
PyAV wheel; no ffmpeg binary is ever called. Resampling is soxr at its "HQ" setting, which is part of a feature store's
fingerprint because it changes features. Everything is read in blocks, so memory follows what was decoded and not what
a header promises.

This module knows the frame formula of HuBERT and wav2vec 2.0, and nothing else about models.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import AudioError

SAMPLING_RATE = 16_000  # Hz; what HuBERT and wav2vec 2.0 were trained on
WINDOW_LENGTH = 400  # samples, 25 ms: receptive field of the convolutions (kernels 10,3,3,3,3,2,2)
HOP_LENGTH = 320  # samples, 20 ms: product of their strides (5,2,2,2,2,2,2)
RESAMPLER = "soxr-HQ"

MIN_SOURCE_RATE, MAX_SOURCE_RATE = 1_000, 768_000  # Hz; outside lie broken headers, not recordings
BLOCK_S = 10  # seconds decoded at a time

Samples = NDArray[np.float32]
AudioSource = str | os.PathLike[str] | bytes | BinaryIO


def num_frames(num_samples: int) -> int:
    """Count the encoder frames of a recording; shorter ones are padded to one window first.

    Args:
        num_samples: at 16 kHz.

    Returns:
        (num_samples - 400) // 320 + 1, at least 1. One second is 49 frames.

    Source: the convolution arithmetic of wav2vec 2.0 (Baevski et al. 2020, arXiv 2006.11477, section 2).
    """
    return (max(num_samples, WINDOW_LENGTH) - WINDOW_LENGTH) // HOP_LENGTH + 1


def pad_to_window(samples: Samples) -> Samples:
    """Zero-pad a recording shorter than one encoder window; leave any other as it is.

    Args:
        samples: (S,) at 16 kHz.

    Returns:
        (max(S, 400),).
    """
    missing = WINDOW_LENGTH - len(samples)
    return np.pad(samples, (0, missing)) if missing > 0 else samples


def load_audio(source: AudioSource | NDArray[Any], sampling_rate: int | None = None) -> Samples:
    """Read one recording whole.

    Args:
        source: path, encoded bytes, binary file object, or an array of samples: (S,), (channels, S) or (S, channels).
        sampling_rate: Hz, of an array; 16,000 when not given. Files carry their own.

    Returns:
        (S,) float32, mono (mean of the channels), 16 kHz, S >= 1.

    Raises:
        AudioError: missing, empty or undecodable input, no samples, or samples that are not finite.
    """
    blocks = list(iter_audio(source, sampling_rate))
    if not blocks:
        raise AudioError(f"{describe(source)} holds no samples; expected at least one")
    return np.concatenate(blocks)


def iter_audio(source: AudioSource | NDArray[Any], sampling_rate: int | None = None) -> Iterator[Samples]:
    """Read one recording in blocks of about ten seconds; arguments and errors as `load_audio`.

    Yields:
        (n,) float32 at 16 kHz; joined they are what `load_audio` returns.
    """
    if isinstance(source, np.ndarray):
        decoded = iter([(_as_mono(source), sampling_rate or SAMPLING_RATE)])
    else:
        if sampling_rate is not None:
            raise AudioError("sampling_rate goes with an array; files carry their own")
        decoded = _decode(source)
    yield from _resample(decoded, describe(source))


def describe(source: object) -> str:
    """Name an input in an error message."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, bytes):
        return f"{len(source)} bytes of audio"
    return f"{type(source).__name__} input"


def _as_mono(array: NDArray[Any]) -> Samples:
    """Bring an array of samples to (S,) float32; integers are scaled to [-1, 1) by their type's range."""
    if array.ndim not in (1, 2):
        raise AudioError(f"array of shape {array.shape}; expected (samples,) or (channels, samples)")
    if array.dtype.kind in "iu":
        info = np.iinfo(array.dtype)
        half = (int(info.max) + 1 - int(info.min)) // 2
        array = (array.astype(np.float64) - (info.max + 1 - half)) / half
    if array.ndim == 2:
        array = array.mean(axis=0 if array.shape[0] <= array.shape[1] else 1)
    return np.ascontiguousarray(array, dtype=np.float32)


def _decode(source: AudioSource) -> Iterator[tuple[Samples, int]]:
    """Yield mono blocks with their sampling rate, by soundfile if it knows the format, else by PyAV."""
    name, opened = describe(source), _open(source)
    with opened as stream:
        import soundfile

        try:
            sound = soundfile.SoundFile(stream)
        except soundfile.LibsndfileError as error:
            stream.seek(0)
            yield from _decode_with_av(stream, name, str(error))
            return
        with sound:
            _check_rate(sound.samplerate, name)
            try:
                for block in sound.blocks(sound.samplerate * BLOCK_S, dtype="float32", always_2d=True):
                    yield block.mean(axis=1, dtype=np.float32), sound.samplerate
            except (soundfile.LibsndfileError, RuntimeError) as error:
                raise AudioError(f"{name} is damaged: {error}") from error


def _decode_with_av(stream: BinaryIO, name: str, first_error: str) -> Iterator[tuple[Samples, int]]:
    import av

    try:
        with av.open(stream) as container:
            if not container.streams.audio:
                raise AudioError(f"{name} has no audio track; expected speech in WAV, FLAC, MP3, OGG, M4A or WebM")
            track = container.streams.audio[0]
            rate = int(track.rate)
            _check_rate(rate, name)
            to_float = av.AudioResampler(format="fltp", rate=rate)
            for frame in container.decode(track):
                for part in to_float.resample(frame):
                    yield part.to_ndarray().mean(axis=0, dtype=np.float32), rate
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        raise AudioError(
            f"{name} is not readable as audio (libsndfile: {_one_line(first_error)}; FFmpeg: {_one_line(str(error))}); "
            "expected WAV, AIFF, FLAC, MP3, OGG, Opus, M4A, AAC or WebM"
        ) from error


def _one_line(message: str) -> str:
    return " ".join(message.split()).removeprefix("Error opening ").rstrip(".")


def _open(source: AudioSource) -> BinaryIO:
    """Open an input for reading from its start; an empty one is an error here, with its own words."""
    if isinstance(source, (bytes, bytearray)):
        stream: BinaryIO = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            raise AudioError(f"{describe(source)} is a directory; expected an audio file")
        try:
            stream = path.open("rb")
        except FileNotFoundError as error:
            raise AudioError(f"{describe(source)} does not exist; check the path") from error
        except (OSError, ValueError) as error:
            raise AudioError(f"{describe(source)} cannot be opened: {error}") from error
    elif hasattr(source, "read"):
        stream = io.BytesIO(source.read())  # pipes and sockets cannot seek, which both decoders need
    else:
        raise AudioError(f"{describe(source)}: expected a path, bytes, a binary file object or a numpy array")
    if not stream.read(1):
        stream.close()
        raise AudioError(f"{describe(source)} is empty (0 bytes); expected an audio file")
    stream.seek(0)
    return stream


def _check_rate(rate: int, name: str) -> None:
    if not MIN_SOURCE_RATE <= rate <= MAX_SOURCE_RATE:
        raise AudioError(
            f"{name} claims a sampling rate of {rate} Hz; expected {MIN_SOURCE_RATE} to {MAX_SOURCE_RATE} Hz"
        )


def _resample(decoded: Iterator[tuple[Samples, int]], name: str) -> Iterator[Samples]:
    """Bring blocks to 16 kHz, carrying the filter's state from block to block."""
    import soxr

    resampler: soxr.ResampleStream | None = None
    rate = SAMPLING_RATE
    for block, rate in decoded:
        if not np.isfinite(block).all():
            raise AudioError(f"{name} holds samples that are NaN or infinite; expected finite values")
        if rate != SAMPLING_RATE:
            if resampler is None:
                _check_rate(rate, name)
                resampler = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32", quality="HQ")
            block = resampler.resample_chunk(block)
        if len(block):
            yield block
    if resampler is not None:
        tail = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        if len(tail):
            yield tail
