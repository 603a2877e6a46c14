"""Audio in: any file, bytes or array becomes mono float32 samples at 16 kHz.

Decoding is libsndfile's (soundfile) and, for what it cannot read (M4A, AAC, WebM, ...), FFmpeg's libraries inside the
PyAV wheel; no ffmpeg binary is ever called. Resampling is soxr at its "HQ" setting, which is part of a feature store's
fingerprint because it changes features. Everything is read in blocks, so memory follows what was decoded and not what
a header promises.

This module knows the frame formula of HuBERT and wav2vec 2.0, and nothing else about models.
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

from .errors import AudioError
from .truncation import MISSING_S, is_truncated, promised_s

SAMPLING_RATE = 16_000  # Hz; what HuBERT and wav2vec 2.0 were trained on
WINDOW_LENGTH = 400  # samples, 25 ms: receptive field of the convolutions (kernels 10,3,3,3,3,2,2)
HOP_LENGTH = 320  # samples, 20 ms: product of their strides (5,2,2,2,2,2,2)
RESAMPLER = "soxr-HQ"

MIN_SOURCE_RATE, MAX_SOURCE_RATE = 1_000, 768_000  # Hz; outside lie broken headers, not recordings
BLOCK_S = 10  # seconds decoded at a time
MAX_BLOCK_VALUES = 1 << 23  # samples of all channels decoded at a time: 32 MiB, whatever a header claims
SPOOL_BYTES = 1 << 26  # of an input without rewind kept in memory; the rest goes to a temporary file

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


def iter_audio(
    source: AudioSource | NDArray[Any],
    sampling_rate: int | None = None,
    on_truncated: Callable[[], None] = lambda: None,
) -> Iterator[Samples]:
    """Read one recording in blocks of about ten seconds; arguments and errors as `load_audio`.

    Args:
        on_truncated: called at the end if the file held less than its header promises, or lacks its end mark (Ogg).

    Yields:
        (n,) float32 at 16 kHz; joined they are what `load_audio` returns.
    """
    if isinstance(source, np.ndarray):
        decoded = _array_blocks(source, SAMPLING_RATE if sampling_rate is None else sampling_rate)
    else:
        if sampling_rate is not None:
            raise AudioError("sampling_rate goes with an array; files carry their own")
        decoded = _decode(source, on_truncated)
    try:
        yield from _resample(decoded, describe(source))
    except OSError as error:  # of the disk, or of its being full while a pipe is copied
        raise AudioError(f"{describe(source)} cannot be read: {error.strerror or error}") from error


def probe_duration_s(path: str | os.PathLike[str]) -> float | None:
    """Read a file's length from its header, seconds; None where that is not possible at no cost. Headers can lie."""
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
    """Slice an array of samples into mono blocks, so that no copy of an hour is ever made."""
    if array.ndim not in (1, 2):
        raise AudioError(f"array of shape {array.shape}; expected (samples,) or (channels, samples)")
    if array.dtype.kind not in "fiu":
        raise AudioError(f"array of {array.dtype}; expected real numbers")
    if not array.size:
        raise AudioError(f"array of shape {array.shape} holds no samples; expected at least one")
    _check_rate(rate, "array")
    rows = array[:, None] if array.ndim == 1 else array.T if array.shape[0] <= array.shape[1] else array
    size = _block_size(rate, rows.shape[1])
    for begin in range(0, len(rows), size):
        yield _mean(_as_float(rows[begin : begin + size]), axis=1), rate


def _as_float(array: NDArray[Any]) -> NDArray[Any]:
    """Scale integers to [-1, 1) by their type's range; floats stay what they are."""
    if array.dtype.kind == "f":
        return array
    info = np.iinfo(array.dtype)
    half = (int(info.max) + 1 - int(info.min)) // 2
    return np.asarray((array.astype(np.float64) - (info.max + 1 - half)) / half)


