"""How fast the host's part of stage one is: everything but the encoder, which is replaced by one that answers at once.

The features have the width of HuBERT-large and go into a float16 store, so the work and the bytes are those of the real
encoder on a GPU, which is not needed. Speeds are seconds of audio per second. Those of one thread are measured by the
time that it computes, so that other work on the machine does not count; those of the whole line after the first shards,
whose memory the next ones use again.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import HubertConfig

from cache import FeatureStore
from pipelines.bench.models import hubert_large_extractor
from pipelines.corpora import Corpus, open_corpus
from pipelines.encoders import LoadedEncoder
from pipelines.extract.batching import cut_batches
from pipelines.extract.decode import Decoder, decode_piece
from pipelines.extract.encode import BatchEncoder, Encoded, EncodedBatch, Inputs
from pipelines.extract.plan import Plan, plan_corpus
from pipelines.extract.report import ExtractReport
from pipelines.extract.shard_pipeline import ShardPipeline, append
from pipelines.recipes import Recipe
from tinyaudio.model.audio import SAMPLING_RATE, num_frames

DIM = 1024
ROWS_PER_SHARD = 32_768  # 11 minutes, so that half an hour of audio is several shards
FIRST_SHARDS = 4  # of the line, which are not measured
REPEATS = 3  # of which the fastest counts

HOST_NOTES = {
    "host_decode_x": "times real time on one core: WAV out of Parquet; beside a GPU, of each of several processes",
    "host_receive_x": "times real time on one core: the samples of one decoding process; goal at least 20,000 of all",
    "host_prepare_x": "times real time on one core: normalise, pad, mask; goal at least 20,000",
    "host_store_x": "times real time on one core: a batch into the memory of its shard; goal at least 20,000",
    "host_commit_x": "times real time on one core: checksums and files of a shard, in several threads",
    "line_without_encoder_x": "times real time by the clock, all threads; goal at least 12,000 on two idle cores",
    "line_without_encoder_core_x": "the same by the processor time: for each core that is free",
    "line_beside_decoding_core_x": "the same with decoding in a process of its own, whose time is not counted",
}


class _NoModel(nn.Module):
    """Stands where a `LoadedEncoder` has its model: one of the shape of HuBERT-large."""

    device = torch.device("cpu")
    config = HubertConfig(feat_extract_norm="layer")


class NoEncoder(BatchEncoder):
    """Answers at once, with the same random features for every recording."""

    def __init__(self, longest_s: float) -> None:
        model: Any = _NoModel()
        extractor = hubert_large_extractor()
        loaded = LoadedEncoder(model=model, feature_extractor=extractor, precision="float32", fingerprint={})
        super().__init__(loaded, "float16")
        shape = num_frames(int(longest_s * SAMPLING_RATE) + SAMPLING_RATE), DIM
        self._features = np.random.default_rng(0).standard_normal(shape, np.float32).astype(np.float16)

    def encode(self, inputs: Inputs) -> Callable[[], EncodedBatch]:
        recordings = [Encoded(self._features[: num_frames(length)]) for length in inputs.lengths]
        return lambda: EncodedBatch(recordings, 0.0)


def measure_host(folder: Path, recipe: Recipe) -> dict[str, float]:
    """Measure what `HOST_NOTES` lists, over a recipe's corpus; stores are made in `folder`, and removed."""
    recipe = recipe.model_copy(update={"store": recipe.store.model_copy(update={"rows_per_shard": ROWS_PER_SHARD})})
    corpus = open_corpus(recipe.corpus)
    plan = plan_corpus(recipe, corpus, ["train"])
    encoder = NoEncoder(float(plan.accepted["duration_s"].to_numpy().max()))
    fastest: dict[str, float] = {}
    for number in range(REPEATS):
        path = folder / f"host-{number}"
        path.mkdir()
        speeds = _measure_threads(path / "threads", recipe, corpus, plan, encoder)
        by_clock, by_core = _measure_line(path / "line", recipe, corpus, plan, encoder, decode_workers=0)
        _, beside = _measure_line(path / "beside", recipe, corpus, plan, encoder, decode_workers=1)
        speeds |= {"line_without_encoder_x": by_clock, "line_without_encoder_core_x": by_core}
        speeds["line_beside_decoding_core_x"] = beside
        for name, speed in speeds.items():
            fastest[name] = max(speed, fastest.get(name, 0.0))
        shutil.rmtree(path)
    return fastest


