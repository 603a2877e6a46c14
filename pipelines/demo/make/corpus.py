"""The demo corpus: invented sentences, spoken by espeak-ng, in LoquaciousSet's schema.

Holds the grammar, the voices, the synthesis and the Parquet writer. Invariants: a sentence belongs to one
split only; a variant (timbre) of `UNSEEN_VARIANTS` is heard in `test_unseen` and nowhere else; everything
is a pure function of a seed and of the installed espeak-ng and libopus. Knows nothing of models.
"""

import hashlib
import io
import json
import random
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
import soxr

from tinyaudio.model.audio import SAMPLING_RATE, Samples

OPUS_COMPRESSION_LEVEL = 0.988
"""About 12 kbit/s: the lowest step at which libopus still keeps 4 to 8 kHz (one step lower drops it)."""

EDGE_SILENCE_S = 0.06
"""Silence kept before and after the speech."""

WORDS: dict[str, tuple[str, ...]] = {
    "name": ("anna", "peter", "martha", "oliver", "susan", "emily", "jacob", "henry"),
    "adjective": (
        "yellow", "purple", "heavy", "tiny", "broken", "quiet", "golden", "wooden",
        "happy", "gentle", "ancient", "lazy", "clever", "empty", "frozen", "silver",
    ),
    "animal": (
        "tiger", "rabbit", "elephant", "monkey", "spider", "dolphin",
        "pigeon", "camel", "donkey", "lobster", "parrot", "wolf",
    ),
    "object": (
        "basket", "hammer", "window", "guitar", "blanket", "ladder", "mirror", "pencil", "bottle", "kettle",
        "umbrella", "envelope", "bicycle", "helmet", "suitcase", "carpet", "sandwich", "trumpet",
    ),
    "person": ("farmer", "teacher", "doctor", "captain", "sister", "uncle", "soldier", "neighbor"),
    "transitive": (
        "carried", "painted", "followed", "borrowed", "watched",
        "noticed", "dropped", "repaired", "delivered", "collected",
    ),
    "intransitive": ("jumped", "slept", "waited", "vanished", "laughed", "arrived"),
    "command": ("bring", "open", "find", "return", "describe", "remember"),
    "place": (
        "garden", "kitchen", "harbor", "mountain", "forest", "station", "library",
        "island", "tunnel", "desert", "castle", "village", "river",
    ),
    "preposition": ("behind", "under", "across", "beside", "through", "inside"),
    "number": ("seven", "eleven", "twenty", "forty", "three", "thousand", "fifteen", "eighty"),
    "day": ("today", "yesterday", "tonight", "monday", "friday", "sunday", "october", "winter"),
}  # fmt: skip
"""Open classes. Words of one class are chosen to sound different from each other."""

TEMPLATES = (
    "the {adjective} {animal} {intransitive} {preposition} the {place}",
    "{name} {transitive} the {adjective} {object}",
    "please {command} the {object} and the {object}",
    "room {number} is {preposition} the {place}",
    "the {person} and the {animal} {intransitive} before {day}",
    "where is the {adjective} {object}",
    "can {name} {command} the {object} before {day}",
    "since {day} the {person} always {intransitive}",
    "my {person} never {transitive} the {adjective} {object}",
    "{name} and {name} {transitive} the {object}",
    "every {animal} {preposition} the {place} is {adjective}",
    "please {command} page {number}",
    "our {person} {transitive} the {animal} with my {object}",
    "they always {transitive} the {object} {preposition} the {place}",
    "this {object} from the {place} is {adjective} and {adjective}",
    "we {transitive} {name} {preposition} the {adjective} {place}",
    "number {number} is our {adjective} {object}",
    "since {day} {name} {transitive} {number} {adjective} envelopes",
)
"""Eighteen sentence patterns over `WORDS` and some thirty function words."""

ACCENTS = (
    "en-gb", "en-us", "en-gb-scotland", "en-gb-x-rp",
    "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc",
)  # fmt: skip

FEMALE_VARIANTS = (
    "Alicia", "Andrea", "Annie", "anika", "aunty", "f1", "f2",
    "f3", "f4", "grandma", "linda", "steph", "steph2", "shelby",
)  # fmt: skip

MALE_VARIANTS = (
    "Alex", "Andy", "Denis", "Diogo", "Gene", "Gene2", "Henrique", "Hugo", "Jacky", "Marco", "Mario",
    "Michael", "Mike", "Nguyen", "adam", "antonio", "benjamin", "boris", "david", "ed", "edward",
    "grandpa", "gustave", "iven", "iven2", "iven3", "iven4", "john", "klatt",
    "klatt2", "klatt3", "klatt4", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "marcelo", "max", "michel",
    "miguel", "norbert", "pablo", "paul", "pedro", "quincy", "rob", "robert", "sandro", "travis", "victor",
)  # fmt: skip

UNSEEN_VARIANTS = (
    "Annie", "f2", "f4", "linda", "Michael", "Nguyen", "edward", "gustave", "m7", "paul", "travis", "victor",
)  # fmt: skip
"""Timbres that only `test_unseen` contains. Their near twins (f5, belinda, edward2) are used nowhere."""