def _block_size(rate: int, num_channels: int) -> int:
    return max(1, min(rate * BLOCK_S, MAX_BLOCK_VALUES // num_channels))


def _decode(source: AudioSource, on_truncated: Callable[[], None]) -> Iterator[tuple[Samples, int]]:
    """Yield mono blocks with their sampling rate, by soundfile if it knows the format, else by PyAV."""
    name = describe(source)
    with _open(source) as stream:
        import soundfile

        patient = _Patient(stream)
        try:
            sound = soundfile.SoundFile(patient)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            stream.seek(0)
            yield from _gather(_decode_with_av(stream, name, str(error), on_truncated))
            return
        with sound:
            rate, num_read = sound.samplerate, 0
            _check_rate(rate, name)
            # The header's length is never believed: 2**60 declared frames end where the file does.
            size = _block_size(rate, sound.channels)
            try:
                while len(block := sound.read(size, dtype="float32", always_2d=True)):
                    num_read += len(block)
                    yield _mean(block, axis=1), rate
            except (soundfile.LibsndfileError, RuntimeError) as error:
                patient.complain()
                reason = _one_line(str(error)) or "its data does not decode"
                raise AudioError(f"{name} is damaged: {reason}") from error
        patient.complain()
        if is_truncated(stream, sound, num_read):
            on_truncated()


def _decode_with_av(
    stream: BinaryIO, name: str, first_error: str, on_truncated: Callable[[], None]
) -> Iterator[tuple[Samples, int]]:
    import av

    av.logging.set_level(None)  # its complaints reach the caller as exceptions, not on stderr
    try:
        # Playlists are files too: without this one could make FFmpeg open other files, or the network.
        with av.open(stream, options={"protocol_whitelist": ""}) as container:
            if not container.streams.audio:
                raise AudioError(f"{name} has no audio track; expected speech in WAV, FLAC, MP3, OGG, M4A or WebM")
            track = container.streams.audio[0]
            rate = int(getattr(track, "rate", None) or 0)  # a track in a coding FFmpeg cannot decode has none
            if not rate:
                raise AudioError(f"{name} has an audio track that cannot be decoded; convert it to WAV or FLAC")
            _check_rate(rate, name)
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
        second_error = getattr(error, "strerror", None) or str(error)
        reasons = f"libsndfile: {_one_line(first_error)}; FFmpeg: {_one_line(second_error)}"
        raise AudioError(
            f"{name} is not readable as audio ({reasons}); expected WAV, AIFF, FLAC, MP3, OGG, Opus, M4A, AAC or WebM"
        ) from error


def _gather(decoded: Iterator[tuple[Samples, int]]) -> Iterator[tuple[Samples, int]]:
    """Join FFmpeg's blocks of some 20 ms to blocks of `BLOCK_S`: everything behind works a block at a time."""
    held: list[Samples] = []
    num_held, rate, failure = 0, 0, None
    try:
        for block, rate in decoded:
            held.append(block)
            num_held += len(block)
            if num_held >= BLOCK_S * rate:
                yield np.concatenate(held), rate
                held, num_held = [], 0
    except AudioError as error:  # what came before it counts
        failure = error
    if held:
        yield np.concatenate(held), rate
    if failure is not None:
        raise failure


def _mean(block: NDArray[Any], axis: int) -> Samples:
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is found and named in `_resample`
        return np.asarray(block.mean(axis=axis, dtype=np.float32))


class _Patient:
    """A stream that stays where it is when a damaged file asks it to go before its beginning.

    soundfile calls it from C, where an exception cannot be raised and is printed to stderr with its traceback instead.
    What the disk complains of ends the file there, and is raised by `complain`.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.tell, self._read, self._seek = stream.tell, stream.read, stream.seek
        self._complaint: OSError | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._read(size)
        except OSError as error:
            self._complaint = error
            return b""

    def complain(self) -> None:
        if self._complaint is not None:
            raise self._complaint

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with contextlib.suppress(OSError, ValueError, OverflowError):
            self._seek(offset, whence)
        return self.tell()


def _one_line(message: str) -> str:
    """Shorten a library's message to what it says, without the object it says it about."""
    words = " ".join(message.split())
    _, found, reason = words.rpartition(">: ")
    return (reason if found else words).removeprefix("Error opening ").rstrip(".")


def _open(source: AudioSource) -> BinaryIO:
    """Open an input for reading from its start; an empty one is an error here, with its own words."""
    if isinstance(source, (bytes, bytearray)):
        stream: BinaryIO = io.BytesIO(source)
    elif isinstance(source, (str, os.PathLike)):
        stream = _open_path(source)
    elif hasattr(source, "read"):
        stream = _spool(source)
    else:
        raise AudioError(f"{describe(source)}: expected a path, bytes, a binary file object or a numpy array")
    try:
        is_empty = not stream.read(1)
    except OSError as error:
        stream.close()
        raise AudioError(f"{describe(source)} cannot be read: {error.strerror or error}") from error
    if is_empty:
        stream.close()
        raise AudioError(f"{describe(source)} is empty (0 bytes); expected an audio file")
    stream.seek(0)
    return stream


def _open_path(source: str | os.PathLike[str]) -> BinaryIO:
    name = describe(source)
    try:
        # Not blocking: opening a named pipe that nobody writes to would wait for ever.
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise AudioError(f"{name} does not exist; check the path") from error
    except IsADirectoryError as error:
        raise AudioError(f"{name} is a directory; expected an audio file") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise AudioError(f"{name} cannot be opened: {reason}") from error
    kind = os.fstat(handle).st_mode
    if stat.S_ISREG(kind) or stat.S_ISFIFO(kind):
        os.set_blocking(handle, True)
        stream = os.fdopen(handle, "rb")
        if stat.S_ISREG(kind):
            return stream
        with stream:
            return _spool(stream)
    os.close(handle)
    what = "directory" if stat.S_ISDIR(kind) else "device or socket"
    raise AudioError(f"{name} is a {what}; expected an audio file")


def _spool(stream: Any) -> BinaryIO:
    """Copy what cannot be rewound (pipes, sockets), which both decoders need; long input goes to a temporary file."""
    copy = tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES)  # noqa: SIM115 (handed over to the caller)
    try:
        shutil.copyfileobj(stream, copy, 1 << 20)
    except BaseException as error:
        copy.close()
        if not isinstance(error, TypeError):
            raise
        raise AudioError(f"{describe(stream)} gives text; expected a file opened in binary mode") from error
    copy.seek(0)
    return cast(BinaryIO, copy)


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