def _measure_threads(path: Path, recipe: Recipe, corpus: Corpus, plan: Plan, encoder: BatchEncoder) -> dict[str, float]:
    """Do the work of each thread by itself, for the first shard."""
    store = new_store(path, plan, DIM)
    writer = store.write_shard(0)
    assert writer is not None
    with writer:  # in memory that was written to before, as the memory of all but the first shards is
        for array in writer._arrays.values():
            array.fill(0)
        rows = {row["source_id"]: row for row in writer.plan.to_pylist()}
        pieces = corpus.pieces(rows)

        # Decode.
        started = time.thread_time()
        decoded = [one for piece in pieces for one in decode_piece(corpus, piece, 60.0).decoded]
        decode_s = time.thread_time() - started
        samples = {source_id: outcome for source_id, outcome in decoded if not isinstance(outcome, str)}
        assert len(samples) == len(rows)
        lengths = {source_id: len(recording) for source_id, recording in samples.items()}
        audio_s = sum(lengths.values()) / SAMPLING_RATE
        with Decoder(corpus, 1, 60.0) as decoder:
            decoder.warm_up()
            started = time.process_time()
            decoder.collect(decoder.submit(list(rows)))
            receive_s = time.process_time() - started
        batches = cut_batches(lengths, recipe.extract.batch_s)

        prepare_s = store_s = 0.0
        for batch in batches:
            # Prepare.
            started = time.thread_time()
            inputs = encoder.prepare([samples[source_id] for source_id in batch])
            prepare_s += time.thread_time() - started
            # Store.
            encoded = encoder.encode(inputs)
            started = time.thread_time()
            for source_id, recording in zip(batch, encoded().recordings, strict=True):
                append(writer, rows[source_id], lengths[source_id], recording)
            store_s += time.thread_time() - started
        started = time.process_time()  # it writes its files in threads
    commit_s = time.process_time() - started
    taken = {"decode": decode_s, "receive": receive_s, "prepare": prepare_s, "store": store_s, "commit": commit_s}
    return {f"host_{name}_x": audio_s / max(seconds, 1e-9) for name, seconds in taken.items()}


def _measure_line(
    path: Path, recipe: Recipe, corpus: Corpus, plan: Plan, encoder: BatchEncoder, *, decode_workers: int
) -> tuple[float, float]:
    """Run the whole pipeline; return its speed by the clock and by the processor time of this process."""
    section = recipe.extract.model_copy(update={"decode_workers": decode_workers})
    store = new_store(path, plan, DIM)
    report = ExtractReport(store=str(path))
    pipeline = ShardPipeline(recipe.model_copy(update={"extract": section}), corpus, encoder.encoder, store, report)
    pipeline.encoder = encoder
    shards = store.pending_shards()
    first = FIRST_SHARDS if len(shards) > FIRST_SHARDS else 0
    with pipeline:
        pipeline.warm_up()
        pipeline.run(shards[:first])
        before_s, started, before = report.hours_now * 3600, time.perf_counter(), time.process_time()
        pipeline.run(shards[first:])
        clock_s, processor_s = time.perf_counter() - started, time.process_time() - before
    audio_s = report.hours_now * 3600 - before_s
    return audio_s / clock_s, audio_s / processor_s


def new_store(path: Path, plan: Plan, dim: int) -> FeatureStore:
    """Create an empty float16 store for a plan."""
    rows_per_shard = plan.rows_per_shard
    return FeatureStore.create(
        path, plan=plan.table, dim=dim, fingerprint={"bench": True}, rows_per_shard=rows_per_shard
    )
