"""How fast stage one is, beside loops that one would write without it, in one run.

    batch1     a plain transformers loop, one recording at a time
    padded     a loop over fixed-size padded batches, in the order of the corpus
    npy        loop batch1 with one .npy file per recording
    ours       the shard pipeline, from encoded audio to committed shards

All decode the same WAV files, with durations like LoquaciousSet's (log-normal, 2 to 30 s, mean about 8 s), and run the
same encoder: the bundled one, or HuBERT-large's shape at random weights.
"""

import copy
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from numpy.typing import NDArray

from pipelines.bench.host import HOST_NOTES, measure_host, new_store
from pipelines.bench.memory import CountFlops, matmul_peak, measuring_resident
from pipelines.bench.models import bench_encoder
from pipelines.bench.race import median_ratio, race
from pipelines.corpora import Corpus, open_corpus
from pipelines.encoders import LoadedEncoder, pick_device
from pipelines.extract.encode import open_batch_encoder
from pipelines.extract.plan import Plan, plan_corpus
from pipelines.extract.report import ExtractReport
from pipelines.extract.shard_pipeline import ShardPipeline
from pipelines.recipes import Recipe, load_recipe
from tinyaudio.model.audio import SAMPLING_RATE, Samples, load_audio, num_frames
from tinyaudio.model.encoder import encode, give_back_free_memory

PADDED_BATCH = 8  # recordings in a fixed-size batch
BUNDLED_S, FULL_SIZE_S, GPU_S = 600.0, 100.0, 30_000.0  # seconds of audio in one round; a GPU's takes about ten seconds
ROW_GROUP = 20  # recordings, so that a shard spans several row groups and a row group two shards, as in reality
BUNDLED_ROUNDS, FULL_SIZE_ROUNDS = 3, 1
GPU_SLOW_SHARE = 0.1  # of the audio, for the slow contestants on a GPU: else they alone would take ten minutes
HOST_S = 6_000.0  # seconds of audio for the host's part: nine shards

NOTES = {
    "vs_batch1": "times as fast as one recording at a time",
    "vs_padded": f"times as fast as padded batches of {PADDED_BATCH}",
    "vs_npy": "times as fast as one at a time into .npy files",
    "padding": "at most 0.03 of the encoder's input",
    "padding_fixed": f"of padded batches of {PADDED_BATCH}",
    "encoder_busy": "fraction of the time",
    "decode_share": "of the time, beside the encoder",
    "write_share": "of the time, beside the encoder",
    "matmul_share": "of the device's matmul peak; not measured without a GPU",
    "vs_cudnn_attention": "times as fast as the encoder alone with cuDNN's attention, which we switch off; a GPU only",
    "bf16_vs_float32": "times as fast in bfloat16 as in float32, the encoder alone; a GPU only",
    "compiled_vs_plain": "times as fast with encoder.compile, the encoder alone; from 1.15 it should be on; a GPU only",
    **HOST_NOTES,
}


