"""The demo corpus: generated sentences, spoken by espeak-ng, in LoquaciousSet's schema.

Invariants: a sentence belongs to one split only; a variant (timbre) of `UNSEEN_VARIANTS` occurs in `test_unseen` alone;
everything is a pure function of a seed and of the installed espeak-ng and libopus. Knows nothing of models.
"""

import hashlib
import io
import json
import random
import subprocess
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile as sf
import soxr

from tinyaudio.model.audio import SAMPLING_RATE, Samples

OPUS_COMPRESSION_LEVEL = 0.988  # about 12 kbit/s: the lowest step at which libopus still keeps 4 to 8 kHz
EDGE_SILENCE_S = 0.06  # kept before and after the speech

# Open classes. The words of a class were chosen to sound different from each other.
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

# Eighteen sentence patterns over `WORDS` and about thirty function words.
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

# Timbres that occur in `test_unseen` alone. Their near twins (f5, belinda, edward2) are not used at all.
UNSEEN_VARIANTS = (
    "Annie", "f2", "f4", "linda", "Michael", "Nguyen", "edward", "gustave", "m7", "paul", "travis", "victor",
)  # fmt: skip

SPLIT_SIZES = {"train": 2_400, "dev": 120, "test": 200, "test_unseen": 200}  # utterances


@dataclass(frozen=True, kw_only=True)
class Voice:
    """One synthetic speaker: an espeak-ng accent and variant at a fixed pitch and speed."""

    accent: str  # espeak-ng voice file, such as "en-us"
    variant: str  # espeak-ng variant file, such as "f3"; it sets the timbre
    pitch: int  # 0 to 99, espeak-ng's scale
    speed: int  # words per minute

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
    """One row of the corpus."""

    utterance_id: str  # unique over all splits
    transcript: str  # lower case, no punctuation
    voice: Voice
    opus: bytes  # Ogg/Opus, 16 kHz mono
    samples: Samples  # (S,), float32 in [-1, 1], what soundfile decodes from `opus`

    @property
    def duration_s(self) -> float:
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
    """Draw `count` sentences that are not in `taken`, and add them to it."""
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
    """Return the variants that training may contain."""
    return [v for v in FEMALE_VARIANTS + MALE_VARIANTS if v not in UNSEEN_VARIANTS]


def random_voice(rng: random.Random, variants: Sequence[str]) -> Voice:
    """Draw a voice with one of the given variants."""
    return Voice(
        accent=rng.choice(ACCENTS), variant=rng.choice(variants), pitch=rng.randint(30, 70), speed=rng.randint(165, 215)
    )


def synthesise(sentence: str, voice: Voice) -> Samples:
    """Speak one sentence with espeak-ng; errors as `speak`.

    Returns:
        (S,), float32, 16 kHz, peak 0.5, with `EDGE_SILENCE_S` around the speech.
    """
    samples = speak(sentence, voice)
    return samples[speech_of(samples)]


def speech_of(samples: Samples) -> slice:
    """Return where the speech is, with `EDGE_SILENCE_S` around it."""
    loud = np.flatnonzero(np.abs(samples) > 0.005)
    edge = int(EDGE_SILENCE_S * SAMPLING_RATE)
    return slice(max(0, int(loud[0]) - edge), int(loud[-1]) + edge)


def speak(sentence: str, voice: Voice) -> Samples:
    """Speak one sentence with espeak-ng, with all the silence around it; (S,), float32, 16 kHz, peak 0.5.

    Raises:
        FileNotFoundError: espeak-ng is not installed.
        subprocess.CalledProcessError: espeak-ng does not know the voice.
    """
    command = ["espeak-ng", "--stdout", "-v", f"{voice.accent}+{voice.variant}"]
    command += ["-p", str(voice.pitch), "-s", str(voice.speed), sentence]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    rate = int.from_bytes(wav[24:28], "little")
    raw = np.frombuffer(wav[44:], dtype="<i2").astype(np.float32)
    samples = np.asarray(soxr.resample(raw, rate, SAMPLING_RATE), dtype=np.float32)
    samples *= 0.5 / max(float(np.abs(samples).max()), 1.0)
    return samples


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
        raise ValueError(
            f"expected {SAMPLING_RATE} Hz after decoding, found {rate} Hz; this libsndfile changes the rate"
        )
    return np.asarray(samples, dtype=np.float32)


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
        pages.append(page[:22] + _ogg_crc(page).to_bytes(4, "little") + page[26:])
        position = start + sum(data[position + 27 : start])
    return b"".join(pages)


_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(page: bytes) -> int:
    """Compute Ogg's CRC-32: zlib's polynomial, but with the highest bit first and without its inversions."""
    reflected = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)


def make_corpus(seed: int) -> dict[str, list[SpokenUtterance]]:
    """Make all splits: two voices for each known variant, and in `test_unseen` one for each unseen variant."""
    rng = random.Random(f"voices-{seed}")
    known = [random_voice(rng, [variant]) for variant in known_variants() for _ in range(2)]
    unseen = [random_voice(rng, [variant]) for variant in UNSEEN_VARIANTS]

    def speak(utterance_id: str, sentence: str, voice: Voice) -> SpokenUtterance:
        opus = encode_opus(synthesise(sentence, voice), utterance_id)
        samples = decode_opus(opus)
        return SpokenUtterance(utterance_id=utterance_id, transcript=sentence, voice=voice, opus=opus, samples=samples)

    corpus = {}
    with ThreadPoolExecutor(2) as pool:
        for split, sentences in split_sentences(seed).items():
            voices = unseen if split == "test_unseen" else known
            order = [voices[i % len(voices)] for i in range(len(sentences))]
            random.Random(f"{split}-{seed}").shuffle(order)
            ids = [f"demo-{split}-{i:05d}" for i in range(len(sentences))]
            corpus[split] = list(pool.map(speak, ids, sentences, order))
    return corpus


def write_corpus(folder: Path, corpus: dict[str, list[SpokenUtterance]]) -> None:
    """Write every split as Parquet, in speechbrain/LoquaciousSet's columns and under names like its own."""
    wav, text = pa.struct([("bytes", pa.binary()), ("path", pa.string())]), pa.string()
    fields = [("ID", text), ("duration", pa.float32()), ("wav", wav), ("spk_id", text), ("sex", text), ("text", text)]
    # By this metadata, `datasets` knows the types.
    features: dict[str, dict[str, object]] = {
        name: {"dtype": "float32" if name == "duration" else "string", "_type": "Value"} for name, _ in fields
    }
    features["wav"] = {"decode": False, "_type": "Audio"}
    schema = pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir(parents=True, exist_ok=True)
    for split, utterances in corpus.items():
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
        path = folder / f"{split}-00000-of-00001.parquet"
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, path, compression="zstd", compression_level=19, row_group_size=400)
