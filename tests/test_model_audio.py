"""Audio: formats, rates and channels without any system package; damaged files and wrong headers."""

import io
import os
import struct
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyaudio.model.audio import SAMPLING_RATE, iter_audio, load_audio, num_frames, pad_to_window, probe_duration_s
from tinyaudio.model.errors import AudioError


def sweep(duration_s=1.0, rate=16_000):
    t = np.arange(int(duration_s * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 300 * t) * t)).astype(np.float32)


def similarity(a, b):
    """Correlation at the best shift within 100 ms (encoders add a delay)."""
    n = min(len(a), len(b)) - 3200
    return max(np.corrcoef(a[1600 : 1600 + n], b[1600 + s : 1600 + s + n])[0, 1] for s in range(-1600, 1600, 4))


def wav_bytes(samples=None, rate=16_000, **kwargs):
    buffer = io.BytesIO()
    soundfile.write(buffer, sweep() if samples is None else samples, rate, format="WAV", **kwargs)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.wav", {}),
        ("x.wav", {"subtype": "FLOAT"}),
        ("x.wav", {"subtype": "ULAW"}),
        ("x.aiff", {}),
        ("x.flac", {}),
        ("x.mp3", {}),
        ("x.ogg", {}),
        ("x.opus", {"format": "OGG", "subtype": "OPUS"}),
    ],
)
def test_formats_of_libsndfile_are_read(tmp_path, name, options):
    soundfile.write(tmp_path / name, sweep(), 16_000, **options)
    samples = load_audio(tmp_path / name)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 16_000) < 2_500  # MP3 pads to whole frames
    assert similarity(sweep(), samples) > 0.97


@pytest.mark.parametrize(("suffix", "codec"), [("m4a", "aac"), ("webm", "libopus"), ("aac", "aac"), ("mp4", "aac")])
def test_formats_of_ffmpeg_are_read_without_its_binary(tmp_path, suffix, codec, monkeypatch):
    import av

    monkeypatch.setenv("PATH", "/nonexistent")
    path = tmp_path / f"x.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=48_000, layout="stereo")
        signal = np.stack([sweep(1.0, 48_000)] * 2)
        frame = av.AudioFrame.from_ndarray(signal, format="fltp", layout="stereo")
        frame.sample_rate = 48_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    samples = load_audio(path)
    assert abs(len(samples) - 16_000) < 2_500
    assert similarity(sweep(), samples) > 0.95


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 384_000])
@pytest.mark.parametrize("channels", [1, 2, 32])
def test_any_rate_and_channel_count_becomes_16_khz_mono(tmp_path, rate, channels):
    signal = np.tile(sweep(0.5, rate)[:, None], channels)
    soundfile.write(tmp_path / "x.wav", signal, rate, subtype="FLOAT")
    samples = load_audio(tmp_path / "x.wav")
    assert len(samples) == pytest.approx(8_000, abs=2)
    assert np.abs(samples[1600:-1600] - sweep(0.5)[1600 : len(samples) - 1600]).max() < 0.01


def test_every_kind_of_source_gives_the_same_samples(tmp_path):
    data = wav_bytes()
    (tmp_path / "x.wav").write_bytes(data)
    expected = load_audio(tmp_path / "x.wav")
    with open(tmp_path / "x.wav", "rb") as file:  # noqa: PTH123
        for source in (str(tmp_path / "x.wav"), data, io.BytesIO(data), file):
            assert np.array_equal(load_audio(source), expected)
    assert np.array_equal(np.concatenate(list(iter_audio(data))), expected)
    assert np.allclose(load_audio((sweep() * 32768).astype(np.int16)), expected, atol=1e-4)
    assert np.allclose(load_audio(np.stack([sweep()] * 2), 16_000), expected, atol=1e-4)
    assert np.allclose(load_audio(np.stack([sweep()] * 2, axis=1)), expected, atol=1e-4)


