"""Channels that cancel each other are heard, with a warning; ordinary ones are mixed as they always were."""

import numpy as np
import pytest
from audio_files import correlation, speech, with_av, with_soundfile

from tinyaudio.model.audio import iter_audio
from tinyaudio.model.mixing import Mixer

RATE = 16_000


def heard(data, *rate):
    warnings = []
    return np.concatenate(list(iter_audio(data, *rate, on_warning=warnings.append))), warnings


def noise(seed, level):
    return level * np.random.default_rng(seed).standard_normal(4 * RATE).astype(np.float32)


VOICE = speech(4.0)
CANCELLING = {
    "inverse": np.stack([VOICE, -VOICE], 1),
    "inverse and softer": np.stack([VOICE, -0.9 * VOICE], 1),
    "inverse with noise": np.stack([VOICE + noise(1, 0.003), noise(2, 0.003) - VOICE], 1),
    "four, two of them inverse": np.stack([VOICE, -VOICE, VOICE, -VOICE], 1),
    "only in the second half": np.stack([VOICE, np.concatenate([VOICE[: 2 * RATE], -VOICE[2 * RATE :]])], 1),
}


@pytest.mark.parametrize("kind", CANCELLING)
def test_channels_that_cancel_each_other_are_heard(kind):
    block = CANCELLING[kind]
    for source in (with_soundfile(block, subtype="FLOAT"), with_soundfile(block, format="FLAC", subtype="PCM_24")):
        samples, warnings = heard(source)
        assert warnings == ["channels_cancel"]
        assert correlation(VOICE, samples, most=0) > 0.9
    samples, warnings = heard(block, RATE)
    assert warnings == ["channels_cancel"]
    assert correlation(VOICE[2 * RATE :], samples[2 * RATE :], most=0) > 0.9


def test_cancelling_channels_of_a_compressed_film_are_heard():
    voice = speech(4.0, 48_000)
    samples, warnings = heard(with_av("mp4", "aac", np.stack([voice, -voice]), film_s=4.0))
    assert warnings == ["channels_cancel"]
    assert np.sqrt(np.mean(samples**2)) > 0.02


ORDINARY = {
    "alike": np.stack([VOICE, VOICE], 1),
    "one is silent": np.stack([VOICE, np.zeros_like(VOICE)], 1),
    "two speakers": np.stack([VOICE, speech(4.0, seed=7)], 1),
    "noise": np.stack([noise(1, 0.1), noise(2, 0.1)], 1),
    "one of 32": np.pad(VOICE[:, None], ((0, 0), (5, 26))),
    "an echo": np.stack([VOICE, np.roll(VOICE, 30) * 0.7], 1),
    "inverse and at half": np.stack([VOICE, -0.5 * VOICE], 1),
    "silence": np.zeros((RATE, 2), np.float32),
    "inverse but inaudible": np.stack([VOICE, -VOICE], 1) * 1e-5,
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_channels_are_their_mean(kind):
    block = ORDINARY[kind].astype(np.float32)
    mixer = Mixer()
    assert np.array_equal(mixer.mix(block, RATE), block.mean(axis=1, dtype=np.float32))
    assert mixer.num_cancelled == 0
