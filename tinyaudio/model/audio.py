"""Audio in: any file, bytes or array becomes mono float32 samples at 16 kHz.

soundfile (libsndfile) decodes; PyAV, with the FFmpeg libraries in its wheel, decodes the formats that soundfile cannot
read (M4A, AAC, WebM, ...). The ffmpeg binary is never called. soxr resamples at its "HQ" setting; as this changes
features, it is part of a feature store's fingerprint. Files are read in blocks, so memory depends on the samples
decoded, not on what a header promises.

Of models, this module knows the frame formula of HuBERT and wav2vec 2.0 only.
"""

import contextlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from .errors import AudioError, one_line
from .truncation import MISSING_S, is_truncated, promised_s

SAMPLING_RATE = 16_000  # Hz; what HuBERT and wav2vec 2.0 were trained on
WINDOW_LENGTH = 400  # samples, 25 ms: receptive field of the convolutions (kernels 10,3,3,3,3,2,2)
HOP_LENGTH = 320  # samples, 20 ms: product of their strides (5,2,2,2,2,2,2)
RESAMPLER = "soxr-HQ"

MIN_SOURCE_RATE, MAX_SOURCE_RATE = 1_000, 768_000  # Hz; other values are broken headers, not recordings
BLOCK_S = 10  # seconds decoded at a time
MAX_BLOCK_VALUES = 1 << 23  # values of all channels decoded at a time: 32 MiB, whatever a header claims
SPOOL_BYTES = 1 << 26  # of an input that cannot be rewound are kept in memory; a longer one goes to a temporary file

Samples = NDArray[np.float32]
AudioSource = str | os.PathLike[str] | bytes | BinaryIO


def num_frames(num_samples: int) -> int:
    """Count the encoder frames of a recording. One shorter than a window is padded to one window first.

    Args:
        num_samples: at 16 kHz.

    Returns:
        (num_samples - 400) // 320 + 1, at least 1. One second is 49 frames.

    Source: the convolution arithmetic of wav2vec 2.0 (Baevski et al. 2020, arXiv 2006.11477, section 2).
    """
    return (max(num_samples, WINDOW_LENGTH) - WINDOW_LENGTH) // HOP_LENGTH + 1


def pad_to_window(samples: Samples) -> Samples:
    """Zero-pad a recording that is shorter than one encoder window.

    Args:
        samples: (S,) at 16 kHz.

    Returns:
        (max(S, 400),).
    """
    missing = WINDOW_LENGTH - len(samples)
    return np.pad(samples, (0, missing)) if missing > 0 else samples


def load_audio(source: AudioSource | NDArray[Any], sampling_rate: int | None = None) -> Samples:
    """Read a whole recording.

    Args:
        source: path, encoded bytes, binary file object, or an array of samples: (S,), (channels, S) or (S, channels).
        sampling_rate: of an array, in Hz; None is 16,000. Files carry their own.

    Returns:
        (S,) float32, mono (mean of the channels), 16 kHz, S >= 1.

    Raises:
        AudioError: missing, empty or undecodable input, no samples, or samples that are not finite.
    """
    blocks = list(iter_audio(source, sampling_rate))
    if not blocks:
        raise AudioError(f"{describe(source)} contains no samples; expected at least one")
    return np.concatenate(blocks)


def iter_audio(
    source: AudioSource | NDArray[Any],
    sampling_rate: int | None = None,
    on_truncated: Callable[[], None] = lambda: None,
) -> Iterator[Samples]:
    """Read one recording in blocks of about ten seconds; arguments and errors as `load_audio`.

    Args:
        on_truncated: called at the end if the file holds less than its header promises, or lacks its end mark (Ogg).

    Yields:
        (n,) float32 at 16 kHz; concatenated they are what `load_audio` returns.
    """
    if isinstance(source, np.ndarray):
        decoded = _array_blocks(source, SAMPLING_RATE if sampling_rate is None else sampling_rate)
    else:
        if sampling_rate is not None:
            raise AudioError("expected sampling_rate with an array only; files carry their own")
        decoded = _decode(source, on_truncated)
    try:
        yield from _resample(decoded, describe(source))
    except OSError as error:  # the disk fails, or is full while a pipe is copied
        raise AudioError(f"{describe(source)} cannot be read: {error.strerror or error}") from error


def probe_duration_s(path: str | os.PathLike[str]) -> float | None:
    """Return a file's length in seconds from its header, which may be wrong; None if libsndfile cannot read it."""
    import soundfile

    try:
        info = soundfile.info(os.fspath(path)) if Path(path).is_file() else None
    except (soundfile.LibsndfileError, RuntimeError, ValueError, OSError):
        return None
    return info.frames / info.samplerate if info and info.samplerate else None