def bench_extract(
    *, full_size: bool = False, audio_s: float | None = None, rounds: int | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Measure.

    Args:
        full_size: HuBERT-large's shape at random weights (315 million parameters) instead of the bundled encoder.
        audio_s: seconds of audio in one round; None chooses a few minutes of work.
        rounds: of all contestants; None chooses 3, or 1 at full size on a CPU.

    Returns:
        `encoder`, `device`, `audio_s` of a round, `mean_duration_s`; `real_time_factor`: seconds of audio per second;
        `vs_batch1`, `vs_padded`, `vs_npy`: our speed over theirs, which on a GPU get a tenth of the audio; `padding`:
        fraction of the encoder's input, and `padding_fixed` that of fixed-size batches; `encoder_busy` and
        `idle_share`: fractions of the time; `decode_share`, `write_share`: work beside the encoder, over the time;
        `matmul_share`: fraction of the measured matmul peak, by the wall clock, None without a GPU;
        `vs_cudnn_attention`, `bf16_vs_float32`, `compiled_vs_plain`: of the encoder alone, None without a GPU;
        `peak_rss_bytes`: of our first round alone, decoding processes included; the keys of `host.HOST_NOTES`;
        `load_average`.
    """
    where = pick_device(device)
    is_gpu = where.type == "cuda"
    encoder = bench_encoder(where, full_size=full_size)
    seconds = audio_s or (GPU_S if is_gpu else FULL_SIZE_S if full_size else BUNDLED_S)
    rounds = rounds or (FULL_SIZE_ROUNDS if full_size and not is_gpu else BUNDLED_ROUNDS)
    with tempfile.TemporaryDirectory(prefix="bench-extract-") as name:
        folder = Path(name)
        (folder / "host").mkdir()
        host = measure_host(folder / "host", make_wav_corpus(folder / "host", audio_s or HOST_S))
        shutil.rmtree(folder / "host")
        recipe = make_wav_corpus(folder, seconds)
        give_back_free_memory()  # so that the peak is not that of making the corpus
        corpus = open_corpus(recipe.corpus)
        plan = plan_corpus(recipe, corpus, ["train"])
        durations = plan.accepted["duration_s"].to_numpy()
        _encode_padded(encoder, [np.zeros(SAMPLING_RATE, np.float32)])  # first calls allocate and choose kernels
        reports: list[tuple[ExtractReport, int, float]] = []  # of each round, with its peak memory and seconds

        def ours() -> float:
            with measuring_resident() as peak:
                took_s, report = extract_once(folder / f"store-{len(reports)}", recipe, corpus, plan, encoder)
            reports.append((report, peak.size_bytes, took_s))
            return float(durations.sum()) / took_s

        few = slow_share(plan, GPU_SLOW_SHARE if is_gpu else 1.0)
        ways: dict[str, Callable[[], float]] = {
            "ours": ours,
            "batch1": partial(_loop, corpus, few, encoder, 1),
            "padded": partial(_loop, corpus, few, encoder, PADDED_BATCH),
            "npy": partial(_loop, corpus, few, encoder, 1, folder),
        }
        speeds = race(ways, rounds)
    batches = [durations[i : i + PADDED_BATCH] for i in range(0, len(durations), PADDED_BATCH)]
    total_s, (report, _, took_s) = float(durations.sum()), reports[-1]
    speed = statistics.median(speeds["ours"])
    alone = encoder_alone(encoder) if is_gpu else None
    return {
        "encoder": "HuBERT-large at random weights" if full_size else "bundled",
        "device": torch.cuda.get_device_name() if is_gpu else f"{len(os.sched_getaffinity(0))} CPU cores",
        "audio_s": total_s,
        "mean_duration_s": float(durations.mean()),
        "real_time_factor": speed,
        "vs_batch1": median_ratio(speeds["ours"], speeds["batch1"]),
        "vs_padded": median_ratio(speeds["ours"], speeds["padded"]),
        "vs_npy": median_ratio(speeds["ours"], speeds["npy"]),
        "padding": report.padding,
        "padding_fixed": 1 - total_s / float(sum(len(batch) * batch.max() for batch in batches)),
        "encoder_busy": report.encoder_busy,
        "decode_share": report.decode_s / took_s,
        "write_share": report.write_s / took_s,
        "idle_share": max(0.0, 1 - report.encoder_busy),
        "matmul_share": flops_per_audio_second(encoder) * speed / matmul_peak(where) if is_gpu else None,
        "vs_cudnn_attention": alone["plain"] / alone["cudnn"] if alone else None,
        "bf16_vs_float32": alone["plain"] / alone["float32"] if alone else None,
        "compiled_vs_plain": alone["compiled"] / alone["plain"] if alone else None,
        "peak_rss_bytes": reports[0][1],
        **host,
        "load_average": os.getloadavg()[0],
    }


def encoder_alone(
    encoder: LoadedEncoder, num_batches: int = 12, batch_s: float = 320.0, *, with_compiled: bool = True
) -> dict[str, float]:
    """Measure the encoder in seconds of audio per second: plain, with cuDNN's attention, in float32, and compiled.

    The shapes of all batches differ, as in an extraction, and none comes twice.
    """
    variants = {"plain": encoder, "cudnn": encoder, "float32": replace(encoder, precision="float32")}
    if with_compiled:
        compiled_model = copy.copy(encoder.model)
        compiled_model.compile(dynamic=True)
        variants["compiled"] = replace(encoder, model=compiled_model)
    random, speeds = np.random.default_rng(0), {}
    for name, variant in variants.items():
        batch_encoder = open_batch_encoder(variant, "float16")
        torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
        audio_s = took_s = 0.0
        for number in range(num_batches + 2):
            duration_s = random.uniform(0.1, 1.0) * min(30.0, batch_s)
            count = max(1, int(batch_s / duration_s))
            samples = [random.standard_normal(int(duration_s * SAMPLING_RATE), np.float32) for _ in range(count)]
            inputs = batch_encoder.prepare(samples)
            started = time.perf_counter()
            batch_encoder.encode(inputs)()
            if number >= 2:  # the first ones choose kernels, or compile
                took_s, audio_s = took_s + time.perf_counter() - started, audio_s + count * duration_s
        speeds[name] = audio_s / took_s
    torch.backends.cuda.enable_cudnn_sdp(False)
    return speeds


def slow_share(plan: Plan, share: float) -> list[str]:
    """Choose the recordings of the slow contestants: a share of the plan, at least two padded batches."""
    source_ids: list[str] = plan.accepted["source_id"].to_pylist()
    return source_ids[: max(2 * PADDED_BATCH, int(share * len(source_ids)))]


def make_wav_corpus(folder: Path, seconds: float) -> Recipe:
    """Write WAV files of noise into Parquet with LoquaciousSet's columns, and return the recipe that reads them."""
    random, total = np.random.default_rng(0), 0.0
    rows: list[dict[str, Any]] = []
    while total < seconds:
        duration_s = float(random.lognormal(np.log(7.0), 0.55))
        if 2.0 <= duration_s <= 30.0:
            total += duration_s
            buffer = io.BytesIO()
            samples = 0.1 * random.standard_normal(round(duration_s * SAMPLING_RATE))
            soundfile.write(buffer, samples, SAMPLING_RATE, format="WAV", subtype="PCM_16")
            cell = {"bytes": buffer.getvalue(), "path": f"{len(rows)}.wav"}
            rows.append({"ID": str(len(rows)), "duration": duration_s, "wav": cell, "text": "nothing"})
    path = folder / "corpus" / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=ROW_GROUP)
    overrides = [f"corpus.path={folder / 'corpus'}", "store.rows_per_shard=131072", "extract.batch_s=320"]
    return load_recipe("demo", [*overrides, "extract.disk_margin_gb=0"])


