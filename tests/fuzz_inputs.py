"""Hundreds of damaged and unusual inputs for `test_transcribe_fuzz`. Deterministic; written into a folder."""

import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000


def speech_like(rng: np.random.Generator, duration_s: float = 0.5, rate: int = RATE) -> np.ndarray:
    t = np.arange(int(duration_s * rate)) / rate
    return (0.2 * np.sin(2 * np.pi * 150 * t) + 0.02 * rng.standard_normal(len(t))).astype(np.float32)


def encoded(samples: np.ndarray, kind: str, rate: int = RATE, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def by_ffmpeg(samples: np.ndarray, container: str, codec: str) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.repeat(samples, 3)[None], format="fltp", layout="mono")
        frame.sample_rate = 48_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            output.mux(packet)
    return buffer.getvalue()


def wav_header(rate: int, channels: int, bits: int, kind: int = 1, size: int = 0xFFFFFFF0) -> bytes:
    block = max(1, channels * bits // 8)
    form = struct.pack(
        "<4sIHHIIHH", b"fmt ", 16, kind, channels, rate, (rate * block) & 0xFFFFFFFF, block & 0xFFFF, bits
    )
    return b"RIFF" + struct.pack("<I", size) + b"WAVE" + form + b"data" + struct.pack("<I", size)


def contents(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes)."""
    kinds = [("WAV", "wav"), ("FLAC", "flac"), ("OGG", "ogg"), ("MP3", "mp3"), ("AIFF", "aiff")]
    whole = {suffix: encoded(speech_like(rng), kind) for kind, suffix in kinds}
    whole["opus"] = encoded(speech_like(rng), "OGG", subtype="OPUS")
    whole |= {"webm": by_ffmpeg(speech_like(rng), "webm", "libopus"), "aac": by_ffmpeg(speech_like(rng), "adts", "aac")}
    for suffix, data in whole.items():
        for i, share in enumerate(rng.random(12)):
            yield f"truncated-{i}.{suffix}", data[: int(share * len(data))]
        for i in range(16):
            flipped = bytearray(data)
            for place in rng.integers(0, len(data) if i % 2 else min(len(data), 100), 1 + i):
                flipped[place] ^= 1 << int(rng.integers(8))
            yield f"flipped-{i}.{suffix}", bytes(flipped)
        yield f"wrong-suffix-{suffix}.wav", data
        yield f"twice.{suffix}", data + data
        yield f"late.{suffix}", bytes(1000) + data
    for rate in (0, 1, 7, 999, 1000, 384_000, 768_000, 2**31, 2**32 - 1):
        for channels in (0, 1, 32, 1024, 65_535):
            yield f"header-{rate}-{channels}.wav", wav_header(rate, channels, 16) + bytes(3200)
    for kind, bits in [
        (1, 0),
        (1, 7),
        (1, 64),
        (3, 16),
        (3, 32),
        (3, 64),
        (6, 8),
        (7, 8),
        (85, 16),
        (65_534, 16),
        (0, 16),
    ]:
        yield f"coding-{kind}-{bits}.wav", wav_header(RATE, 1, bits, kind) + bytes(rng.bytes(3200))
    for bad in (np.nan, np.inf, -np.inf, 1e38):
        samples = speech_like(rng)
        samples[100] = bad
        yield f"value-{bad}.wav", encoded(samples, "WAV", subtype="FLOAT")
    yield "all-nan.wav", encoded(np.full(8000, np.nan, np.float32), "WAV", subtype="FLOAT")
    yield "empty.wav", b""
    yield "no-samples.wav", encoded(np.zeros(0, np.float32), "WAV")
    yield "one-sample.wav", encoded(np.ones(1, np.float32), "WAV")
    yield "huge-au.au", b".snd" + struct.pack(">5I", 24, 2**32 - 1, 3, RATE, 1) + bytes(3200)
    yield "text.wav", b"these are words and no sound\n" * 100
    yield "playlist.mp3", b"#EXTM3U\n#EXTINF:10,\nhttp://192.0.2.1/secret.wav\n#EXT-X-ENDLIST\n"
    yield "concat.wav", b"ffconcat version 1.0\nfile /etc/passwd\n"
    yield "picture.mp3", b"\x89PNG\r\n\x1a\n" + rng.bytes(500)
    yield "page.ogg", b"<!doctype html><title>404</title>" * 20
    for i, size in enumerate((1, 2, 3, 4, 11, 12, 43, 44, 45, 100, 4096, 65_536)):
        yield f"noise-{i}.wav", rng.bytes(size)
        yield f"noise-{i}.mp3", b"\xff\xfb" + rng.bytes(size)
        yield f"zeros-{i}.flac", bytes(size)
    for name in (
        "new\nline",
        "tab\tstop",
        "semi;colon",
        "-dash",
        "--model",
        "quo'te\"",
        "  spaces ",
        "\u00e9\u4e2d\U0001f600",
    ):
        yield f"{name}.wav", whole["wav"]


def write_all(folder: Path, seed: int = 0) -> int:
    """Fill a folder; return the number of inputs."""
    rng = np.random.default_rng(seed)
    count = 0
    for name, data in contents(rng):
        (folder / name).write_bytes(data)
        count += 1
    (folder / os.fsdecode(b"not-utf8-\xff.wav")).write_bytes(encoded(speech_like(rng), "WAV"))
    (folder / "loop").symlink_to(folder)
    (folder / "self.wav").symlink_to(folder / "self.wav")
    (folder / "dangling.wav").symlink_to(folder / "nothing")
    (folder / "zero.wav").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.wav")
    (folder / "folder.wav").mkdir()
    (folder / "unreadable.wav").write_bytes(encoded(speech_like(rng), "WAV"))
    (folder / "unreadable.wav").chmod(0)  # root can read it anyway
    if Path("/proc/self/mem").exists():
        (folder / "disk-error.wav").symlink_to("/proc/self/mem")  # opens, and fails at the first byte
    return count + 6