def describe(source: object) -> str:
    """Name an input in an error message."""
    if isinstance(source, (str, os.PathLike)):
        return repr(os.fspath(source))
    if isinstance(source, bytes):
        return f"{len(source)} bytes of audio"
    if isinstance(getattr(source, "name", None), str):
        return repr(source.name)  # type: ignore[attr-defined]
    return f"{type(source).__name__} input"


def _array_blocks(array: NDArray[Any], rate: int) -> Iterator[tuple[Samples, int]]:
    """Slice an array of samples into mono blocks, so that a long recording is never copied as a whole."""
    if array.ndim not in (1, 2):
        raise AudioError(f"expected an array of shape (samples,) or (channels, samples), found {array.shape}")
    if array.dtype.kind not in "fiu":
        raise AudioError(f"expected an array of real numbers, found {array.dtype}")
    if not array.size:
        raise AudioError(f"array of shape {array.shape} contains no samples; expected at least one")
    rows = array[:, None] if array.ndim == 1 else array.T if array.shape[0] <= array.shape[1] else array
    size = _block_size(rate, rows.shape[1])
    for begin in range(0, len(rows), size):
        block = rows[begin : begin + size]
        if block.dtype.kind != "f":  # integers are scaled to [-1, 1) by their type's range
            info = np.iinfo(block.dtype)
            half = (int(info.max) + 1 - int(info.min)) // 2
            block = (block.astype(np.float64) - (info.max + 1 - half)) / half
        yield _mean(block, axis=1), rate


