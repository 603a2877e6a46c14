"""Detecting files that were cut short, by their header's promised length or their missing end mark.

libsndfile and FFmpeg decode an interrupted download without an error. Decoding needs nothing from here; formats that
promise no length are never reported. Travels with the checkpoint.
"""

import os
from typing import Any, BinaryIO, Literal

MISSING_S = 0.25  # seconds a header may promise too much; encoders' delays and wrongly counted header bytes are shorter
STREAMED_BYTES = 0x7FFF_F000  # from here on a chunk's size is what a program writes that cannot go back and correct it
MAX_CHUNKS = 64  # of a RIFF file searched for its samples
OGG_TAIL_BYTES = 1 << 17  # holds the last page, which has at most 65,307 bytes
MP3_HEAD_BYTES = 1 << 16  # holds the first frame


def promised_s(container: Any, track: Any) -> float:
    """Return the seconds that an MP4's or WebM's header declares for a track; 0 where FFmpeg only guesses."""
    if not {"mov", "matroska"} & set(container.format.name.split(",")):
        return 0.0
    if track.duration:
        return float(track.duration * track.time_base)
    return (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0  # the container's longest track


def is_truncated(stream: BinaryIO, sound: Any, num_read: int) -> bool:
    """Check whether a file that libsndfile has read to its end was cut short.

    Args:
        stream: the file, at any position; its position is changed.
        sound: the `soundfile.SoundFile` that read it.
        num_read: samples decoded of each channel.
    """
    promised = float(num_read)
    if sound.format in ("WAV", "WAVEX", "AIFF"):
        promised *= _declared_share(stream)
    elif sound.format == "OGG":  # its last page has the flag "last page of its stream" (RFC 3533, section 6)
        stream.seek(-min(OGG_TAIL_BYTES, stream.seek(0, os.SEEK_END)), os.SEEK_END)
        tail = stream.read()
        page = tail.rfind(b"OggS")
        return not (page >= 0 and len(tail) > page + 5 and tail[page + 5] & 4)
    elif sound.format in ("FLAC", "MP3", "MPEG"):
        stream.seek(0)
        # An MP3 may state its length in its first frame; without one libsndfile guesses from the bit rate.
        head = stream.read(MP3_HEAD_BYTES)
        is_stated = sound.format == "FLAC" or b"Xing" in head or b"Info" in head
        if is_stated and sound.frames < 1 << 48:  # more is the unknown length of a streamed file
            promised = sound.frames
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
