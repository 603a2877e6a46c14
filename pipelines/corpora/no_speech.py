"""Items in which nothing is said, with empty transcripts, so that stage two can teach the model to write nothing.

Upstream learned it the hard way: a model that has never met silence writes "yeah" and "huh" into it, and a filter
against empty transcripts had hidden the few that a corpus had (Tiny Audio issue 63, fixed with 5 % of such clips). No
speech is ever mixed in: speech behind noise must not be taught as nothing.

An item is a pure function of its source_id, on any machine: kind, level, length and number. Encoders that normalise
each recording (HuBERT-large does) do not see the level of steady noise, so some kinds change it under way.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.corpora.corpus import SCAN_SCHEMA
from tinyaudio.model.audio import SAMPLING_RATE, Samples

PREFIX = "no-speech"
LEVELS_DB = (-70, -60, -50, -40, -30, -20)  # root mean square against full scale: from a good room to a loud street
SOURCE = "no-speech"  # in the index

Signal = NDArray[np.float64]


def is_no_speech(source_id: str) -> bool:
    return source_id.startswith(f"{PREFIX}:")


def no_speech_rows(durations_s: Sequence[float], first: int = 0) -> pa.Table:
    """List items of given durations as `SCAN_SCHEMA`; kinds and levels take turns, so any stretch has all of them."""
    kinds, rows = list(_KINDS), []
    for number, duration_s in enumerate(durations_s, first):
        kind = kinds[number % len(kinds)]
        level_db = LEVELS_DB[(number // len(kinds)) % len(LEVELS_DB)]
        num_samples = round(duration_s * SAMPLING_RATE)
        rows.append(
            {
                "utterance_id": f"{PREFIX}-{number:07d}-{kind}",
                "source_id": f"{PREFIX}:{kind}:{level_db}:{num_samples}:{number}",
                "duration_s": num_samples / SAMPLING_RATE,
                "transcript": "",
                "speaker": None,
                "sex": None,
                "source": SOURCE,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCAN_SCHEMA)


def no_speech_samples(source_id: str) -> Samples:
    """Make the samples of an item.

    Returns:
        (S,) float32 at 16 kHz, on the grid of 16-bit audio, so that they are the same to the bit everywhere.
    """
    _, kind, level_db, num_samples, number = source_id.split(":")
    random = np.random.default_rng([int(number), int(num_samples)])
    signal = _KINDS[kind](random, int(num_samples))
    level = np.sqrt(np.mean(np.square(signal))) if len(signal) else 0.0
    if level > 0:
        signal = signal * (10 ** (int(level_db) / 20) / level)
    return (np.rint(np.clip(signal, -1, 1) * 32_767) / 32_768).astype(np.float32)


def _silence(random: np.random.Generator, length: int) -> Signal:
    return np.zeros(length)


def _white(random: np.random.Generator, length: int) -> Signal:
    return random.standard_normal(length)


def _coloured(random: np.random.Generator, length: int, slope: float) -> Signal:
    """Noise whose amplitude falls with frequency to the power of `slope`."""
    spectrum = np.fft.rfft(random.standard_normal(length))
    frequencies = np.maximum(np.fft.rfftfreq(length, 1 / SAMPLING_RATE), 20.0)
    return np.fft.irfft(spectrum / frequencies**slope, length)


def _pink(random: np.random.Generator, length: int) -> Signal:
    return _coloured(random, length, 0.5)


def _brown(random: np.random.Generator, length: int) -> Signal:
    return _coloured(random, length, 1.0)


def _hum(random: np.random.Generator, length: int) -> Signal:
    """Mains hum with harmonics, over faint noise."""
    base = float(random.choice([50.0, 60.0]))
    seconds = np.arange(length) / SAMPLING_RATE
    tones = [np.sin(2 * np.pi * base * k * seconds + random.uniform(0, 2 * np.pi)) / k for k in (1, 2, 3, 5, 7)]
    return np.sum(tones, axis=0) + 0.05 * random.standard_normal(length)


def _bursts(random: np.random.Generator, length: int) -> Signal:
    """Knocks and rustles: noise that starts and stops over digital silence."""
    signal = np.zeros(length)
    for start in random.integers(0, max(1, length), max(1, length // (SAMPLING_RATE // 2))):
        end = min(length, int(start) + int(random.uniform(0.01, 0.3) * SAMPLING_RATE))
        signal[start:end] = random.standard_normal(end - int(start)) * np.linspace(1, 0, end - int(start))
    return signal


def _swell(random: np.random.Generator, length: int) -> Signal:
    """Noise that comes and goes, as of a passing car."""
    return _coloured(random, length, 0.5) * np.square(np.sin(np.linspace(0, np.pi, length))) if length else np.zeros(0)


_KINDS: dict[str, Callable[[np.random.Generator, int], Signal]] = {
    "silence": _silence,
    "white": _white,
    "pink": _pink,
    "brown": _brown,
    "hum": _hum,
    "bursts": _bursts,
    "swell": _swell,
}
