"""What `tinyaudio extract --plan` prints before anything runs: how much, how large, how long, and whether it fits.

Sizes come from metadata alone. The time comes from a probe on this machine: some 30 recordings of noise, with durations
of the plan, through an encoder of the recipe's shape with random weights (so nothing is fetched), and one recording
decoded from FLAC. Network and disk are not measured: the forecast gives the rates that they must sustain.
"""

import io
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import soundfile
from transformers import Wav2Vec2FeatureExtractor

from cache import FeatureStore
from cache.errors import CacheError
from cache.layout import bytes_per_row
from pipelines.corpora import Corpus
from pipelines.encoders import LoadedEncoder, pick_device
from pipelines.extract.batching import cut_batches
from pipelines.extract.decode import THREADS, default_workers
from pipelines.extract.encode import BatchEncoder, open_batch_encoder
from pipelines.extract.plan import Plan
from pipelines.extract.report import faults_of_plan
from pipelines.extract.shard_pipeline import memory_bound
from pipelines.recipes import Recipe
from pipelines.recipes.recipe import StoredEncoding
from tinyaudio.model.audio import HOP_LENGTH, SAMPLING_RATE, WINDOW_LENGTH, load_audio
from tinyaudio.model.families import family_of
from tinyaudio.model.frozen import freeze, load_config, place