SPLIT_SIZES = {"train": 2_400, "dev": 120, "test": 200, "test_unseen": 200}
"""Utterances in each split."""


@dataclass(frozen=True, kw_only=True)
class Voice:
    """One synthetic speaker: an espeak-ng accent and variant at a fixed pitch and speed.

    Attributes:
        accent: espeak-ng voice file, such as "en-us".
        variant: espeak-ng variant file, such as "f3"; it sets the timbre.
        pitch: 0 to 99, espeak-ng's scale.
        speed: words per minute.
    """

    accent: str
    variant: str
    pitch: int
    speed: int

    @property
    def name(self) -> str:
        """The speaker id of the corpus."""
        return f"{self.accent}+{self.variant}-p{self.pitch}-s{self.speed}"

    @property
    def sex(self) -> str:
        """What the variant imitates."""
        return "female" if self.variant in FEMALE_VARIANTS else "male"


@dataclass(frozen=True, kw_only=True)
class SpokenUtterance:
    """One row of the corpus.

    Attributes:
        utterance_id: unique over all splits.
        transcript: lower case, no punctuation.
        voice: who says it.
        opus: Ogg/Opus bytes, 16 kHz mono.
        samples: (S,), float32 in [-1, 1], what soundfile decodes from `opus`.
    """

    utterance_id: str
    transcript: str
    voice: Voice
    opus: bytes
    samples: Samples

    @property
    def duration_s(self) -> float:
        """Decoded length in seconds."""
        return len(self.samples) / SAMPLING_RATE


def make_sentence(rng: random.Random) -> str:
    """Draw one sentence: a template, then its words; a class used twice gives two different words."""
    template = rng.choice(TEMPLATES)
    used: set[str] = set()
    words = []
    for slot in template.split():
        if slot.startswith("{"):
            slot = rng.choice([word for word in WORDS[slot.strip("{}")] if word not in used])
            used.add(slot)
        words.append(slot)
    return " ".join(words)


def make_sentences(rng: random.Random, count: int, taken: set[str]) -> list[str]:
    """Draw `count` new sentences and add them to `taken`, which they do not repeat."""
    sentences: list[str] = []
    while len(sentences) < count:
        sentence = make_sentence(rng)
        if sentence not in taken:
            taken.add(sentence)
            sentences.append(sentence)
    return sentences


def split_sentences(seed: int) -> dict[str, list[str]]:
    """Return the sentences of every split; the held-out splits are drawn first."""
    rng = random.Random(f"sentences-{seed}")
    taken: set[str] = set()
    order = ("test_unseen", "test", "dev", "train")
    return {split: make_sentences(rng, SPLIT_SIZES[split], taken) for split in order}


def known_variants() -> list[str]:
    """Return the variants that training may hear."""
    return [v for v in FEMALE_VARIANTS + MALE_VARIANTS if v not in UNSEEN_VARIANTS]


def random_voice(rng: random.Random, variants: Sequence[str]) -> Voice:
    """Draw a voice with one of the given variants."""
    return Voice(
        accent=rng.choice(ACCENTS), variant=rng.choice(variants), pitch=rng.randint(30, 70), speed=rng.randint(165, 215)
    )


def corpus_voices(seed: int) -> tuple[list[Voice], list[Voice]]:
    """Return the known voices (two for each known variant) and the unseen ones (one for each unseen variant)."""
    rng = random.Random(f"voices-{seed}")
    known = [random_voice(rng, [variant]) for variant in known_variants() for _ in range(2)]
    return known, [random_voice(rng, [variant]) for variant in UNSEEN_VARIANTS]


def synthesise(sentence: str, voice: Voice) -> Samples:
    """Speak one sentence with espeak-ng.

    Returns:
        (S,), float32, 16 kHz, peak 0.5, with `EDGE_SILENCE_S` around the speech.

    Raises:
        FileNotFoundError: if espeak-ng is not installed.
        subprocess.CalledProcessError: if espeak-ng does not know the voice.
    """
    command = ["espeak-ng", "--stdout", "-v", f"{voice.accent}+{voice.variant}"]
    command += ["-p", str(voice.pitch), "-s", str(voice.speed), sentence]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    rate = int.from_bytes(wav[24:28], "little")
    raw = np.frombuffer(wav[44:], dtype="<i2").astype(np.float32)
    samples = np.asarray(soxr.resample(raw, rate, SAMPLING_RATE), dtype=np.float32)
    samples *= 0.5 / max(float(np.abs(samples).max()), 1.0)
    loud = np.flatnonzero(np.abs(samples) > 0.005)
    edge = int(EDGE_SILENCE_S * SAMPLING_RATE)
    return samples[max(0, loud[0] - edge) : loud[-1] + edge]


