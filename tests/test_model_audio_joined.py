"""Several recordings joined in one file, as `cat`, dashcams and radio servers join them: all of them are heard."""

import numpy as np
import pytest
from audio_files import correlation, speech, with_av, with_soundfile

from tinyaudio.model.audio import SAMPLING_RATE, iter_audio, load_audio

SINGLE = {
    "wav": lambda s, r: with_soundfile(s, r),
    "float wav": lambda s, r: with_soundfile(s, r, subtype="FLOAT"),
    "aiff": lambda s, r: with_soundfile(s, r, "AIFF"),
    "au": lambda s, r: with_soundfile(s, r, "AU"),
    "w64": lambda s, r: with_soundfile(s, r, "W64"),
    "flac": lambda s, r: with_soundfile(s, r, "FLAC"),
    "vorbis": lambda s, r: with_soundfile(s, r, "OGG"),
    "opus": lambda s, r: with_soundfile(s, r, "OGG", subtype="OPUS") if r != 44_100 else None,
    "ogg flac": lambda s, r: with_av("ogg", "flac", s, rate=r),
    "mp3": lambda s, r: with_soundfile(s, r, "MP3"),
    "mp3 without header": lambda s, r: with_av("mp3", "mp3", s, rate=r, options={"write_xing": "0"}),
    "aac": lambda s, r: with_av("adts", "aac", s, rate=r),
    "m4a": lambda s, r: with_av("mp4", "aac", s, rate=r),
    "webm": lambda s, r: with_av("webm", "libopus", s, rate=48_000) if r == 48_000 else None,
    "mka": lambda s, r: with_av("matroska", "flac", s, rate=r),
    "live mka": lambda s, r: with_av("matroska", "flac", s, rate=r, options={"live": "1"}),
    "flv": lambda s, r: with_av("flv", "aac", s, rate=r) if r == 44_100 else None,
    "tta": lambda s, r: with_av("tta", "tta", s, rate=r),
    "ts": lambda s, r: with_av("mpegts", "aac", s, rate=r),
}


@pytest.mark.parametrize("rates", [(48_000, 48_000, 48_000), (16_000, 44_100), (44_100, 44_100)], ids=str)
@pytest.mark.parametrize("kind", SINGLE)
def test_every_joined_recording_is_heard(kind, rates):
    parts = [SINGLE[kind](speech(2.0 + i, rate, seed=i), rate) for i, rate in enumerate(rates)]
    if None in parts:
        pytest.skip("not a rate of this format")
    if kind == "ts" and len(set(rates)) > 1:
        pytest.skip("FFmpeg keeps the first parameters of a stream")
    expected = [load_audio(part) for part in parts]
    warnings = []
    samples = np.concatenate(list(iter_audio(b"".join(parts), on_warning=warnings.append)))
    assert warnings == []
    tolerance = 2_500 if kind in ("mp3", "mp3 without header", "aac", "ts") else 2 * len(parts)
    assert len(samples) == pytest.approx(sum(map(len, expected)), abs=tolerance)
    begin = 0
    for part in expected:  # each in its place
        assert correlation(part[:16_000], samples[begin : begin + 20_000], most=2_400) > 0.9
        begin += len(part)


@pytest.mark.parametrize("kind", ["flac", "opus", "m4a", "wav"])
def test_last_of_joined_recordings_may_be_cut(kind):
    parts = [SINGLE[kind](speech(3.0, 48_000, seed=i), 48_000) for i in range(2)]
    if kind == "m4a":  # with its index in front
        parts = [
            with_av("mp4", "aac", speech(3.0, 48_000, seed=i), options={"movflags": "frag_keyframe+empty_moov"})
            for i in range(2)
        ]
    data = b"".join(parts)
    warnings = []
    duration_s = sum(map(len, iter_audio(data[: -len(parts[1]) // 3], on_warning=warnings.append))) / SAMPLING_RATE
    assert 3.5 < duration_s < 5.9
    assert warnings == ["input_truncated"]


def test_thirty_chained_ogg_streams_are_heard():
    data = b"".join(with_soundfile(speech(0.5, seed=i), format="OGG", subtype="OPUS") for i in range(30))
    assert sum(map(len, iter_audio(data))) / SAMPLING_RATE == pytest.approx(15.0, abs=0.3)


def heard(data):
    """The seconds that are decoded, and the warnings."""
    warnings = []
    return sum(map(len, iter_audio(data, on_warning=warnings.append))) / SAMPLING_RATE, warnings


def test_joined_wavpack_and_asf_are_heard_whole():
    parts = [speech(1.0 + i, 44_100, seed=i) for i in range(3)]
    for format, codec in (("wv", "wavpack"), ("asf", "mp3")):
        files = [with_av(format, codec, part, rate=44_100) for part in parts]
        duration_s, warnings = heard(b"".join(files))
        assert duration_s == pytest.approx(6.0, abs=0.2), format
        assert warnings == []
        duration_s, warnings = heard(b"".join(files)[:-9000])
        assert 3.0 < duration_s < 6.0, format
        assert "input_truncated" in warnings
    stereo = with_av("wv", "wavpack", np.stack([parts[2], parts[2]]), rate=44_100)
    assert heard(stereo + stereo) == (6.0, [])


def test_an_mp3_behind_a_wav_is_heard_and_its_tag_alone_is_not():
    wav, mp3 = with_soundfile(speech(2.0)), with_av("mp3", "mp3", speech(3.0, 44_100), rate=44_100)
    assert mp3.startswith(b"ID3")
    tag = mp3[: mp3.find(b"\xff\xfb")]
    assert heard(wav + mp3)[0] == pytest.approx(5.0, abs=0.1)
    assert heard(wav + tag) == (2.0, [])


def test_what_follows_an_mp3_and_is_neither_frames_nor_tags_is_reported():
    mp3 = with_soundfile(speech(3.0, 44_100), 44_100, "MP3")
    duration_s, warnings = heard(mp3 + with_soundfile(speech(3.0), format="FLAC"))
    assert duration_s == pytest.approx(3.0, abs=0.1)
    assert warnings == ["input_damaged"]
    for tail in (bytes(5000), b"TAG" + bytes(125), b"ID3\x04" + bytes(6000), b"\r\n"):
        assert heard(mp3 + tail)[1] == [], tail[:4]