PROBE_UTTERANCES = 30
PROBE_BATCH_S = 30.0  # of audio in one batch of the probe on a CPU; larger ones take long
PROBE_LIMIT_S = 15.0  # stop the probe after the batch that ends later than this
PROBE_DECODE_S = 60


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The totals of a plan; bytes are those of whole shards on the disk."""

    splits: list[str]
    utterances: int
    no_speech: int  # of the utterances: generated, not read
    rejected: dict[str, int]
    rejected_hours: dict[str, float]
    hours: float
    frames: int
    shards: int
    shards_done: int
    encoding: str  # the recipe's
    bytes: dict[str, int]  # by encoding
    free_bytes: int
    fits: bool  # what is still to be written, in the recipe's encoding, leaves extract.disk_margin_gb free
    audio_bytes: int | None  # encoded audio to be read
    revisions: dict[str, str | None]
    encoder_speed: float  # seconds of audio per second, measured
    decode_speed: float  # the same, of all decoding workers together
    seconds: float  # for the rest of this command, if network and disk keep up
    fetch_bytes_per_s: float | None  # rate at which audio must arrive for that
    write_bytes_per_s: float  # rate at which features must be written for that
    memory_bytes: int  # bound of samples and features in memory
    bad_share: float  # fraction of the rows that no filter of the recipe rejects
    max_bad: float
    device: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        pins = ", ".join(f"{name} at {commit}" for name, commit in self.revisions.items()) or "local files"
        silent = f", {self.no_speech:,} of them without speech" if self.no_speech else ""
        rejected = ", ".join(f"{n:,} {r} ({self.rejected_hours[r]:.2f} h)" for r, n in self.rejected.items()) or "none"
        bad = f"; MORE than the {100 * self.max_bad:g} % of bad rows allowed" if self.bad_share > self.max_bad else ""
        audio = "unknown" if self.audio_bytes is None else f"{self.audio_bytes / 1e9:,.2f} GB"
        fetch = "" if self.fetch_bytes_per_s is None else f", at {self.fetch_bytes_per_s / 1e6:,.1f} MB/s to keep up"
        done = f", {self.shards_done:,} of them done" if self.shards_done else ""
        sizes = ", ".join(f"{count / 1e9:,.2f} GB as {encoding}" for encoding, count in self.bytes.items())
        lack = "" if self.fits else f"; TOO LITTLE for {self.encoding} and the free space that the recipe keeps"
        return "\n".join(
            [
                f"splits      {', '.join(self.splits)} ({pins})",
                f"utterances  {self.utterances:,} ({self.hours:,.2f} h, {self.frames:,} frames{silent})",
                f"rejected    {rejected}{bad}",
                f"to read     {audio} of encoded audio{fetch}",
                f"store       {self.shards:,} shards{done}: {sizes}; this recipe: {self.encoding}",
                f"free disk   {self.free_bytes / 1e9:,.2f} GB{lack}",
                f"time        about {spell_duration(self.seconds)} on this {self.device} (encoder "
                f"{self.encoder_speed:,.1f}x real time, decoding {self.decode_speed:,.0f}x), writing "
                f"{self.write_bytes_per_s / 1e6:,.1f} MB/s",
                f"memory      at most {self.memory_bytes / 1e9:.2f} GB of samples and features, plus the encoder",
            ]
        )


def spell_duration(seconds: float) -> str:
    """Format a time in its natural unit: 40 s, 12 min, 3.5 h, 2.1 days."""
    for limit, unit, text in ((120, 1, "{:.0f} s"), (7_200, 60, "{:.0f} min"), (172_800, 3_600, "{:.1f} h")):
        if seconds < limit:
            return text.format(seconds / unit)
    return f"{seconds / 86_400:.1f} days"


def forecast(
    recipe: Recipe, corpus: Corpus, plan: Plan, store: Path, device: str = "auto", part: tuple[int, int] = (0, 1)
) -> Forecast:
    """Add up a plan and measure this machine.

    Args:
        recipe: at fixed commits.
        store: path of the store; its shards count as done.
        part: (i, N): this command makes every N-th shard from the i-th; sizes are those of the whole store.
    """
    # 1. The plan.
    config = load_config(recipe.encoder.id, recipe.encoder.revision)
    family = family_of(config, recipe.encoder.context)
    frames = plan.accepted["num_frames"].to_numpy()
    hours = float((frames * HOP_LENGTH + (WINDOW_LENGTH - HOP_LENGTH)).sum()) / SAMPLING_RATE / 3600
    frame_bytes = {name: bytes_per_row(name, config.hidden_size) for name in get_args(StoredEncoding)}
    row_bytes, num_rows = frame_bytes[recipe.store.encoding], plan.num_shards * plan.rows_per_shard
    rejected, audio_sizes = plan.rejected(), [corpus.audio_bytes(split) for split in plan.splits]
    audio_bytes = None if None in audio_sizes else sum(size or 0 for size in audio_sizes)
    num_bad = sum(faults_of_plan(rejected).values())
    revisions = {recipe.corpus.name or "": recipe.corpus.revision, recipe.encoder.id: recipe.encoder.revision}
    try:
        done = set(FeatureStore.open(store).committed_shards())
    except CacheError:
        done = set()

    # 2. This machine.
    where = pick_device(device)
    is_gpu = where.type == "cuda"
    encoder = LoadedEncoder(
        model=place(freeze(family.build()), where),
        feature_extractor=Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True),
        precision=recipe.encoder.precision if is_gpu else "float32",
        fingerprint={},
    )
    encoder_speed = _probe_encoder(open_batch_encoder(encoder), recipe, frames)
    decode_speed = _probe_decoding(recipe, is_gpu)
    folder = next(folder for folder in [store, *store.absolute().parents] if folder.exists())
    free_bytes = shutil.disk_usage(folder).free

    # 3. The rest of this command on this machine.
    rest = len(set(range(part[0], plan.num_shards, part[1])) - done) / plan.num_shards
    rest_of_all = 1 - len(done) / plan.num_shards
    times = 1 / encoder_speed, 1 / decode_speed
    all_s = hours * 3600 * (max(times) if is_gpu else sum(times))  # the cores of a CPU do both
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
        bytes={name: num_rows * size for name, size in frame_bytes.items()},
        free_bytes=free_bytes,
        fits=free_bytes - rest_of_all * num_rows * row_bytes >= recipe.extract.disk_margin_gb * 1e9,
        audio_bytes=audio_bytes,
        revisions={name: revision for name, revision in revisions.items() if name and revision},
        encoder_speed=encoder_speed,
        decode_speed=decode_speed,
        seconds=rest * all_s,
        fetch_bytes_per_s=audio_bytes / all_s if audio_bytes else None,
        write_bytes_per_s=num_rows * row_bytes / all_s,
        memory_bytes=memory_bound(plan.rows_per_shard, row_bytes, is_gpu),
        bad_share=num_bad / (len(frames) + num_bad),
        max_bad=recipe.extract.max_bad,
        device="GPU" if is_gpu else "CPU",
    )


def _probe_encoder(encoder: BatchEncoder, recipe: Recipe, frames: Any) -> float:
    """Measure seconds of audio per second of encoding."""
    random = np.random.default_rng(0)
    chosen = np.sort(frames)[np.linspace(0, len(frames) - 1, min(PROBE_UTTERANCES, len(frames))).astype(int)]
    recordings = {
        str(i): (0.1 * random.standard_normal(int(count) * HOP_LENGTH + WINDOW_LENGTH)).astype(np.float32)
        for i, count in enumerate(chosen)
    }
    batch_s = encoder.batch_s(recipe.extract.batch_s)
    if encoder.device.type != "cuda":
        batch_s = min(batch_s, PROBE_BATCH_S)
    encoder.encode(encoder.prepare([recordings["0"]]))()  # first calls allocate and choose kernels
    started, audio_s = time.perf_counter(), 0.0
    for batch in reversed(cut_batches({key: len(samples) for key, samples in recordings.items()}, batch_s)):
        encoder.encode(encoder.prepare([recordings[key] for key in batch]))()
        audio_s += sum(len(recordings[key]) for key in batch) / SAMPLING_RATE
        if time.perf_counter() - started > PROBE_LIMIT_S:
            break
    return audio_s / (time.perf_counter() - started)


def _probe_decoding(recipe: Recipe, is_gpu: bool) -> float:
    """Measure seconds of audio per second of decoding, by all workers together."""
    samples, encoded = 0.1 * np.random.default_rng(0).standard_normal(PROBE_DECODE_S * SAMPLING_RATE), io.BytesIO()
    soundfile.write(encoded, samples, SAMPLING_RATE, format="FLAC")
    started = time.perf_counter()
    load_audio(encoded.getvalue())
    speed = PROBE_DECODE_S / (time.perf_counter() - started)
    workers = recipe.extract.decode_workers
    workers = default_workers(is_gpu, recipe.corpus.name is not None) if workers is None else workers
    return speed * min(workers or THREADS, len(os.sched_getaffinity(0)))