def extract_once(
    path: Path, recipe: Recipe, corpus: Corpus, plan: Plan, encoder: LoadedEncoder
) -> tuple[float, ExtractReport]:
    """Extract into a new store; return the seconds, without starting the decoding processes, and the report."""
    store = new_store(path, plan, encoder.model.config.hidden_size)
    report = ExtractReport(store=str(path))
    with ShardPipeline(recipe, corpus, encoder, store, report) as pipeline:
        pipeline.warm_up()
        begun = time.perf_counter()
        pipeline.run(store.pending_shards())
        return time.perf_counter() - begun, report


def _loop(
    corpus: Corpus, source_ids: Sequence[str], encoder: LoadedEncoder, size: int, npy: Path | None = None
) -> float:
    """Decode and encode `size` recordings at a time in the order of the corpus; return seconds of audio per second."""
    begun, num_samples = time.perf_counter(), 0
    kept: list[NDArray[np.float16]] = []
    waiting: list[Samples] = []
    for _, audio in corpus.read_audio(source_ids):
        waiting.append(load_audio(audio))
        num_samples += len(waiting[-1])
        if len(waiting) == size:
            kept += _encode_padded(encoder, waiting)
            waiting = []
            if npy is not None:
                np.save(npy / f"{len(kept)}.npy", kept[-1])
    if waiting:
        kept += _encode_padded(encoder, waiting)
    return num_samples / SAMPLING_RATE / (time.perf_counter() - begun)


def _encode_padded(encoder: LoadedEncoder, recordings: list[Samples]) -> list[NDArray[np.float16]]:
    """Encode as the documentation of transformers does."""
    inputs = encoder.feature_extractor(
        recordings, sampling_rate=SAMPLING_RATE, padding=True, return_attention_mask=True, return_tensors="pt"
    ).to(encoder.model.device)
    is_low = encoder.precision == "bfloat16"
    with torch.no_grad(), torch.autocast(encoder.model.device.type, torch.bfloat16, enabled=is_low):
        hidden = encoder.model(**inputs).last_hidden_state
    host = hidden.float().cpu().numpy().astype(np.float16)
    return [row[: num_frames(len(samples))] for row, samples in zip(host, recordings, strict=True)]


def flops_per_audio_second(encoder: LoadedEncoder) -> float:
    """Count the encoder's floating-point operations for a second of audio, over ten seconds."""
    values = torch.randn(1, 10 * SAMPLING_RATE, device=encoder.model.device)
    with CountFlops() as counter:
        encode(encoder.model, values, torch.ones_like(values, dtype=torch.long), encoder.precision)
    return counter.flops / 10
