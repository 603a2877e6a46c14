"""Items without speech and with empty transcripts, from which stage two teaches the model to write nothing.

A model that was never trained on silence writes "yeah" and "huh" into it, and a filter against empty transcripts
removes the few silent recordings of a corpus (Tiny Audio issue 63, fixed with 5 % of such items). No item contains
speech: speech in noise must not be taught as nothing.

An item is a pure function of its source_id, on any machine: kind, level, length and number. Encoders that normalise
each recording (HuBERT-large does) cannot distinguish levels of steady noise, so one kind changes its level.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipelines.corpora.corpus import SCAN_SCHEMA
from tinyaudio.model.audio import SAMPLING_RATE, Samples

PREFIX = "no-speech"
KINDS = ("silence", "white", "pink", "bursts")
LEVELS_DB = (-70, -60, -50, -40, -30, -20)  # root mean square against full scale: from a quiet room to a loud street
SOURCE = "no-speech"  # in the index


def is_no_speech(source_id: str) -> bool:
    return source_id.startswith(f"{PREFIX}:")


def no_speech_rows(durations_s: Sequence[float], first: int = 0) -> pa.Table:
    """List items of the given durations as `SCAN_SCHEMA`; kinds and levels alternate, so every stretch has all."""
    rows = []
    for number, duration_s in enumerate(durations_s, first):
        kind = KINDS[number % len(KINDS)]
        level_db = LEVELS_DB[(number // len(KINDS)) % len(LEVELS_DB)]
        num_samples = round(duration_s * SAMPLING_RATE)
        rows.append(
            {
                "utterance_id": f"{PREFIX}-{number:07d}-{kind}",
                "source_id": f"{PREFIX}:{kind}:{level_db}:{num_samples}:{number}",
                "duration_s": num_samples / SAMPLING_RATE,
                "transcript": "",
                "source": SOURCE,
            }
        )
    return pa.Table.from_pylist(rows, schema=SCAN_SCHEMA)


def no_speech_samples(source_id: str) -> Samples:
    """Generate the samples of an item.

    Returns:
        (S,) float32 at 16 kHz, rounded to 16-bit values, so that they are the same to the bit on any machine.
    """
    _, kind, level_db, num_samples, number = source_id.split(":")
    length = int(num_samples)
    random = np.random.default_rng([int(number), length])
    signal = np.zeros(length)
    if kind in ("white", "pink"):
        signal = random.standard_normal(length)
    if kind == "pink":  # the amplitude falls with the square root of the frequency
        frequencies = np.maximum(np.fft.rfftfreq(length, 1 / SAMPLING_RATE), 20.0)
        signal = np.fft.irfft(np.fft.rfft(signal) / np.sqrt(frequencies), length)
    if kind == "bursts":  # two a second of 10 to 300 ms, over digital silence
        for start in random.integers(0, max(1, length), max(1, length // (SAMPLING_RATE // 2))):
            size = min(length - int(start), int(random.uniform(0.01, 0.3) * SAMPLING_RATE))
            signal[start : start + size] = random.standard_normal(size) * np.linspace(1, 0, size)
    level = np.sqrt(np.mean(np.square(signal))) if length else 0.0
    if level > 0:
        signal = signal * (10 ** (int(level_db) / 20) / level)
    return (np.rint(np.clip(signal, -1, 1) * 32_767) / 32_768).astype(np.float32)