def _block_size(rate: int, num_channels: int) -> int:
    return max(1, min(rate * BLOCK_S, MAX_BLOCK_VALUES // num_channels))


def _decode(source: AudioSource, on_truncated: Callable[[], None]) -> Iterator[tuple[Samples, int]]:
    """Yield mono blocks with their sampling rate, by soundfile if it can read the format, else by PyAV."""
    name = describe(source)
    with _open(source) as stream:
        if not stream.read(1):
            raise AudioError(f"{name} is empty (0 bytes); expected an audio file")
        stream.seek(0)
        import soundfile

        safe = _SafeStream(stream)
        try:
            sound = soundfile.SoundFile(safe)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            stream.seek(0)
            yield from _gather(_decode_with_av(stream, name, error, on_truncated))
            return
        with sound:
            rate, num_read = sound.samplerate, 0
            # The header's length is not used: 2**60 declared frames end where the file does.
            size = _block_size(rate, sound.channels)
            try:
                while len(block := sound.read(size, dtype="float32", always_2d=True)):
                    num_read += len(block)
                    yield _mean(block, axis=1), rate
            except (soundfile.LibsndfileError, RuntimeError) as error:
                safe.raise_error()
                raise AudioError(f"{name} is damaged: {_reason(error) or 'its data cannot be decoded'}") from error
        safe.raise_error()
        if is_truncated(stream, sound, num_read):
            on_truncated()


def _decode_with_av(
    stream: BinaryIO, name: str, first_error: Exception, on_truncated: Callable[[], None]
) -> Iterator[tuple[Samples, int]]:
    import av

    av.logging.set_level(None)  # errors reach the caller as exceptions, not on stderr
    try:
        # Playlists are files too: without this one could make FFmpeg open other files, or the network.
        with av.open(stream, options={"protocol_whitelist": ""}) as container:
            if not container.streams.audio:
                raise AudioError(f"{name} has no audio track; expected speech in WAV, FLAC, MP3, OGG, M4A or WebM")
            track = container.streams.audio[0]
            rate = int(getattr(track, "rate", None) or 0)  # a track in a coding FFmpeg cannot decode has none
            if not rate:
                raise AudioError(f"{name} has an audio track that cannot be decoded. Convert it to WAV or FLAC")
            to_float, num_read = av.AudioResampler(format="fltp", rate=rate), 0
            for frame in container.decode(track):
                for part in to_float.resample(frame):
                    num_read += part.samples
                    yield _mean(part.to_ndarray(), axis=0), rate
            if promised_s(container, track) - num_read / rate > MISSING_S:
                on_truncated()
    except AudioError:
        raise
    except (av.FFmpegError, ValueError, EOFError, IndexError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or _reason(error)
        raise AudioError(
            f"{name} is not readable as audio (libsndfile: {_reason(first_error)}; FFmpeg: {reason}); "
            "expected WAV, AIFF, FLAC, MP3, OGG, Opus, M4A, AAC or WebM"
        ) from error


def _gather(decoded: Iterator[tuple[Samples, int]]) -> Iterator[tuple[Samples, int]]:
    """Join FFmpeg's blocks of some 20 ms into blocks of `BLOCK_S`; every later step works on a block at a time."""
    held: list[Samples] = []
    num_held, rate, failure = 0, 0, None
    try:
        for block, rate in decoded:
            held.append(block)
            num_held += len(block)
            if num_held >= BLOCK_S * rate:
                yield np.concatenate(held), rate
                held, num_held = [], 0
    except AudioError as error:  # the samples before it count
        failure = error
    if held:
        yield np.concatenate(held), rate
    if failure is not None:
        raise failure


def _mean(block: NDArray[Any], axis: int) -> Samples:
    if block.shape[axis] == 1:  # the same values, without a reduction
        return np.asarray(block.squeeze(axis), dtype=np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # `_resample` reports values that are not finite
        return np.asarray(block.mean(axis=axis, dtype=np.float32))


class _SafeStream:
    """A stream for soundfile, whose methods never raise.

    soundfile calls them from C, where an exception is printed to stderr with its traceback and lost. A seek to before
    the beginning, as damaged files ask for, does nothing; a read error ends the file, and `raise_error` raises it.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.tell, self._read, self._seek = stream.tell, stream.read, stream.seek
        self._error: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._read(size)
        except OSError as error:
            self._error = error
            return b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with contextlib.suppress(OSError, ValueError, OverflowError):
            self._seek(offset, whence)
        return self.tell()

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error


def _reason(error: Exception) -> str:
    """Return a decoder's message without the name of the object it is about."""
    return one_line(error).rpartition(">: ")[2].removeprefix("Error opening ").rstrip(".")


def _open(source: AudioSource) -> contextlib.AbstractContextManager[BinaryIO]:
    """Open an input for reading from its start. A file object of the caller's stays open."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    name = describe(source)
    if not isinstance(source, (str, os.PathLike)):
        if not hasattr(source, "read"):
            raise AudioError(f"expected a path, bytes, a binary file object or a numpy array, found {name}")
        return contextlib.nullcontext(source) if _can_rewind(source) else _spool(source)
    try:
        # Not blocking: opening a named pipe without a writer would wait for ever.
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise AudioError(f"{name} does not exist. Check the path") from error
    except (OSError, ValueError) as error:
        raise AudioError(f"{name} cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    kind = os.fstat(handle).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
        os.close(handle)
        found = "directory" if stat.S_ISDIR(kind) else "device or socket"
        raise AudioError(f"{name} is a {found}; expected an audio file")
    os.set_blocking(handle, True)
    stream = os.fdopen(handle, "rb")
    if stat.S_ISREG(kind):
        return stream
    with stream:
        return _spool(stream)


def _can_rewind(stream: Any) -> bool:
    """Check whether a file object is a file, at its start, in binary mode, so that it needs no copy."""
    try:
        return bool(stream.seekable() and stream.tell() == 0 and stream.read(0) == b"")
    except (AttributeError, OSError, ValueError):
        return False


def _spool(stream: Any) -> BinaryIO:
    """Copy an input that cannot be rewound (a pipe, a socket); both decoders need to go back."""
    copy = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 (handed over to the caller)
    try:
        shutil.copyfileobj(stream, copy, 1 << 20)
    except BaseException as error:
        copy.close()
        if not isinstance(error, TypeError):
            raise
        raise AudioError(f"expected a file opened in binary mode, found text in {describe(stream)}") from error
    copy.seek(0)
    return cast(BinaryIO, copy)


def _resample(decoded: Iterator[tuple[Samples, int]], name: str) -> Iterator[Samples]:
    """Bring blocks to 16 kHz; the filter's state is carried from block to block."""
    import soxr

    resampler: soxr.ResampleStream | None = None
    for block, rate in decoded:
        if not MIN_SOURCE_RATE <= rate <= MAX_SOURCE_RATE:
            expected = f"{MIN_SOURCE_RATE} to {MAX_SOURCE_RATE} Hz"
            raise AudioError(f"{name} claims a sampling rate of {rate} Hz; expected {expected}")
        if not np.isfinite(block).all():
            raise AudioError(f"{name} holds samples that are NaN or infinite; expected finite values")
        if rate != SAMPLING_RATE:
            if resampler is None:
                resampler = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32", quality="HQ")
            block = resampler.resample_chunk(block)
        if len(block):
            yield block
    if resampler is not None:
        tail = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        if len(tail):
            yield tail
