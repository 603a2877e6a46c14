"""Where each word of the demo's held-out sets begins, as espeak-ng says: the truth of word times.

    python -m pipelines.demo.make.word_times tests/data/word_times.json

Speaks the sentences of the shipped `dev`, `test` and `test_unseen` again, with the same voices, through libespeak-ng,
which reports an event for each word; a few pairs of words, which it speaks as one, have one. A sentence whose audio
differs in length from the shipped one is an error.
"""

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines.demo.make.corpus import EDGE_SILENCE_S, Voice, decode_opus, speak, speech_of
from tinyaudio.model.audio import SAMPLING_RATE

CORPUS = Path(__file__).parents[1] / "corpus"
SPLITS = ("dev", "test", "test_unseen")
TOLERANCE_S = 0.005  # of an utterance's length; a few voices are not spoken twice alike
# Source: espeak-ng 1.51, src/include/espeak-ng/speak_lib.h
_AUDIO_OUTPUT_RETRIEVAL, _CHARS_UTF8, _POS_CHARACTER = 2, 1, 1
_RATE, _PITCH = 1, 3
_LIST_TERMINATED, _WORD = 0, 1


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


class Speaker:
    """The library of espeak-ng. One per process, since it has one callback."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libespeak-ng.so.1")
        self.sampling_rate: int = self._library.espeak_Initialize(_AUDIO_OUTPUT_RETRIEVAL, 0, None, 0)
        self._words: list[tuple[int, int]] = []  # place in the text, counted from 1, and sample
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))
        self._callback = kind(self._take)  # kept, or Python frees it
        self._library.espeak_SetSynthCallback(self._callback)

    def _take(self, _samples: Any, _count: int, events: Any) -> int:
        i = 0
        while events[i].type != _LIST_TERMINATED:
            if events[i].type == _WORD:
                self._words.append((events[i].text_position, events[i].sample))
            i += 1
        return 0

    def word_onsets_s(self, sentence: str, voice: Voice) -> list[float | None]:
        """Return where each word of a sentence begins, in seconds of what `corpus.speak` returns; None if not known."""
        self._words = []
        data = sentence.encode()
        self._library.espeak_SetVoiceByName(f"{voice.accent}+{voice.variant}".encode())
        self._library.espeak_SetParameter(_RATE, voice.speed, 0)
        self._library.espeak_SetParameter(_PITCH, voice.pitch, 0)
        size, none = ctypes.c_size_t(len(data) + 1), ctypes.c_void_p(None)
        self._library.espeak_Synth(data, size, 0, _POS_CHARACTER, 0, _CHARS_UTF8, none, none)
        known = {place - 1: sample / self.sampling_rate for place, sample in self._words}
        return [known.get(word.start()) for word in re.finditer(r"\S+", sentence)]


def parse_voice(name: str) -> Voice:
    """Return the voice of a speaker id of the corpus, such as "en-us+f3-p40-s180"."""
    accent, rest = name.split("+")
    variant, pitch, speed = rest.rsplit("-", 2)
    return Voice(accent=accent, variant=variant, pitch=int(pitch[1:]), speed=int(speed[1:]))


def word_times() -> dict[str, list[int | None]]:
    """Return the boundaries of the words of every utterance: their onsets and the end of the last one, in ms."""
    speaker, times = Speaker(), {}
    for split in SPLITS:
        for row in pq.read_table(CORPUS / f"{split}-00000-of-00001.parquet").to_pylist():
            voice = parse_voice(row["spk_id"])
            samples = speak(row["text"], voice)
            part = speech_of(samples)
            found, expected = part.stop - part.start, len(decode_opus(row["wav"]["bytes"]))
            onsets_s = speaker.word_onsets_s(row["text"], voice)
            if abs(found - expected) > TOLERANCE_S * SAMPLING_RATE:
                raise SystemExit(f"{row['ID']}: expected {expected} samples, found {found}. Use espeak-ng 1.51")
            end_s = min(part.stop, len(samples)) / SAMPLING_RATE - EDGE_SILENCE_S
            start_s = part.start / SAMPLING_RATE
            times[row["ID"]] = [None if at is None else round((at - start_s) * 1000) for at in [*onsets_s, end_s]]
    return times


if __name__ == "__main__":
    rows = ",\n".join(f'"{name}": {json.dumps(row)}' for name, row in word_times().items())
    Path(sys.argv[1]).write_text(f"{{\n{rows}\n}}\n")
