"""Decoding a file block by block: by libsndfile, or packet by packet by FFmpeg's libraries in PyAV's wheel.

libsndfile decodes PCM in all its containers, FLAC, Opus and Vorbis; features in existing stores depend on its samples.
FFmpeg decodes everything else, and what is damaged. Both read forwards only: a decoder that seeks loses sound where it
lands. The ffmpeg binary is never called. Travels with the checkpoint.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from .errors import AudioError, one_line
from .mixing import Mixer
from .source import Part
from .structure import MISSING_S, TAGS, Recording, has_all_flac_frames, mpeg_frame, recordings

BLOCK_S = 10  # seconds decoded at a time
MAX_BLOCK_VALUES = 1 << 23  # values of all channels decoded at a time: 32 MiB, whatever a header claims
MAX_CHANNELS = 1_024  # libsndfile's own limit

MIN_GAP_S = 0.1  # between time stamps, filled with silence; shorter ones are rounding and the delays of encoders
MAX_GAP_S = 6 * 3600.0  # a longer one is a broken time stamp
MAX_SPLICE_S = 600.0  # a longer one in a broadcast format is another recording, whose clock begins anywhere
# Containers with time stamps of their own, by FFmpeg's names. The timeline of the first begins at 0, with or without
# sound; that of the others with the first sound or picture, since a stream is recorded from the middle of a broadcast.
_FROM_ZERO = {"mov", "matroska"}
_FROM_FIRST = {"mpegts", "mpeg", "ogg"}
_TIMED = _FROM_ZERO | _FROM_FIRST | {"asf", "flv", "nut", "avi", "flac"}
_MPEG_AUDIO = {"mp3", "mp2"}
_RAW = _MPEG_AUDIO | {"aac", "ac3", "eac3"}  # frames one after the other; what lies between them is no sound

MAX_REST_BYTES = 1 << 12  # behind the last frame, of what is neither frames nor tags

OnWarning = Callable[[str], None]
Block = tuple[NDArray[np.float32], int]  # (n,) mono samples and their sampling rate in Hz

_SCALES = {"u1": (1 / 128, 1.0), "i2": (1 / (1 << 15), 0.0), "i4": (1 / (1 << 31), 0.0), "i8": (1 / (1 << 63), 0.0)}
_DTYPES = {"u8": "u1", "s16": "i2", "s32": "i4", "s64": "i8", "flt": "f4", "dbl": "f8"}


def decode(stream: BinaryIO, name: str, track: int | None, on_warning: OnWarning) -> Iterator[Block]:
    """Decode a file, and all recordings joined in it.

    Args:
        stream: at any position; read forwards and backwards.
        name: of the input, in error messages.
        track: number of the audio track, from 1; None is the default track.
        on_warning: called with a code of `guard.CODES`, once for each code.

    Raises:
        AudioError: nothing can be decoded.
        OSError: the stream cannot be read.
    """
    warned: set[str] = set()

    def warn(code: str) -> None:
        if code not in warned:
            warned.add(code)
            on_warning(code)

    found, num_blocks = recordings(stream), 0
    for number, recording in enumerate(found, 1):
        part = Part(stream, recording.begin, recording.end, recording.patches)
        try:
            for block in _decode_one(part, recording, name, track, warn):
                num_blocks += 1
                yield block
        except AudioError:
            if not num_blocks or recording.begin == 0:
                raise
            # What follows a recording is damaged, or is not one.
            warn("input_truncated" if number == len(found) else "input_damaged")
        finally:
            part.raise_error()


def block_size(rate: int, num_channels: int) -> int:
    """Return how many samples of each channel are decoded at a time."""
    return max(1, min(rate * BLOCK_S, MAX_BLOCK_VALUES // num_channels))


def _decode_one(part: Part, recording: Recording, name: str, track: int | None, warn: OnWarning) -> Iterator[Block]:
    import soundfile

    reason, known_s = "", 0.0  # seconds that were decoded already
    if recording.by_libsndfile:
        try:
            sound = soundfile.SoundFile(cast(BinaryIO, part))
        except (soundfile.LibsndfileError, RuntimeError) as error:
            reason = f"libsndfile: {_reason(error)}; "
        else:
            if track not in (None, 1):
                sound.close()
                raise AudioError(f"{name} has 1 audio track, found --track {track}. Try --track 1, or omit it")
            # soundfile would seek after every read, and Opus loses sound where its decoder lands.
            sound.seekable = lambda: False
            failed_at_s = yield from _with_libsndfile(sound, part, recording, name, warn)
            if failed_at_s is None:
                return
            known_s = failed_at_s
    part.raise_error()
    part.seek(0)
    for block, rate in _FFmpegDecoder(part, recording, name, track, warn, reason).blocks():
        num_known = min(round(known_s * rate), len(block))  # libsndfile's rate for Opus may be another
        known_s = max(known_s - len(block) / rate, 0.0)
        if num_known < len(block):
            yield block[num_known:], rate


def _with_libsndfile(
    sound: Any, part: Part, recording: Recording, name: str, warn: OnWarning
) -> Generator[Block, None, float | None]:
    """Decode with libsndfile.

    Returns:
        None at the end. For FLAC and Ogg that libsndfile cannot decode to their end, the seconds before the block that
        it failed in: FFmpeg omits the damaged or missing frames only.
    """
    import soundfile

    with sound:
        rate, num_read, mixer = sound.samplerate, 0, Mixer()
        is_checked = not recording.num_flac_frames
        # The header's length is not used: 2**60 declared frames end where the file does.
        longest = block_size(rate, sound.channels)
        try:
            while True:
                size = min(longest, max(sound.frames - num_read, 1))  # a larger array costs a short clip 0.2 ms
                block = sound.read(size, dtype="float32", always_2d=True)
                if not len(block):
                    break
                if not is_checked and _has_blank_frame(block, num_read, recording.flac_frame_length):
                    here, is_checked = part.tell(), True
                    if not has_all_flac_frames(part, recording.num_flac_frames):
                        return num_read / rate
                    part.seek(here)
                num_read += len(block)
                yield mixer.mix(block, rate), rate
                if recording.num_flac_frames and num_read == sound.frames:  # libsndfile reads no further
                    break
        except (soundfile.LibsndfileError, RuntimeError) as error:
            part.raise_error()
            if sound.format in ("FLAC", "OGG"):
                return num_read / rate
            if not num_read:
                raise AudioError(f"{name} is damaged: {_reason(error) or 'its data cannot be decoded'}") from error
            warn("input_truncated")
    part.raise_error()
    if mixer.num_cancelled:
        warn("channels_cancel")
    if rate and recording.is_short(num_read / rate):
        warn("input_truncated")
    return None


def _has_blank_frame(block: NDArray[np.float32], num_before: int, frame_length: int) -> bool:
    """Check whether a FLAC frame that begins in a block is all zeros, as libsndfile makes it of a missing frame."""
    first = -num_before % frame_length
    candidates = np.flatnonzero(block[first::frame_length, 0] == 0)
    return any(not block[begin : begin + frame_length].any() for begin in first + candidates * frame_length)


class _FFmpegDecoder:
    """Decodes one recording packet by packet."""

    def __init__(
        self, part: Part, recording: Recording, name: str, track: int | None, warn: OnWarning, reason: str
    ) -> None:
        self._part, self._recording, self._name, self._track = part, recording, name, track
        self._warn, self._reason = warn, reason
        self._held: list[bytearray] = []  # the planes of frames, joined
        self._kind: tuple[str, int, int] | None = None  # sample format, channels and rate of the frames held
        self._num_held = self._block_size = self._bytes_per_sample = 0
        self._dtype: np.dtype[Any] = np.dtype("f4")
        self._mixer = Mixer()
        self._read_s = 0.0  # of all blocks given, silence included

    def blocks(self) -> Iterator[Block]:
        import av

        av.logging.set_level(None)  # errors reach the caller as exceptions, not on stderr
        try:
            # Playlists are files too: without this one could make FFmpeg open other files, or the network.
            container = av.open(
                cast(BinaryIO, self._part),
                mode="r",
                format=self._recording.container,
                options={"protocol_whitelist": ""},
                metadata_errors="replace",
            )
        except (av.FFmpegError, ValueError, EOFError, IndexError, NotImplementedError) as error:
            self._part.raise_error()
            raise self._unreadable(error) from error
        with container:
            yield from self._tracks(container)

    def _tracks(self, container: Any) -> Iterator[Block]:
        import av

        track = self._choose(container)
        formats = set(container.format.name.split(","))
        track.codec_context.thread_count = 1  # as fast for one recording; several are decoded at once
        tick_s = float(track.time_base) if formats & _TIMED and track.time_base else 0.0
        if formats == {"flac"}:
            track.codec_context.options = {"err_detect": "crccheck+explode"}  # a damaged frame is left out, not noise
        origin_s = 0.0 if formats & _FROM_ZERO or container.start_time is None else container.start_time / 1e6
        longest_gap_s = MAX_SPLICE_S if formats & _FROM_FIRST else MAX_GAP_S
        is_raw = bool(formats & _RAW)
        counts_bytes = is_raw and "aac" not in formats  # of AAC, FFmpeg counts the bytes of frames only
        failed, failure, last = False, None, None
        end = -1  # of the last packet; -1 if it is not known
        rest: list[Any] = []
        packets, decode_packet = container.demux(track), track.codec_context.decode
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                break
            except (av.FFmpegError, ValueError, EOFError) as error:  # the file ends inside a packet
                self._part.raise_error()
                failure = error
                self._warn("input_truncated")
                with contextlib.suppress(av.FFmpegError, ValueError, EOFError):
                    rest = track.codec_context.decode(None)
                break
            try:
                frames = decode_packet(packet)
            except (av.FFmpegError, ValueError, EOFError) as error:
                self._part.raise_error()
                failure = error
                failed = failed or not formats & _MPEG_AUDIO or mpeg_frame(bytes(packet)) is not None
                continue
            if is_raw and (size := packet.size):
                position, last = packet.pos, packet
                is_apart = counts_bytes and position is not None and position > end >= 0
                if is_apart and not self._peek(end).startswith(TAGS):  # frames there have been damaged
                    self._warn("input_damaged")
                end = -1 if position is None else position + size
            for frame in frames:
                num_samples = frame.samples
                if not num_samples:
                    continue
                if failed and not frame.is_corrupt:  # sound follows a packet that could not be decoded
                    self._warn("input_damaged")
                failed = frame.is_corrupt
                kind = (frame.format.name, frame.layout.nb_channels, frame.sample_rate)
                if kind != self._kind:
                    yield from self._flush()
                    self._begin(kind)
                if tick_s and (pts := frame.pts) is not None:
                    gap_s = pts * tick_s - origin_s - self._read_s - self._num_held / kind[2]
                    if gap_s > longest_gap_s:
                        origin_s += gap_s
                    elif gap_s > (1e-3 if self._recording.is_exact else MIN_GAP_S):
                        if self._recording.is_exact:
                            self._warn("input_damaged")
                        yield from self._flush()
                        yield from self._silence(gap_s, kind[2])
                self._hold(frame, num_samples)
                if self._num_held >= self._block_size:
                    yield from self._flush()
        for frame in rest:
            kind = (frame.format.name, frame.layout.nb_channels, frame.sample_rate)
            if kind == self._kind and frame.samples:
                self._hold(frame, frame.samples)
        yield from self._flush()
        if not self._read_s:
            raise self._unreadable(failure) from failure
        if self._mixer.num_cancelled:
            self._warn("channels_cancel")
        if self._recording.is_damaged:
            self._warn("input_damaged")
        if last is not None and end >= 0:
            header = mpeg_frame(bytes(last)) if formats & _MPEG_AUDIO else None
            failed = failed or (header is not None and last.size < header[0])
            if "aac" in formats and not failed and end < self._part.seek(0, 2) and not self._has_tags():
                self._warn("input_damaged")
            rest_bytes = self._part.seek(0, 2) - end
            if counts_bytes and rest_bytes > MAX_REST_BYTES and not self._peek(end).startswith(TAGS):
                self._warn("input_damaged")
            failed = failed or (counts_bytes and self._peek(end)[:1] == bytes(last)[:1])  # half a header
        if failed or self._recording.is_short(self._read_s) or self._is_short(container, track):
            self._warn("input_truncated")

    def _choose(self, container: Any) -> Any:
        """Choose a track as players do: the first one flagged as default and meant for everybody, else the first."""
        from av.stream import Disposition

        tracks = list(container.streams.audio)
        if not tracks:
            raise AudioError(f"{self._name} has no audio track; expected speech in WAV, FLAC, MP3, OGG, M4A or WebM")
        known = [track for track in tracks if track.codec_context is not None]
        if self._track is not None:
            if not 1 <= self._track <= len(tracks):
                raise AudioError(
                    f"{self._name} has {len(tracks)} audio track{'s' * (len(tracks) > 1)}, found --track "
                    f"{self._track}. Try --track 1{f' to {len(tracks)}' * (len(tracks) > 1)}"
                )
            known = [tracks[self._track - 1]] if tracks[self._track - 1].codec_context is not None else []
        if not known:
            raise AudioError(f"{self._name} has an audio track that cannot be decoded. Convert it to WAV or FLAC")
        if len(tracks) == 1:
            return known[0]
        if self._track is None:
            self._warn("several_tracks")
        special = Disposition.comment | Disposition.visual_impaired | Disposition.hearing_impaired
        return min(
            known,
            key=lambda track: (bool(track.disposition & special), not track.disposition & Disposition.default),
        )

    def _peek(self, position: int) -> bytes:
        """Read a few bytes without moving FFmpeg's place in the file."""
        here = self._part.tell()
        self._part.seek(position)
        head = self._part.read(16)
        self._part.seek(here)
        return head

    def _has_tags(self) -> bool:
        self._part.seek(0)
        while data := self._part.read(1 << 20):
            if any(tag in data for tag in (b"ID3", b"TAG")):
                return True
        return False

    def _begin(self, kind: tuple[str, int, int]) -> None:
        """Prepare for frames of another sample format, number of channels or rate."""
        name, num_channels, rate = self._kind = kind
        if not rate:
            raise AudioError(f"{self._name} has an audio track without a sampling rate. Convert it to WAV or FLAC")
        self._dtype = np.dtype(_DTYPES[name.removesuffix("p")])
        self._bytes_per_sample = self._dtype.itemsize * (1 if name.endswith("p") else num_channels)  # of a plane
        self._block_size = block_size(rate, num_channels)
        self._held = [bytearray() for _ in range(num_channels if name.endswith("p") else 1)]

    def _hold(self, frame: Any, num_samples: int) -> None:
        """Keep a frame of some 20 ms, until those held make a block, with which every later step works."""
        size = num_samples * self._bytes_per_sample
        # Copied at once, so that FFmpeg can use the frame's memory again: new memory takes 30 % longer to decode into.
        for held, plane in zip(self._held, frame.planes, strict=True):
            held += plane if plane.buffer_size == size else memoryview(plane)[:size]
        self._num_held += num_samples

    def _flush(self) -> Iterator[Block]:
        if self._kind is None or not self._num_held:
            return
        name, num_channels, rate = self._kind
        planes = [np.frombuffer(held, self._dtype) for held in self._held]
        self._read_s += self._num_held / rate
        self._held, self._num_held = [bytearray() for _ in planes], 0
        channels = [_to_float(plane) for plane in planes]
        if name.endswith("p"):
            block = channels[0][:, None] if num_channels == 1 else np.stack(channels, axis=1)
        else:
            block = channels[0].reshape(-1, num_channels)
        yield self._mixer.mix(block, rate), rate

    def _silence(self, duration_s: float, rate: int) -> Iterator[Block]:
        remaining = round(duration_s * rate)
        self._read_s += remaining / rate
        while remaining > 0:
            size = min(remaining, rate * BLOCK_S)
            yield np.zeros(size, np.float32), rate
            remaining -= size

    def _is_short(self, container: Any, track: Any) -> bool:
        """Check the duration that an MP4 or WebM declares; FFmpeg only guesses that of other formats."""
        formats, promised_s = set(container.format.name.split(",")), 0.0
        if "mov" in formats and track.duration:
            promised_s = float(track.duration * track.time_base)
        elif formats & _FROM_ZERO and len(container.streams) == 1:
            promised_s = (container.duration or 0) / 1e6  # of the longest track, which may be a picture's
        return promised_s - self._read_s > MISSING_S

    def _unreadable(self, error: Exception | None) -> AudioError:
        if self._recording.lacks_index:
            return AudioError(
                f"{self._name} has no index (moov), which MP4 recorders write last: it was cut short. Copy it again"
            )
        reason = getattr(error, "strerror", None) or (_reason(error) if error else "no sound in its audio track")
        return AudioError(
            f"{self._name} is not readable as audio ({self._reason}FFmpeg: {reason}); "
            "expected WAV, AIFF, FLAC, MP3, OGG, Opus, M4A, AAC or WebM"
        )


def _to_float(values: NDArray[Any]) -> NDArray[np.float32]:
    """Scale integers to [-1, 1), as libsndfile does."""
    kind = values.dtype.str[1:]
    if kind not in _SCALES:
        return values.astype(np.float32, copy=False)
    scale, offset = _SCALES[kind]
    scaled = values.astype(np.float32)
    scaled *= np.float32(scale)
    if offset:
        scaled -= np.float32(offset)
    return scaled


def _reason(error: Exception) -> str:
    """Return a decoder's message without the name of the object it is about."""
    return one_line(error).rpartition(">: ")[2].removeprefix("Error opening ").rstrip(".")