def test_arrays_of_another_rate_are_resampled_and_bad_ones_refused():
    assert len(load_audio(sweep(1.0, 8_000), 8_000)) == pytest.approx(16_000, abs=1)
    with pytest.raises(AudioError, match="sampling rate of 1 Hz"):
        load_audio(sweep(), 1)
    with pytest.raises(AudioError, match="sampling rate of 0 Hz"):
        load_audio(sweep(), 0)
    with pytest.raises(AudioError, match="no samples"):
        load_audio(np.zeros(0, np.float32))
    with pytest.raises(AudioError, match="real numbers"):
        load_audio(np.zeros(4, complex))
    with pytest.raises(AudioError, match="shape"):
        load_audio(np.zeros((2, 2, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_samples_that_are_not_finite_are_refused(bad):
    signal = sweep()
    signal[500] = bad
    with pytest.raises(AudioError, match="NaN or infinite"):
        load_audio(wav_bytes(signal, subtype="FLOAT"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: p.write_text("these are words, not sound\n" * 50), "not readable as audio|no audio track"),
        (lambda p: p.mkdir(), "is a directory"),
        (lambda p: None, "does not exist"),
        (lambda p: p.symlink_to(p), "symbolic links"),
        (lambda p: p.write_bytes(wav_bytes(np.zeros(0, np.float32))), "no samples"),
        (lambda p: p.write_bytes(wav_bytes()[:20]), "not readable"),
        (lambda p: os.mkfifo(p), "is empty"),
        (lambda p: p.symlink_to("/dev/zero"), "device or socket"),
    ],
)
def test_input_that_is_not_a_recording_is_one_clear_line(tmp_path, make, message):
    path = tmp_path / "x.wav"
    make(path)
    with pytest.raises(AudioError, match=message) as caught:
        load_audio(path)
    assert "\n" not in str(caught.value)


def test_impossible_file_names_are_one_clear_line():
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(AudioError, match="cannot be opened"):
            load_audio(name)


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs /dev/fd")
def test_process_substitution_is_read_to_its_end():
    """What `tinyaudio transcribe <(sox ...)` passes: the path of a pipe."""
    reader, writer = os.pipe()
    os.write(writer, wav_bytes(sweep(0.5)))
    os.close(writer)
    assert len(load_audio(f"/dev/fd/{reader}")) == 8_000
    os.close(reader)


def test_declared_sizes_are_not_trusted(tmp_path):
    """A header that promises 4 GB, and an AU file that promises 2**32 frames, are read to their real end."""
    data = bytearray(wav_bytes())
    data[40:44] = struct.pack("<I", 0xFFFFFFF0)
    assert len(load_audio(bytes(data))) == 16_000
    au = b".snd" + struct.pack(">5I", 24, 0xFFFFFFFF, 3, 16_000, 1) + bytes(3200)
    assert len(load_audio(au)) == 1600


def in_container(path, codec, duration_s=1.0, **options):
    """Written by FFmpeg's muxer for the path's suffix, a tenth of a second a frame."""
    import av

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=48_000, layout="mono")
        signal = sweep(duration_s, 48_000)
        packets = []
        for begin in range(0, len(signal), 4800):
            frame = av.AudioFrame.from_ndarray(signal[None, begin : begin + 4800], format="fltp", layout="mono")
            frame.sample_rate = 48_000
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode(None)]:
            container.mux(packet)
    return path


@pytest.mark.parametrize("name", ["x.wav", "x.aiff", "x.mp3", "x.ogg", "x.opus", "x.webm", "x.flac", "x.m4a"])
def test_half_a_file_is_reported_and_a_whole_one_is_not(tmp_path, name):
    """Cut off by a full disk or a broken download; libsndfile and FFmpeg read the half without an error."""
    path = tmp_path / name
    if name in ("x.webm", "x.m4a"):
        in_container(path, "libopus" if name == "x.webm" else "aac", 8.0, movflags="faststart")
    else:
        soundfile.write(path, sweep(8.0), 16_000, **({"format": "OGG", "subtype": "OPUS"} if name == "x.opus" else {}))
    told = []
    assert sum(map(len, iter_audio(path, on_warning=told.append))) == pytest.approx(128_000, abs=2_500)
    assert told == []
    share = 0.9 if name == "x.ogg" else 0.5  # of Vorbis, the first half of so short a file is its header
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert 16_000 < sum(map(len, iter_audio(path, on_warning=told.append))) < 128_000
    assert told == ["input_truncated"]


