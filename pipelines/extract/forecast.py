"""What `tinyaudio extract --plan` says before anything runs: how much, how large, how long, and whether it fits.

Sizes come from metadata alone. The time comes from a probe on this machine: some 30 recordings of the plan's own
lengths (noise, so that no audio is fetched) through an encoder of the recipe's shape (random weights, so that none are
fetched either), one of them decoded from FLAC, and a file written and flushed where the store will lie. Fetching is the
network's: what is said of it is the rate that the rest takes.
"""

import io
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from transformers import AutoModel, Wav2Vec2FeatureExtractor

from cache import FeatureStore
from cache.errors import CacheError
from pipelines.corpora import Corpus
from pipelines.encoders import LoadedEncoder, pick_device
from pipelines.extract.decode import THREADS, default_workers
from pipelines.extract.encode import EncoderLine, cut_batches
from pipelines.extract.plan import Plan
from pipelines.extract.report import faults_of_plan
from pipelines.extract.shard_pipeline import memory_bound
from pipelines.recipes import Recipe
from tinyaudio.model.audio import HOP_LENGTH, SAMPLING_RATE, WINDOW_LENGTH, load_audio
from tinyaudio.model.frozen import freeze, load_config

FRAME_BYTES = {"float16": 2, "int8": 1}  # per feature; int8 adds a float16 scale per frame
PROBE_UTTERANCES = 30
PROBE_BATCH_S = 30.0  # of audio in one batch of the probe; larger ones would make it slow where it is slow anyway
PROBE_LIMIT_S = 15.0  # stop the probe after the batch that ends later than this
PROBE_DECODE_S = 60
PROBE_WRITE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a plan comes to; bytes are of whole shards, as they will lie on the disk."""

    splits: list[str]
    utterances: int
    no_speech: int  # of the utterances, made and not read
    rejected: dict[str, int]
    rejected_hours: dict[str, float]
    hours: float
    frames: int
    shards: int
    shards_done: int
    encoding: str  # the recipe's
    bytes: dict[str, int]  # by encoding
    free_bytes: int
    margin_bytes: int
    fits: bool  # what is still to be written, at the recipe's encoding, leaves the margin free
    audio_bytes: int | None  # encoded audio to be read
    revisions: dict[str, str | None]
    encoder_speed: float  # seconds of audio per second, from the probe
    decode_speed: float  # the same of all decoding workers together
    write_bytes_per_s: float  # from the probe
    seconds: float  # for what this command has still to do, if the audio arrives as fast
    fetch_bytes_per_s: float | None  # that takes of the network or the disk
    memory_bytes: int  # of samples and features held at most, whatever the size of the corpus
    bad_share: float  # of the rows that no filter meant to leave out
    max_bad: float
    is_gpu: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        size = ", ".join(f"{count / 1e9:,.2f} GB as {encoding}" for encoding, count in self.bytes.items())
        left_out = ", ".join(f"{n:,} {r} ({self.rejected_hours[r]:.2f} h)" for r, n in self.rejected.items()) or "none"
        audio = "unknown" if self.audio_bytes is None else f"{self.audio_bytes / 1e9:,.2f} GB"
        done = f", {self.shards_done:,} of them done" if self.shards_done else ""
        silent = f", {self.no_speech:,} of them without speech" if self.no_speech else ""
        room = "" if self.fits else f"; TOO LITTLE for {self.encoding} with {self.margin_bytes / 1e9:g} GB to spare"
        bad = f"; MORE than the {100 * self.max_bad:g} % of bad rows allowed" if self.bad_share > self.max_bad else ""
        fetch = "" if self.fetch_bytes_per_s is None else f", at {self.fetch_bytes_per_s / 1e6:,.1f} MB/s to keep up"
        pins = ", ".join(f"{name} at {commit}" for name, commit in self.revisions.items()) or "local files"
        return "\n".join(
            [
                f"splits      {', '.join(self.splits)} ({pins})",
                f"utterances  {self.utterances:,} ({self.hours:,.2f} h, {self.frames:,} frames{silent})",
                f"left out    {left_out}{bad}",
                f"to read     {audio} of encoded audio{fetch}",
                f"store       {self.shards:,} shards{done}: {size}; this recipe: {self.encoding}",
                f"free disk   {self.free_bytes / 1e9:,.2f} GB{room}",
                f"time        about {spell_duration(self.seconds)} on this machine ({'GPU' if self.is_gpu else 'CPU'}: "
                f"{self.encoder_speed:,.1f}x real time, decoding {self.decode_speed:,.0f}x, "
                f"{self.write_bytes_per_s / 1e6:,.0f} MB/s to disk)",
                f"memory      at most {self.memory_bytes / 1e9:.2f} GB of samples and features, beside the encoder",
            ]
        )


def spell_duration(seconds: float) -> str:
    """Spell a time as one would say it: 40 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, name in ((120, 1, "s"), (7_200, 60, "min"), (172_800, 3_600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}" if unit < 3_600 else f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86_400:.1f} days"


def forecast(
    recipe: Recipe, corpus: Corpus, plan: Plan, store: Path, device: str = "auto", part: tuple[int, int] = (0, 1)
) -> Forecast:
    """Add up a plan and measure this machine.

    Args:
        recipe: with pinned revisions.
        store: where it would lie; what is there counts as done.
        part: (i, N): what this command would do is every N-th shard from the i-th on; sizes are of the whole store.
    """
    config = load_config(recipe.encoder.id, recipe.encoder.revision)
    frames = plan.accepted["num_frames"].to_numpy()
    hours = float((frames * HOP_LENGTH + (WINDOW_LENGTH - HOP_LENGTH)).sum()) / SAMPLING_RATE / 3600
    per_row = {name: config.hidden_size * size + 2 * (name == "int8") for name, size in FRAME_BYTES.items()}
    folder = next(folder for folder in [store, *store.absolute().parents] if folder.exists())
    line = EncoderLine(_encoder_of_this_shape(recipe, config, device))
    is_gpu = line.device.type == "cuda"
    speed, decode, write = _probe_encoder(line, recipe, frames), _probe_decoding(recipe, is_gpu), _probe_disk(folder)
    done = _shards_done(store)
    mine = set(range(part[0], plan.num_shards, part[1])) - done
    left, left_of_all = len(mine) / plan.num_shards, 1 - len(done) / plan.num_shards
    total, row_bytes = plan.num_shards * plan.rows_per_shard, per_row[recipe.store.encoding]
    free, margin = shutil.disk_usage(folder).free, int(recipe.extract.disk_margin_gb * 1e9)
    sizes = [corpus.audio_bytes(split) for split in plan.splits]
    audio_bytes = None if None in sizes else sum(size or 0 for size in sizes)
    per_s = max(1 / speed, 1 / decode) if is_gpu else 1 / speed + 1 / decode  # a CPU's cores do both
    seconds = left * max(hours * 3600 * per_s, total * row_bytes / write)
    rejected = plan.rejected()
    bad = sum(faults_of_plan(rejected).values())
    return Forecast(
        splits=list(plan.splits),
        utterances=len(frames),
        no_speech=sum(source == "no-speech" for source in plan.accepted["source"].to_pylist()),
        rejected=rejected,
        rejected_hours=plan.rejected_hours(),
        hours=hours,
        frames=int(frames.sum(dtype=np.int64)),
        shards=plan.num_shards,
        shards_done=len(done),
        encoding=recipe.store.encoding,
        bytes={name: total * size for name, size in per_row.items()},
        free_bytes=free,
        margin_bytes=margin,
        fits=free - left_of_all * total * row_bytes >= margin,
        audio_bytes=audio_bytes,
        revisions=_revisions(recipe),
        encoder_speed=speed,
        decode_speed=decode,
        write_bytes_per_s=write,
        seconds=seconds,
        fetch_bytes_per_s=left * audio_bytes / seconds if audio_bytes and seconds else None,
        memory_bytes=memory_bound(plan.rows_per_shard, row_bytes, is_gpu),
        bad_share=bad / (len(frames) + bad),
        max_bad=recipe.extract.max_bad,
        is_gpu=is_gpu,
    )


def _revisions(recipe: Recipe) -> dict[str, str | None]:
    pins = {recipe.corpus.name or "": recipe.corpus.revision, recipe.encoder.id: recipe.encoder.revision}
    return {name: revision for name, revision in pins.items() if name and revision}


def _shards_done(store: Path) -> set[int]:
    try:
        return set(FeatureStore.open(store).committed_shards())
    except CacheError:
        return set()


def _encoder_of_this_shape(recipe: Recipe, config: Any, device: str) -> LoadedEncoder:
    where = pick_device(device)
    model = freeze(AutoModel.from_config(config)).to(where)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    precision = recipe.encoder.precision if where.type == "cuda" else "float32"
    return LoadedEncoder(model=model, feature_extractor=extractor, precision=precision, fingerprint={})


def _probe_encoder(line: EncoderLine, recipe: Recipe, frames: Any) -> float:
    """Measure seconds of audio per second of encoding."""
    random = np.random.default_rng(0)
    chosen = np.sort(frames)[np.linspace(0, len(frames) - 1, min(PROBE_UTTERANCES, len(frames))).astype(int)]
    recordings = {
        str(i): (0.1 * random.standard_normal(int(count) * HOP_LENGTH + WINDOW_LENGTH)).astype(np.float32)
        for i, count in enumerate(chosen)
    }
    batch_s = line.batch_s(recipe.extract.batch_s)
    if line.device.type != "cuda":
        batch_s = min(batch_s, PROBE_BATCH_S)
    line.encode(line.prepare([recordings["0"]])).read()  # first calls allocate and choose kernels
    begun, audio_s = time.perf_counter(), 0.0
    batches = list(cut_batches({key: len(samples) for key, samples in recordings.items()}, batch_s))
    for batch in reversed(batches):
        line.encode(line.prepare([recordings[key] for key in batch])).read()
        audio_s += sum(len(recordings[key]) for key in batch) / SAMPLING_RATE
        if time.perf_counter() - begun > PROBE_LIMIT_S:
            break
    return audio_s / (time.perf_counter() - begun)


def _probe_decoding(recipe: Recipe, is_gpu: bool) -> float:
    """Measure seconds of audio per second of decoding, of all workers together."""
    samples, encoded = 0.1 * np.random.default_rng(0).standard_normal(PROBE_DECODE_S * SAMPLING_RATE), io.BytesIO()
    soundfile.write(encoded, samples, SAMPLING_RATE, format="FLAC")
    begun = time.perf_counter()
    load_audio(encoded.getvalue())
    alone = PROBE_DECODE_S / (time.perf_counter() - begun)
    workers = recipe.extract.decode_workers
    workers = default_workers(is_gpu) if workers is None else workers
    return alone * min(workers or THREADS, len(os.sched_getaffinity(0)))


def _probe_disk(folder: Path) -> float:
    """Measure bytes per second, written and flushed, in a folder."""
    block = np.random.default_rng(0).bytes(1 << 20)
    begun = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(PROBE_WRITE_BYTES // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return PROBE_WRITE_BYTES / (time.perf_counter() - begun)