def encode_opus(samples: Samples, name: str) -> bytes:
    """Encode 16 kHz mono samples as Ogg/Opus that depends on nothing but its arguments and libopus.

    libsndfile draws a random stream number and pads the tags with 700 zero bytes; both are replaced.
    """
    buffer = io.BytesIO()
    with sf.SoundFile(
        buffer, "w", SAMPLING_RATE, 1, format="OGG", subtype="OPUS", compression_level=OPUS_COMPRESSION_LEVEL
    ) as file:
        file.write(samples)
    return _renumber_ogg(buffer.getvalue(), hashlib.sha256(name.encode()).digest()[:4])


def decode_opus(data: bytes) -> Samples:
    """Decode Ogg/Opus bytes to (S,) float32 at 16 kHz."""
    samples, rate = sf.read(io.BytesIO(data), dtype="float32")
    if rate != SAMPLING_RATE:
        raise ValueError(f"decoded {rate} Hz, expected {SAMPLING_RATE} Hz; this libsndfile does not keep the rate")
    return np.asarray(samples, dtype=np.float32)


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        crc = byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x04C11DB7 if crc & 0x80000000 else 0)
        table.append(crc & 0xFFFFFFFF)
    return tuple(table)


_CRC_TABLE = _crc_table()


def _renumber_ogg(data: bytes, serial: bytes) -> bytes:
    """Rewrite the stream number, the tags page and the checksums of an Ogg file.

    Source: RFC 3533 section 6 (page header), RFC 7845 section 5.2 (OpusTags).
    """
    pages = []
    position = 0
    while position < len(data):
        num_segments = data[position + 26]
        lacing = data[position + 27 : position + 27 + num_segments]
        start = position + 27 + num_segments
        body = data[start : start + sum(lacing)]
        if body.startswith(b"OpusTags"):
            body = b"OpusTags" + bytes(8)
            lacing = bytes([len(body)])
        header = data[position : position + 14] + serial + data[position + 18 : position + 22] + bytes(4)
        page = header + bytes([len(lacing)]) + lacing + body
        crc = 0
        for byte in page:
            crc = ((crc << 8) & 0xFFFFFFFF) ^ _CRC_TABLE[(crc >> 24) ^ byte]
        pages.append(page[:22] + crc.to_bytes(4, "little") + page[26:])
        position = start + sum(data[position + 27 : start])
    return b"".join(pages)


def speak(utterance_id: str, sentence: str, voice: Voice) -> SpokenUtterance:
    """Synthesise, encode and decode one utterance."""
    opus = encode_opus(synthesise(sentence, voice), utterance_id)
    return SpokenUtterance(
        utterance_id=utterance_id, transcript=sentence, voice=voice, opus=opus, samples=decode_opus(opus)
    )


def speak_all(jobs: Iterable[tuple[str, str, Voice]]) -> list[SpokenUtterance]:
    """Speak many (utterance_id, sentence, voice) on two threads; the order is kept."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: speak(*job), jobs))


def make_corpus(seed: int) -> dict[str, list[SpokenUtterance]]:
    """Make all splits."""
    known, unseen = corpus_voices(seed)
    corpus = {}
    for split, sentences in split_sentences(seed).items():
        voices = unseen if split == "test_unseen" else known
        rng = random.Random(f"{split}-{seed}")
        order = [voices[i % len(voices)] for i in range(len(sentences))]
        rng.shuffle(order)
        jobs = [(f"demo-{split}-{i:05d}", s, v) for i, (s, v) in enumerate(zip(sentences, order, strict=True))]
        corpus[split] = speak_all(jobs)
    return corpus


def corpus_schema() -> pa.Schema:
    """Return speechbrain/LoquaciousSet's columns, with the metadata by which `datasets` knows them."""
    features: dict[str, dict[str, object]] = {
        "ID": {"dtype": "string", "_type": "Value"},
        "duration": {"dtype": "float32", "_type": "Value"},
        "wav": {"decode": False, "_type": "Audio"},
        "spk_id": {"dtype": "string", "_type": "Value"},
        "sex": {"dtype": "string", "_type": "Value"},
        "text": {"dtype": "string", "_type": "Value"},
    }
    fields = [
        ("ID", pa.string()),
        ("duration", pa.float32()),
        ("wav", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("spk_id", pa.string()),
        ("sex", pa.string()),
        ("text", pa.string()),
    ]
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def write_split(path: Path, utterances: Sequence[SpokenUtterance]) -> None:
    """Write one split as Parquet."""
    rows = [
        {
            "ID": u.utterance_id,
            "duration": u.duration_s,
            "wav": {"bytes": u.opus, "path": f"{u.utterance_id}.opus"},
            "spk_id": u.voice.name,
            "sex": u.voice.sex,
            "text": u.transcript,
        }
        for u in utterances
    ]
    table = pa.Table.from_pylist(rows, schema=corpus_schema())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd", compression_level=19, row_group_size=400)


def write_corpus(folder: Path, corpus: dict[str, list[SpokenUtterance]]) -> None:
    """Write every split under its LoquaciousSet-like file name."""
    for split, utterances in corpus.items():
        write_split(folder / f"{split}-00000-of-00001.parquet", utterances)
