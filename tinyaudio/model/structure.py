"""What the bytes of a file say about its structure: recordings joined in it, sizes that are wrong, a missing end.

Nothing is decoded here. A size in a header is a hint: where the bytes contradict it, the bytes are right. Formats that
state no length and have no end mark are never reported as cut short. Travels with the checkpoint.
"""

import os
import zlib
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Literal, NamedTuple

MISSING_S = 0.25  # seconds a header may promise too much; encoders' delays and wrongly counted header bytes are shorter
STREAMED_BYTES = 0x7FFF_F000  # from here on a 32-bit size is what a program writes that cannot go back and correct it
MISCOUNTED_BYTES = 256  # that a header may declare too many: some writers count its own bytes
MAX_CHUNKS = 256  # of a file searched for its samples
SEARCH_BYTES = 1 << 20  # read at a time when searching for a signature
MAX_RECORDINGS = 10_000  # joined in one file
FLAC_FRAME_BYTES = 1 << 18  # of the largest frame, where the header does not state it: 4,096 samples of eight channels
TAIL_TAGS_BYTES = 1 << 12  # of tags behind the last frame
OPUS_RATE = 48_000  # Hz, of Ogg's positions for Opus (RFC 7845, section 4)
MAX_JITTER_S = 0.1  # by which positions in Ogg may differ from what the packets hold


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One of the recordings joined in a file; most files hold one.

    Args:
        begin, end: its bytes in the file.
        patches: corrected header sizes, by their place in the recording.
        by_libsndfile: whether libsndfile may decode it; FFmpeg decodes all others.
        container: FFmpeg's name of the format, where the bytes leave no doubt; FFmpeg need not try all formats then.
        is_cut: its end is missing.
        is_damaged: parts of it are missing or changed.
        stated_s: seconds that its header states, 0 if it states none; a hint.
        promised_s: the same, where nothing contradicts it.
        is_exact: `promised_s` is exact, and time stamps count samples.
        num_flac_frames, flac_frame_length: frames of a FLAC file that libsndfile may decode, and samples in each.
        lacks_index: an MP4 without the index that describes its tracks.
    """

    begin: int
    end: int
    patches: dict[int, bytes] = field(default_factory=dict)
    by_libsndfile: bool = False
    container: str | None = None
    is_cut: bool = False
    is_damaged: bool = False
    stated_s: float = 0.0
    promised_s: float = 0.0
    is_exact: bool = False
    num_flac_frames: int = 0
    flac_frame_length: int = 0
    lacks_index: bool = False

    def is_short(self, read_s: float) -> bool:
        """Check whether so many decoded seconds are less than the recording had before it was cut."""
        return self.is_cut or self.promised_s - read_s > (1e-3 if self.is_exact else MISSING_S)


def recordings(stream: BinaryIO) -> list[Recording]:
    """Find the recordings in a file, at least one, in their order."""
    end = stream.seek(0, os.SEEK_END)
    found: list[Recording] = []
    begin = 0
    while begin < end and len(found) < MAX_RECORDINGS:
        recording = _first(stream, begin, end)
        found.append(recording)
        begin = recording.end
    return found or [Recording(begin=0, end=end)]


def _first(stream: BinaryIO, begin: int, end: int) -> Recording:
    """Describe the recording that begins at `begin`."""
    head = _read(stream, begin, 64)
    whole = Recording(begin=begin, end=end)
    for magic, form, layout in _CHUNKED:
        if head.startswith(magic) and form in head[: layout.first]:
            return _chunked(stream, whole, layout)
    if head.startswith(b".snd"):
        return _au(stream, whole, head)
    if head.startswith(b"OggS"):
        return _ogg(stream, begin, end)
    if head[4:8] in (b"ftyp", b"styp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return _mp4(stream, whole)
    if head.startswith(_EBML):
        return _matroska(stream, whole)
    if head.startswith(b"RIFF") and 0 < (size := int.from_bytes(head[4:8], "little")) < STREAMED_BYTES:  # AVI
        return replace(whole, is_cut=begin + 8 + size > end)
    if head.startswith(_ASF):
        return _asf(stream, whole)
    if head.startswith(b"FLV\x01"):
        return _flv(stream, whole)
    if head.startswith(b"\x47") and _read(stream, begin + 188, 1) == b"\x47":  # MPEG transport stream
        return replace(whole, is_cut=bool((end - begin) % 188))
    if head.startswith(b"wvpk"):
        return _wavpack(stream, whole)
    if head.startswith(b"TTA1"):
        return replace(whole, end=_next_signature(stream, b"TTA1\x01\x00", begin, end))
    after_tags = _skip_id3(stream, begin, end)
    if after_tags > begin:
        head = _read(stream, after_tags, 64)
    if head.startswith(_FLAC):
        return _flac(stream, whole, head, after_tags)
    if after_tags > begin or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0):
        return replace(whole, **_mp3_promise(_read(stream, after_tags, 4096), end - after_tags))
    return replace(whole, by_libsndfile=True)


def _read(stream: BinaryIO, begin: int, size: int) -> bytes:
    stream.seek(begin)
    return stream.read(size)


def _next_signature(stream: BinaryIO, signature: bytes, begin: int, end: int) -> int:
    """Return where the next file begins that is joined to the one at `begin`; `end` if there is none."""
    position = begin + 1
    while position < end:
        data = _read(stream, position, SEARCH_BYTES)
        found = data.find(signature) if data.rfind(signature) >= 0 else -1  # `rfind` is ten times as fast
        if found >= 0:
            return min(position + found, end)
        if len(data) < SEARCH_BYTES:
            break
        position += len(data) - len(signature) + 1
    return end


class _Layout(NamedTuple):
    """How a family of formats divides a file into chunks: sizes of the fields, and where the first chunk begins."""

    id_bytes: int
    size_bytes: int
    order: Literal["little", "big"]
    counts_header: bool
    alignment: int
    first: int
    samples: bytes


_W64_TAIL = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # of the GUIDs of Sony's W64, which begin with a RIFF name
_CHUNKED = [
    (b"RIFF", b"WAVE", _Layout(4, 4, "little", False, 2, 12, b"data")),
    (b"RF64", b"WAVE", _Layout(4, 4, "little", False, 2, 12, b"data")),
    (b"BW64", b"WAVE", _Layout(4, 4, "little", False, 2, 12, b"data")),
    (b"RIFX", b"WAVE", _Layout(4, 4, "big", False, 2, 12, b"data")),
    (b"FORM", b"AIF", _Layout(4, 4, "big", False, 2, 12, b"SSND")),
    (b"caff", b"caff", _Layout(4, 8, "big", False, 1, 8, b"data")),
    (b"riff", b"wave", _Layout(16, 8, "little", True, 8, 40, b"data" + _W64_TAIL)),
]
# What surrounds sound in a file: tags of players, and zeros that fill up a disk's sector.
TAGS = (b"TAG", b"ID3", b"APETAGEX", b"LYRICSBEGIN", b"3DI", b"\0\0\0\0")


def _chunked(stream: BinaryIO, whole: Recording, layout: _Layout) -> Recording:
    """Follow a file's chunks to its samples, and check the size that they are said to have."""
    begin, end = whole.begin, whole.end
    magic = _read(stream, begin, 4)
    header_bytes = layout.id_bytes + layout.size_bytes
    position, long_size, sizes = begin + layout.first, 0, {}
    for _ in range(MAX_CHUNKS):
        header = _read(stream, position, header_bytes)
        if len(header) < header_bytes:
            return replace(whole, by_libsndfile=True)
        size = int.from_bytes(header[layout.id_bytes :], layout.order)
        if layout.counts_header:
            size = max(size - header_bytes, 0) if size < 1 << 62 else size
        if header[: layout.id_bytes] == layout.samples:
            break
        if header[:4] == b"ds64":  # RIFF size and size of the samples, 64 bits each
            long_size = int.from_bytes(_read(stream, position + 16, 8), "little")
            sizes[position + 16 - begin] = 8
        if header[:4] == b"fmt " and int.from_bytes(_read(stream, position + 8, 2), layout.order) == 0x55:
            return whole  # MP3 in WAV
        position += header_bytes + size + -size % layout.alignment
    else:
        return replace(whole, by_libsndfile=True)
    data_begin = position + header_bytes
    present = end - data_begin
    is_long = bool(sizes) and size == 0xFFFF_FFFF
    declared = long_size if is_long else size
    unknown_from = STREAMED_BYTES if layout.size_bytes == 4 and not is_long else 1 << 62
    if 0 < declared < unknown_from and declared > present:
        return replace(whole, by_libsndfile=True, is_cut=declared - present > MISCOUNTED_BYTES)
    if 0 < declared < unknown_from:
        for tail in {data_begin + declared, data_begin + declared + -declared % layout.alignment}:
            known = _read(stream, tail, max(layout.first, header_bytes))
            if known.startswith(magic) and len(known) >= layout.first:  # another file of the same kind
                return replace(whole, end=tail, by_libsndfile=True)
            if known.startswith(b"ID3") and mpeg_frame(_read(stream, _skip_id3(stream, tail, end), 4)) is not None:
                return replace(whole, end=tail, by_libsndfile=True)  # an MP3
            if len(known) < header_bytes or known.startswith(TAGS) or _is_chunk(known, tail, end, layout):
                return replace(whole, by_libsndfile=True)
    if present <= 0:
        return replace(whole, by_libsndfile=True)
    if declared == 0 and _is_chunk(_read(stream, data_begin, header_bytes), data_begin, end, layout):
        return replace(whole, by_libsndfile=True)  # a file without samples
    # The size is unknown or wrong: the samples reach to the end of the file.
    most = (1 << 8 * layout.size_bytes) - 1
    patches: dict[int, bytes] = {}

    def patch(place: int, num_bytes: int, value: int) -> None:
        patches[place] = min(value, (1 << 8 * num_bytes) - 1).to_bytes(num_bytes, layout.order)

    if sizes:
        for place, num_bytes in sizes.items():
            patch(place, num_bytes, present)
            patch(place - 8, num_bytes, end - begin - 8)
    if not is_long:
        stated = present + header_bytes * layout.counts_header
        patch(position + layout.id_bytes - begin, layout.size_bytes, min(stated, most))
        if layout.first > 8:  # the size of everything
            patch(layout.id_bytes, layout.size_bytes, end - begin - 8 * (not layout.counts_header))
    return replace(whole, by_libsndfile=True, patches=patches)


