"""Every format from every kind of source: paths, pipes, file objects and buffers."""

import io
import os
import threading

import numpy as np
import pytest
from audio_files import speech, with_av, with_soundfile

from tinyaudio.model.audio import load_audio

FORMATS = {
    "m4a": lambda: with_av("mp4", "aac", speech(1.0, 48_000)),
    "webm": lambda: with_av("webm", "libopus", speech(1.0, 48_000)),
    "mkv": lambda: with_av("matroska", "ac3", speech(1.0, 48_000), film_s=1.0),
    "ts": lambda: with_av("mpegts", "mp2", speech(1.0, 48_000)),
    "avi": lambda: with_av("avi", "mp3", speech(1.0, 48_000), film_s=1.0),
    "wav": lambda: with_soundfile(speech(1.0)),
    "flac": lambda: with_soundfile(speech(1.0), format="FLAC"),
    "mp3": lambda: with_soundfile(speech(1.0), format="MP3"),
    "opus": lambda: with_soundfile(speech(1.0), format="OGG", subtype="OPUS"),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_source_gives_the_same_samples(kind, tmp_path):
    data = FORMATS[kind]()
    path = tmp_path / "no extension"
    path.write_bytes(data)
    expected = load_audio(path)
    assert len(expected) > 15_000
    with path.open("rb") as opened, path.open("rb", buffering=0) as raw:
        for source in (data, bytearray(data), memoryview(data), io.BytesIO(data), opened, raw, _Socket(data)):
            assert np.array_equal(load_audio(source), expected)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=fifo.write_bytes, args=(data,))
    writer.start()
    while not writer.is_alive():
        pass
    with fifo.open("rb") as pipe:
        assert np.array_equal(load_audio(pipe), expected)
    writer.join()


class _Socket:
    """A stream that can only be read forwards, in small pieces, and has a mode, as uploads of web servers do."""

    mode = "w+b"
    name = None

    def __init__(self, data):
        self._stream = io.BytesIO(data)

    def read(self, size=-1):
        return self._stream.read(min(size, 1000) if size > 0 else size)


@pytest.mark.parametrize("kind", ["mp3", "m4a"])
def test_decoders_write_nothing_to_stderr(kind, tmp_path, capfd):
    """libmpg123 printed its complaints there, past Python."""
    data = bytearray(FORMATS[kind]())
    rng = np.random.default_rng(0)
    for place in rng.integers(len(data) // 3, len(data), 60):
        data[place] ^= 0x55
    load_audio(bytes(data) if kind == "mp3" else FORMATS[kind]())
    load_audio(b"\0" * 2000 + FORMATS["mp3"]())
    captured = capfd.readouterr()
    assert captured.err == ""
    assert captured.out == ""


def test_block_borders_lose_no_sound():
    """soundfile seeks after every block; in Opus and MP3 each block then began with a damaged stretch."""
    import soundfile

    samples = speech(35.0, 48_000)
    for options in ({"format": "OGG", "subtype": "OPUS"}, {"format": "OGG"}, {"format": "FLAC"}):
        data = with_soundfile(samples, 48_000, **options)
        whole, _ = soundfile.read(io.BytesIO(data), dtype="float32")
        from tinyaudio.model.decoding import decode

        blocks = [block for block, _ in decode(io.BytesIO(data), "x", None, lambda code: None)]
        assert len(blocks) > 3
        assert np.array_equal(np.concatenate(blocks), whole[: sum(map(len, blocks))])
        assert abs(sum(map(len, blocks)) - len(whole)) == 0


def test_metadata_in_an_old_encoding_does_not_matter():
    data = with_av("avi", "mp3", speech(1.0, 44_100), rate=44_100)
    place = data.find(b"Lavf")
    assert place > 0
    data = data[:place] + b"\xe9\xff\xfe\xe8" + data[place + 4 :]
    assert len(load_audio(data)) > 15_000
