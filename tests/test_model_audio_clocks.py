"""Time stamps decide when sound is heard; of several tracks the default one is heard, or the one that was asked for."""

import numpy as np
import pytest
from audio_files import correlation, speech, with_av

from tinyaudio.model.audio import SAMPLING_RATE, iter_audio, load_audio
from tinyaudio.model.errors import AudioError

CONTAINERS = [("mp4", "aac"), ("matroska", "aac"), ("mov", "pcm_s16le"), ("webm", "libopus"), ("matroska", "flac")]


def heard(data, **options):
    warnings = []
    samples = np.concatenate(list(iter_audio(data, on_warning=warnings.append, **options)))
    return samples, warnings


def loud_from(samples):
    """The second at which the sound begins."""
    return np.flatnonzero(np.abs(samples) > 0.05)[0] / SAMPLING_RATE


@pytest.mark.parametrize("start_s", [0.5, 3.0, 10.0])
@pytest.mark.parametrize(("container", "codec"), CONTAINERS)
def test_sound_that_begins_late_is_heard_late(container, codec, start_s):
    film = {"film_s": 4.0} if container != "webm" else {}
    samples, warnings = heard(with_av(container, codec, speech(2.0, 48_000), start_s=start_s, **film))
    assert warnings == []
    assert loud_from(samples) == pytest.approx(start_s, abs=0.1)
    assert len(samples) / SAMPLING_RATE == pytest.approx(start_s + 2.0, abs=0.15)


@pytest.mark.parametrize(("container", "codec"), [("mpegts", "aac"), ("flv", "aac"), ("mpeg", "mp2"), ("nut", "flac")])
def test_sound_that_begins_after_the_picture_is_heard_late(container, codec):
    rate = 44_100
    data = with_av(container, codec, speech(2.0, rate), rate=rate, start_s=3.0, film_s=6.0)
    assert loud_from(heard(data)[0]) == pytest.approx(3.0, abs=0.15)


def test_clock_of_a_stream_may_begin_anywhere():
    """A recording out of the middle of a broadcast is not preceded by hours of silence."""
    for container, codec in (("mpegts", "aac"), ("ogg", "libopus")):
        samples, _ = heard(with_av(container, codec, speech(2.0, 48_000), start_s=5_000.0))
        assert len(samples) / SAMPLING_RATE == pytest.approx(2.0, abs=0.15)


@pytest.mark.parametrize("gap_s", [0.5, 8.0, 40.0])
@pytest.mark.parametrize(("container", "codec"), [*CONTAINERS[1:2], *CONTAINERS[3:], ("mpegts", "aac")])
def test_gap_between_time_stamps_is_silence(container, codec, gap_s):
    samples, warnings = heard(with_av(container, codec, speech(4.0, 48_000), gap=(2.0, gap_s)))
    assert warnings == []
    assert len(samples) / SAMPLING_RATE == pytest.approx(4.0 + gap_s, abs=0.15)
    begin = int((2.1 + 0.1) * SAMPLING_RATE)
    assert np.abs(samples[begin : begin + int((gap_s - 0.35) * SAMPLING_RATE)]).max() < 0.02
    assert np.abs(samples[-SAMPLING_RATE:]).max() > 0.1


def test_broken_time_stamps_do_not_make_days_of_silence():
    samples, _ = heard(with_av("matroska", "flac", speech(4.0, 48_000), gap=(2.0, 500_000.0)))
    assert len(samples) / SAMPLING_RATE == pytest.approx(4.0, abs=0.1)


@pytest.mark.parametrize("default", [0, 1, 2])
@pytest.mark.parametrize("container", ["matroska", "mov"])
def test_default_track_is_heard_with_a_note_and_any_other_on_request(container, default):
    tracks = [speech(2.0, 48_000, seed=i) for i in range(3)]
    data = with_av(container, "flac" if container == "matroska" else "pcm_s16le", *tracks, default=default)
    alone = [load_audio(with_av("matroska", "flac", track)) for track in tracks]
    samples, warnings = heard(data)
    assert warnings == ["several_tracks"]
    assert correlation(alone[default], samples) > 0.99
    for number in (1, 2, 3):
        samples, warnings = heard(data, track=number)
        assert warnings == []
        assert correlation(alone[number - 1], samples) > 0.99


def test_track_that_does_not_exist_is_one_line():
    two = with_av("matroska", "flac", speech(1.0, 48_000), speech(1.0, 48_000))
    with pytest.raises(AudioError, match=r"has 2 audio tracks, found --track 3. Try --track 1 to 2"):
        list(iter_audio(two, track=3))
    for container, codec in (("wav", "pcm_s16le"), ("mp3", "mp3")):
        with pytest.raises(AudioError, match=r"has 1 audio track, found --track 2. Try --track 1"):
            list(iter_audio(with_av(container, codec, speech(1.0, 48_000)), track=2))