def _is_chunk(header: bytes, position: int, end: int, layout: _Layout) -> bool:
    """Check whether bytes look like the header of a chunk that ends within the file."""
    size = int.from_bytes(header[layout.id_bytes : layout.id_bytes + layout.size_bytes], layout.order)
    is_name = all(32 <= letter < 127 for letter in header[:4])
    return is_name and position + layout.id_bytes + size <= end + layout.alignment


def _au(stream: BinaryIO, whole: Recording, head: bytes) -> Recording:
    """Check the size in an AU file's header; nothing follows its samples but another file."""
    data_begin, declared = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
    present = whole.end - whole.begin - data_begin
    if present < declared < STREAMED_BYTES:
        return replace(whole, by_libsndfile=True, is_cut=declared - present > MISCOUNTED_BYTES)
    if declared < present and _read(stream, whole.begin + data_begin + declared, 4) == b".snd":
        return replace(whole, by_libsndfile=True, end=whole.begin + data_begin + declared)
    return replace(whole, by_libsndfile=True, patches={8: b"\xff\xff\xff\xff"})


_FLAC = b"fLaC\x00\x00\x00\x22"  # its first block describes the stream, in 34 bytes
_FLAC_FRAME = b"\xff\xf8"  # with a fixed number of samples; the others have their position instead of a number
_MPEG_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # Hz, by version
_MPEG1_KBPS = {
    3: (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    2: (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_MPEG2_KBPS = {
    3: (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    1: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def _flac(stream: BinaryIO, whole: Recording, head: bytes, begin: int) -> Recording:
    """Read the number of samples in a FLAC header; 0 is unknown (RFC 9639, section 8.2).

    libsndfile decodes files that end with the frame that their header states.
    """
    shortest, longest = (int.from_bytes(head[place : place + 2], "big") for place in (8, 10))  # samples in a frame
    packed = int.from_bytes(head[18:26], "big")  # 20 bits rate, 3 channels, 5 depth, 36 samples
    rate, num_samples = packed >> 44, packed & (1 << 36) - 1
    stated_s = num_samples / rate if rate else 0.0
    end = _next_signature(stream, _FLAC, begin, whole.end)
    num_frames = 0
    if begin == whole.begin and shortest == longest > 0:
        num_frames = -(-num_samples // longest)
        num_bytes = int.from_bytes(head[15:18], "big") or FLAC_FRAME_BYTES  # of the largest frame
        tail = max(end - num_bytes - TAIL_TAGS_BYTES, begin)
        if _last_flac_frame(_read(stream, tail, end - tail)) != num_frames - 1:
            num_frames = 0
    return Recording(
        begin=whole.begin,
        end=end,
        by_libsndfile=num_frames > 0,
        num_flac_frames=num_frames,
        flac_frame_length=longest,
        stated_s=stated_s,
        promised_s=stated_s,
        is_exact=True,
    )


def _last_flac_frame(data: bytes) -> int | None:
    """Return the number of the last frame that begins in some bytes of FLAC (RFC 9639, section 9.1)."""
    place = data.rfind(_FLAC_FRAME)
    while place >= 0:
        head = data[place : place + 16]
        first = head[4] if len(head) > 4 else 0xFF
        num_code = 1 if first < 0x80 else 8 - (first ^ 0xFF).bit_length()  # bytes of the number, as in UTF-8
        size = 4 + num_code
        size += {6: 1, 7: 2}.get(head[2] >> 4, 0) + {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
        if num_code < 7 and len(head) > size and _crc_8(head[:size]) == head[size]:
            number = first & (0x7F if num_code == 1 else 0x7F >> num_code)
            for byte in head[5 : 4 + num_code]:
                number = number << 6 | byte & 0x3F
            return number
        place = data.rfind(_FLAC_FRAME, 0, place + 1)
    return None


def _crc_8(data: bytes) -> int:
    """Compute the checksum of a FLAC frame's header: polynomial x^8 + x^2 + x + 1."""
    checksum = 0
    for byte in data:
        checksum ^= byte
        for _ in range(8):
            checksum = (checksum << 1 ^ (0x107 if checksum & 0x80 else 0)) & 0x1FF
    return checksum


def has_all_flac_frames(stream: Any, num_frames: int) -> bool:
    """Check whether the numbers of a file's frames are 0, 1, ..., `num_frames` - 1; reads the file to its end."""
    number, code, position = 0, b"\0", 0
    while number < min(num_frames, 0x10_FFFF):  # in UTF-8, larger numbers have more bytes than Python's
        data = _read(stream, position, SEARCH_BYTES)
        place = data.find(_FLAC_FRAME)
        while place >= 0:
            if data.startswith(code, place + 4):
                number += 1
                code = chr(number).encode("utf-8", "surrogatepass")
            place = data.find(_FLAC_FRAME, place + 2)
        if len(data) < SEARCH_BYTES:
            break
        position += len(data) - 8  # the beginning of a frame may be divided
    return number >= num_frames


def _skip_id3(stream: BinaryIO, begin: int, end: int) -> int:
    """Return where ID3v2 tags end."""
    position = begin
    for _ in range(MAX_CHUNKS):
        head = _read(stream, position, 10)
        if len(head) < 10 or not head.startswith(b"ID3") or max(head[6:10]) > 127:
            break
        size = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        position += 10 + size + 10 * bool(head[5] & 0x10)
    return min(position, end)


def mpeg_frame(header: bytes) -> tuple[int, int, int] | None:
    """Read the header of an MPEG audio frame (MP1, MP2, MP3).

    Returns:
        Its bytes (0 if not stated), samples and sampling rate; None if it is not one.
    """
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE0 != 0xE0:
        return None
    version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3  # 3: MPEG-1, 2: MPEG-2, 0: 2.5; 3: layer I, 1: layer III
    rate_index, kbps_index = header[2] >> 2 & 3, header[2] >> 4
    if version == 1 or layer == 0 or rate_index == 3 or kbps_index == 15:
        return None
    rate = _MPEG_RATES[version][rate_index]
    kbps = (_MPEG1_KBPS if version == 3 else _MPEG2_KBPS)[layer][kbps_index]
    padding = header[2] >> 1 & 1
    if layer == 3:
        return (12_000 * kbps // rate + padding) * 4, 384, rate
    num_samples = 576 if layer == 1 and version != 3 else 1_152
    return num_samples // 8 * 1000 * kbps // rate + padding, num_samples, rate


def _mp3_promise(head: bytes, present: int) -> dict[str, Any]:
    """Read the length that an MP3 may state in its first frame (Xing, Info, VBRI); without one it is unknown."""
    frame = mpeg_frame(head)
    if frame is None:
        return {}
    num_frames = num_bytes = 0
    place = max(head.find(b"Xing", 0, 64), head.find(b"Info", 0, 64))
    if place > 0:
        flags = int.from_bytes(head[place + 4 : place + 8], "big")
        values = [int.from_bytes(head[place + 8 + 4 * i : place + 12 + 4 * i], "big") for i in range(2)]
        num_frames = values.pop(0) if flags & 1 else 0
        num_bytes = values.pop(0) if flags & 2 else 0
    elif head[36:40] == b"VBRI":
        num_bytes, num_frames = (int.from_bytes(head[place : place + 4], "big") for place in (46, 50))
    promised_s = num_frames * frame[1] / frame[2]
    following = head[frame[0] : frame[0] + 4] if frame[0] else b""
    is_layer_3 = head[1] & 0xFE == 0xFA or head[1] & 0xEE == 0xE2
    found: dict[str, Any] = {"stated_s": promised_s}
    if is_layer_3 and following[:2] == head[:2] and mpeg_frame(following) is not None:
        found["container"] = "mp3"
    if not num_bytes:
        return {**found, "promised_s": promised_s}
    # The number of bytes tells whether the file was cut; the last frame may be padding.
    return {**found, "is_cut": num_bytes - present > max(2 * frame[0], MISCOUNTED_BYTES)}


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
# Samples at 48 kHz in a frame of Opus, by the first five bits of a packet (RFC 6716, table 2).
_OPUS_FRAME = [480, 960, 1920, 2880] * 3 + [480, 960] * 2 + [120, 240, 480, 960] * 4


def _page_checksum(page: bytes) -> int:
    """Compute Ogg's CRC-32, which zlib's is with all bits in reverse order (RFC 3533, section 6)."""
    blank = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED)
    return int(f"{zlib.crc32(blank, 0xFFFF_FFFF) ^ 0xFFFF_FFFF:032b}"[::-1], 2)


def _ogg(stream: BinaryIO, begin: int, end: int) -> Recording:
    """Follow the pages of an Ogg file up to the first page of the next one.

    libsndfile decodes Opus and Vorbis alone, without gaps, from their beginning and with plausible positions; FFmpeg
    all the rest.
    """
    position, num_streams, has_data, has_end = begin, 0, False, False
    is_damaged = is_cut = False
    numbers: dict[int, int] = {}
    positions: _OggPositions | None = None
    while position < end:
        page = _read(stream, position, 27 + 255)
        if not page.startswith(b"OggS"):
            following = _next_signature(stream, b"OggS", position, end)
            is_damaged |= following < end or not has_end
            position = following
            continue
        lacing = page[27 : 27 + page[26]] if len(page) > 26 else b""
        size = 27 + len(lacing) + sum(lacing)
        if position + size > end or len(page) <= 26 or len(lacing) < page[26]:
            is_cut, position = True, end
            break
        page = _read(stream, position, size)
        is_damaged |= int.from_bytes(page[22:26], "little") != _page_checksum(page)
        flags = page[5]
        serial, number = (int.from_bytes(page[i : i + 4], "little") for i in (14, 18))
        if flags & 2:  # the first page of a stream
            if has_data:
                break
            num_streams += 1
            positions = _OggPositions.of(page[27 + len(lacing) :])
        else:
            has_data = True
            is_damaged |= number != numbers.get(serial, number - 1) + 1
            if positions is not None:
                positions.add(page, lacing)
        numbers[serial] = number
        has_end |= bool(flags & 4)
        position += size
    is_plain = num_streams == 1 and positions is not None and not positions.is_odd
    return Recording(
        begin=begin,
        end=position,
        by_libsndfile=is_plain and not is_damaged,
        is_cut=is_cut or not has_end,
        is_damaged=is_damaged,
    )


class _OggPositions:
    """Compares the positions that the pages of a stream state with the lengths of its packets.

    Args:
        rate: positions in one second.
        num_headers: packets before the first one of sound.
        longest: samples of a Vorbis packet at most; 0 for Opus, whose packets tell their length.

    Attributes:
        is_odd: a page is out of step: there is a gap, the stream does not begin at 0, or a position is wrong.
    """

    def __init__(self, rate: int, num_headers: int, longest: int) -> None:
        self.is_odd = False
        self._jitter = int(rate * MAX_JITTER_S)
        self._num_headers, self._longest = num_headers, longest
        self._position = 0  # of the last page
        self._unfinished = 0  # samples of the packet that continues on the next page

    @classmethod
    def of(cls, packet: bytes) -> "_OggPositions | None":
        """Read the first packet of a stream; None if it is neither Opus nor Vorbis."""
        if packet.startswith(b"OpusHead"):
            return cls(OPUS_RATE, 1, 0)
        if packet.startswith(b"\x01vorbis") and len(packet) >= 30:
            return cls(int.from_bytes(packet[12:16], "little"), 2, (1 << (packet[28] >> 4)) // 2)
        return None

    def add(self, page: bytes, lacing: bytes) -> None:
        """Take the next page of the stream."""
        offset, num_samples = 27 + len(lacing), 0
        is_first_segment = not page[5] & 1  # flag 1: the page continues a packet
        if self._longest and self._num_headers <= 0:
            num_samples, lacing = self._longest * (len(lacing) - lacing.count(255)), b""
        for value in lacing:
            if is_first_segment and self._num_headers <= 0:
                self._unfinished = self._longest or _opus_length(page[offset : offset + 2])
            offset += value
            is_first_segment = value < 255
            if is_first_segment:
                self._num_headers -= 1
                num_samples += self._unfinished
                self._unfinished = 0
        position = int.from_bytes(page[6:14], "little", signed=True)
        if position == -1:  # no packet ends on this page
            self._position += num_samples if not self._longest else 0
            return
        late = position - self._position - num_samples
        is_last = bool(page[5] & 4)  # it may end before its last packets do
        earliest = -num_samples if self._longest or is_last else 0
        self.is_odd |= not earliest - self._jitter <= late <= self._jitter
        self._position = position


def _opus_length(packet: bytes) -> int:
    """Count the samples of a packet at 48 kHz (RFC 6716, section 3.1 and 3.2)."""
    if not packet:
        return 0
    code = packet[0] & 3
    num_frames = (1, 2, 2, packet[1] & 63 if len(packet) > 1 else 0)[code]
    return _OPUS_FRAME[packet[0] >> 3] * num_frames


_EBML, _SEGMENT, _CLUSTER = bytes.fromhex("1a45dfa3"), 0x18538067, 0x1F43B675
_ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_UNKNOWN = -1


def _mp4(stream: BinaryIO, whole: Recording) -> Recording:
    """Follow the boxes of an MP4 up to the beginning of another file (ISO/IEC 14496-12, section 4.2)."""
    position, names = whole.begin, set()
    while position + 8 <= whole.end:
        header = _read(stream, position, 16)
        size, name = int.from_bytes(header[:4], "big"), header[4:8]
        if not all(32 <= letter < 127 or letter == 0xA9 for letter in name):
            break
        if name == b"ftyp" and b"moov" in names:
            return replace(whole, end=position)
        if size == 1:
            size = int.from_bytes(header[8:16], "big")
        elif size == 0:  # to the end of the file
            size = whole.end - position
        if size < 8:
            break
        names.add(name)
        position += size
    return replace(whole, is_cut=position > whole.end, lacks_index=b"moov" not in names)


def _element(stream: BinaryIO, position: int) -> tuple[int, int, int]:
    """Read the head of a Matroska element: its id, where its content begins, and its size or `_UNKNOWN` (RFC 8794)."""
    head = _read(stream, position, 12)
    if not head or not head[0] >> 4:
        return 0, position, 0
    id_bytes = 9 - head[0].bit_length()
    first = head[id_bytes] if len(head) > id_bytes else 0
    size_bytes = 9 - first.bit_length()
    if size_bytes > 8 or len(head) < id_bytes + size_bytes:
        return 0, position, 0
    mask = (1 << 7 * size_bytes) - 1
    size = int.from_bytes(head[id_bytes : id_bytes + size_bytes], "big") & mask
    return int.from_bytes(head[:id_bytes], "big"), position + id_bytes + size_bytes, _UNKNOWN if size == mask else size


def _matroska(stream: BinaryIO, whole: Recording) -> Recording:
    """Follow the elements of Matroska or WebM up to the next file, into segments and clusters of unknown size."""
    position = whole.begin
    while position < whole.end:
        if position > whole.begin and _read(stream, position, 4) == _EBML:
            return replace(whole, end=position)
        name, content, size = _element(stream, position)
        if not name:
            following = _next_signature(stream, _EBML, position, whole.end)
            return replace(whole, end=following, is_cut=following == whole.end and whole.end - position < 12)
        if size == _UNKNOWN:
            if name not in (_SEGMENT, _CLUSTER):
                break
            position = content
        else:
            position = content + size
    return replace(whole, is_cut=position > whole.end)


def _asf(stream: BinaryIO, whole: Recording) -> Recording:
    """Follow the objects of an ASF file (WMA, WMV), a GUID and a size each, up to the next file."""
    position = whole.begin
    while position + 24 <= whole.end:
        head = _read(stream, position, 24)
        if position > whole.begin and head.startswith(_ASF):
            return replace(whole, end=position)
        size = int.from_bytes(head[16:], "little")
        if size < 24:
            break
        position += size
    return replace(whole, is_cut=whole.end < position < whole.begin + (1 << 62))


def _wavpack(stream: BinaryIO, whole: Recording) -> Recording:
    """Follow the blocks of a WavPack file up to the next file, whose samples are counted from 0 again."""
    position, is_begun = whole.begin, False
    while position < whole.end:
        head = _read(stream, position, 32)
        if not head.startswith(b"wvpk"):  # a tag
            position = _next_signature(stream, b"wvpk", position, whole.end)
            continue
        if len(head) < 32:
            return replace(whole, is_cut=True)
        first_sample, num_samples, flags = (int.from_bytes(head[i : i + 4], "little") for i in (16, 20, 24))
        if is_begun and num_samples and not first_sample and flags & 0x800:  # the first block of several channels
            return replace(whole, end=position)
        is_begun |= num_samples > 0
        position += int.from_bytes(head[4:8], "little") + 8
    return replace(whole, is_cut=position > whole.end)


def _flv(stream: BinaryIO, whole: Recording) -> Recording:
    """Follow the tags of an FLV up to the next file."""
    position = whole.begin + int.from_bytes(_read(stream, whole.begin + 5, 4), "big") + 4
    while position < whole.end:
        header = _read(stream, position, 11)
        if header.startswith(b"FLV\x01"):
            return replace(whole, end=position)
        if not header or header[0] & 0x1F not in (8, 9, 18):
            return replace(whole, is_cut=False)
        position += 11 + int.from_bytes(header[1:4], "big") + 4
    return replace(whole, is_cut=position > whole.end)
