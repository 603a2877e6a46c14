"""Files that end before they should: what a header promises, or an end mark, against what was there.

libsndfile and FFmpeg take what there is for all there was, so a download that broke off decodes without a word. Nothing
here is needed to decode; where a format promises nothing, nothing is found. Travels with the checkpoint.
"""

import os
from typing import Any, BinaryIO, Literal

MISSING_S = 0.25  # seconds a header may promise too much; encoders' delays and wrongly counted header bytes are shorter
STREAMED_BYTES = 0x7FFF_F000  # from here on a chunk's size is what a program writes that cannot go back and correct it
MAX_CHUNKS = 64  # of a RIFF file looked through for its samples
OGG_TAIL_BYTES = 1 << 17  # holds the last page, which has 65,307 bytes at most


def promised_s(container: Any, track: Any) -> float:
    """Return the seconds that an MP4's or WebM's header declares for a track; 0 where FFmpeg only guesses."""
    if not {"mov", "matroska"} & set(container.format.name.split(",")):
        return 0.0
    if track.duration:
        return float(track.duration * track.time_base)
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0  # of the longest track


def is_truncated(stream: BinaryIO, sound: Any, num_read: int) -> bool:
    """Tell whether a file that libsndfile has read to its end was cut short.

    Args:
        stream: the file, anywhere; it is left anywhere.
        sound: the `soundfile.SoundFile` that read it.
        num_read: samples of each channel that came out.
    """
    promised = float(num_read)
    if sound.format in ("WAV", "WAVEX", "AIFF"):
        promised *= _declared_share(stream)
    elif sound.format == "OGG":
        return not _has_ogg_end(stream)
    elif sound.format == "FLAC" or (sound.format in ("MP3", "MPEG") and _counts_frames(stream)):
        promised = sound.frames if sound.frames < 1 << 48 else num_read  # a stream's header does not know
    return promised - num_read > MISSING_S * sound.samplerate


def _declared_share(stream: BinaryIO) -> float:
    """Divide the bytes that a RIFF or IFF header declares for its samples by those that are there; 1 if unknown."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    order: Literal["little", "big"] = "little" if stream.read(12).startswith(b"RIFF") else "big"
    for _ in range(MAX_CHUNKS):
        header = stream.read(8)
        size = int.from_bytes(header[4:], order)
        if header[:4] in (b"data", b"SSND"):
            present = end - stream.tell()
            return size / present if 0 < present < size < STREAMED_BYTES else 1.0
        stream.seek(size + size % 2, os.SEEK_CUR)
    return 1.0


def _has_ogg_end(stream: BinaryIO) -> bool:
    """Look for the flag "last page of its stream" (RFC 3533, section 6) in the last page."""
    stream.seek(-min(OGG_TAIL_BYTES, stream.seek(0, os.SEEK_END)), os.SEEK_END)
    tail = stream.read()
    page = tail.rfind(b"OggS")
    return page >= 0 and len(tail) > page + 5 and bool(tail[page + 5] & 4)


def _counts_frames(stream: BinaryIO) -> bool:
    """Tell whether an MP3 says how long it is, in its first frame; else libsndfile guesses from the bit rate."""
    stream.seek(0)
    head = stream.read(1 << 16)
    return b"Xing" in head or b"Info" in head