def test_sizes_of_streamed_files_do_not_count_as_truncation():
    """The sizes that ffmpeg and sox write into a pipe, and headers that include some of their own bytes."""
    told = []
    data = bytearray(wav_bytes())
    for size in (0xFFFFFFFF, 0xFFFFFFF0, 0x7FFFFFFF, 0x7FFFF000, 0, 32_000 + 44):
        data[40:44] = struct.pack("<I", size)
        for _ in iter_audio(bytes(data), on_warning=told.append):
            pass
    assert told == []


def test_blocks_of_arrays_and_of_ffmpeg_are_ten_seconds(tmp_path):
    """An array in one block was copied as a whole; 43 blocks a second slowed voice activity detection down."""
    assert [len(block) for block in iter_audio(sweep(25.0))] == [160_000, 160_000, 80_000]
    assert max(map(len, iter_audio(sweep(25.0, 8_000), 8_000))) < 170_000
    blocks = [len(block) for block in iter_audio(in_container(tmp_path / "x.m4a", "aac", 25.0))]
    assert len(blocks) <= 4
    assert sum(blocks) == pytest.approx(400_000, abs=2_500)


def test_what_ffmpeg_decoded_before_the_damage_is_kept(tmp_path):
    path = in_container(tmp_path / "x.m4a", "aac", 25.0, movflags="faststart")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    told = []
    assert 16_000 * 16 < sum(map(len, iter_audio(path, on_warning=told.append))) < 16_000 * 20
    assert told == ["input_truncated"]


def test_a_thousand_channels_are_read_in_bounded_blocks(tmp_path):
    """Ten seconds of 1,024 channels at 384 kHz would be 16 GB at once."""
    path = tmp_path / "wide.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1024)
        file.setsampwidth(2)
        file.setframerate(384_000)
        file.writeframes(bytes(2 * 1024 * 4000))
    assert len(load_audio(path)) == pytest.approx(167, abs=2)


def test_playlists_open_no_other_file(tmp_path):
    soundfile.write(tmp_path / "secret.wav", sweep(), 16_000)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nsecret.wav\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.ffconcat").write_text("ffconcat version 1.0\nfile secret.wav\n")
    for name in ("list.m3u8", "list.ffconcat"):
        with pytest.raises(AudioError):
            load_audio(tmp_path / name)


def test_text_file_objects_are_refused():
    with pytest.raises(AudioError, match="binary"):
        load_audio(io.StringIO("text"))


def test_length_is_read_from_the_header(tmp_path):
    (tmp_path / "x.wav").write_bytes(wav_bytes())
    assert probe_duration_s(tmp_path / "x.wav") == 1.0
    assert probe_duration_s(tmp_path / "nothing.wav") is None
    assert probe_duration_s(tmp_path) is None


def test_frames_are_counted_by_the_one_formula():
    assert [num_frames(n) for n in (0, 399, 400, 719, 720, 16_000)] == [1, 1, 1, 1, 2, 49]
    assert len(pad_to_window(np.zeros(3, np.float32))) == 400


def test_decoding_needs_neither_torch_nor_a_system_package():
    script = "import sys; from tinyaudio.model.audio import load_audio; load_audio; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={"PATH": ""}, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


@settings(max_examples=120, deadline=None)
@given(
    position=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    kind=st.sampled_from(["WAV", "FLAC", "OGG", "MP3", "AIFF"]),
)
def test_damaged_files_give_samples_or_an_audio_error(position, flips, kind):
    buffer = io.BytesIO()
    soundfile.write(buffer, sweep(0.3), SAMPLING_RATE, format=kind)
    data = bytearray(buffer.getvalue())
    for place, value in flips:
        data[int(place * (len(data) - 1))] = value
    problem = ""
    samples = np.zeros(1, np.float32)
    try:
        samples = load_audio(bytes(data[: int(position * len(data)) + 1]))
    except AudioError as error:
        problem = str(error)
    assert "\n" not in problem
    assert np.isfinite(samples).all()
    assert 1 <= len(samples) < 10_000_000
