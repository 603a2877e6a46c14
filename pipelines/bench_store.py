"""How fast the feature store is on this disk, against what else one could use, side by side in one run.

Every contestant reads (or writes) the same rows, in rounds, one after the other; what is reported is medians and ratios
inside a round, since absolute speeds say more about the machine's other work. Cold means: flushed, and dropped from the
page cache file by file. Optional contestants are skipped when not installed, and the report says so.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache import FeatureReader, epoch_order, make_plan
from cache.layout import ROWS_PER_SHARD
from pipelines.bench_store_races import (
    DIM,
    BenchCorpus,
    drop_from_page_cache,
    loquacious_like_frames,
    make_corpus,
    make_readers,
    race_readers,
    race_writers,
    ratio,
)

FRAME_RATE = 50  # Hz
NUM_UTTERANCES = 6_000_000  # about LoquaciousSet large
PADDING_UTTERANCES = 600_000
BATCH_BUDGET = 4096  # decoder positions, the default of `train.batch_tokens`
POSITIONS_PER_S = 10 + 4  # projected frames and about four tokens of text
PROMPT_POSITIONS = 60
CONTESTANTS = ("tensorstore", "zarrs", "h5py", "lhotse")  # optional extra `bench`


@dataclass(frozen=True, kw_only=True)
class StoreBench:
    """What `bench_store` found; ratios above 1 are in favour of the store."""

    read_warm_vs_zarr: float
    read_cold_vs_zarr: float
    read_cold_vs_sequential: float
    write_vs_plain: float
    write_vs_zarr: float
    read_amplification: float
    padding: float
    order_6m_s: float
    resume_s: float
    worlds_agree: bool  # the batches of worlds of 1, 2, 4 and 8 are the same
    read_warm_mb_s: dict[str, float]
    read_cold_mb_s: dict[str, float]
    write_mb_s: dict[str, float]
    break_even_float16: float  # encoder speed, times real time, above which caching on this disk is slower
    break_even_int8: float
    size_mb: int
    rounds: int
    load_average: float
    skipped: list[str]  # contestants that are not installed


def bench_store(directory: Path, *, size_mb: int = 1024, rounds: int = 5, seed: int = 0) -> dict[str, Any]:
    """Measure reading, writing and ordering on the disk that `directory` is on.

    Args:
        directory: an existing folder; a subfolder of some three times `size_mb` is made there and removed.
        size_mb: MiB of features to read; shards of 256 MiB, or one smaller one.

    Returns:
        The fields of `StoreBench`; speeds in 10**6 bytes of useful features per second.
    """
    folder = directory / f"bench-store-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        corpus = make_corpus(folder, size_mb, seed)
        skipped = [name for name in CONTESTANTS if importlib.util.find_spec(name) is None]
        readers = make_readers(corpus, folder, seed)
        cold = race_readers(readers, rounds, is_cold=True)
        warm = race_readers(readers, rounds, is_cold=False)
        writes = race_writers(corpus, folder, rounds)
        order_s, resume_s, agree = _measure_order(corpus, rounds, seed)
        cold_mb_s = {name: statistics.median(speeds) for name, speeds in cold.items()}
        return asdict(
            StoreBench(
                read_warm_vs_zarr=ratio(warm, "store", "zarr"),
                read_cold_vs_zarr=ratio(cold, "store", "zarr"),
                read_cold_vs_sequential=ratio(cold, "store", "sequential"),
                write_vs_plain=ratio(writes, "store", "plain"),
                write_vs_zarr=ratio(writes, "store", "zarr"),
                read_amplification=_amplification(corpus, seed),
                padding=_padding(seed),
                order_6m_s=order_s,
                resume_s=resume_s,
                worlds_agree=agree,
                read_warm_mb_s={name: statistics.median(speeds) for name, speeds in warm.items()},
                read_cold_mb_s=cold_mb_s,
                write_mb_s={name: statistics.median(speeds) for name, speeds in writes.items()},
                break_even_float16=cold_mb_s["store"] * 1e6 / (DIM * 2 * FRAME_RATE),
                break_even_int8=cold_mb_s["store"] * 1e6 / ((DIM + 2) * FRAME_RATE),
                size_mb=size_mb,
                rounds=rounds,
                load_average=os.getloadavg()[0],
                skipped=skipped,
            )
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------- ordering


def _index_like(count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Make starts and lengths of a large index out of a planned smaller one, repeated."""
    lengths = loquacious_like_frames(min(count, PADDING_UTTERANCES // 10), seed)
    ids = pa.array(np.arange(len(lengths))).cast(pa.string())
    plan = make_plan(
        pa.table(
            {
                "utterance_id": ids,
                "split": pa.array(["train"] * len(ids)),
                "source_id": ids,
                "num_frames": pa.array(lengths, pa.int32()),
            }
        )
    )
    starts = np.asarray(plan["shard"], np.int64) * ROWS_PER_SHARD + np.asarray(plan["row"])
    order = np.argsort(starts)
    starts, lengths = starts[order], np.asarray(plan["num_frames"], np.int64)[order]
    copies = -(-count // len(starts))
    rows = (int(starts[-1]) // ROWS_PER_SHARD + 1) * ROWS_PER_SHARD
    offsets = np.repeat(np.arange(copies, dtype=np.int64) * rows, len(starts))
    return (np.tile(starts, copies) + offsets)[:count], np.tile(lengths, copies)[:count]


def _decoder_positions(num_frames: NDArray[np.int64]) -> NDArray[np.int64]:
    return PROMPT_POSITIONS + num_frames * POSITIONS_PER_S // FRAME_RATE


def _padding(seed: int) -> float:
    starts, frames = _index_like(PADDING_UTTERANCES, seed)
    costs = _decoder_positions(frames)
    return epoch_order(starts, costs, budget=BATCH_BUDGET, seed=seed, epoch=0).padding(costs)


def _amplification(corpus: BenchCorpus, seed: int) -> float:
    """Read an epoch in order, and compare the bytes read with the bytes of features."""
    reader = FeatureReader(corpus.store)
    for _, positions in corpus.order.batches():
        reader.read_rows(positions)
    return reader.bytes_read / (int(corpus.num_frames.sum()) * DIM * 2)


def _measure_order(corpus: BenchCorpus, rounds: int, seed: int) -> tuple[float, float, bool]:
    """Time the order of an epoch of six million utterances, and a resume in the middle of it to the first batch read.

    Returns:
        Median seconds of the order; median seconds of a resume; whether all worlds give the same batches.
    """
    starts, frames = _index_like(NUM_UTTERANCES, seed)
    costs = _decoder_positions(frames)
    order_s, resume_s = [], []
    for number in range(rounds):
        begun = time.perf_counter()
        order = epoch_order(starts, costs, budget=BATCH_BUDGET, seed=seed, epoch=number)
        order_s.append(time.perf_counter() - begun)
        drop_from_page_cache(corpus.files)
        reader = FeatureReader(corpus.store.path)
        reader.read_rows(order[len(order) // 2] % len(reader))
        resume_s.append(time.perf_counter() - begun)
    start = len(order) // 2
    worlds = []
    for world in (1, 2, 4, 8):
        batches = dict(batch for rank in range(world) for batch in order.batches(start=start, rank=rank, world=world))
        worlds.append(hash(b"".join(batches[number].tobytes() for number in sorted(batches))))
    return statistics.median(order_s), statistics.median(resume_s), len(set(worlds)) == 1


def format_table(result: dict[str, Any]) -> str:
    """Write the result as lines for people."""
    width = 20
    lines = [
        f"{result['size_mb']:,} MiB, {result['rounds']} rounds, load average {result['load_average']:.1f}",
        "",
        f"{'median MB/s':<{width}}{'warm':>10}{'cold':>10}{'write':>10}",
    ]
    warm, cold, write = result["read_warm_mb_s"], result["read_cold_mb_s"], result["write_mb_s"]
    for name in dict.fromkeys([*warm, *write]):
        cells = [f"{column[name]:,.0f}" if name in column else "-" for column in (warm, cold, write)]
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    lines += [
        "",
        *(f"{name:<26}{result[name]:>8.3f}   {goal}" for name, goal in _GOALS.items()),
        "",
        f"Break-even: an encoder faster than {result['break_even_float16']:,.0f} x real time (float16; int8: "
        f"{result['break_even_int8']:,.0f} x) recomputes faster than this disk reads.",
    ]
    if result["skipped"]:
        lines.append(f"Not installed, not measured: {', '.join(result['skipped'])} (pip install 'tinyaudio[bench]').")
    return "\n".join(lines)


_GOALS = {
    "read_warm_vs_zarr": "at least 5",
    "read_cold_vs_zarr": "at least 3",
    "read_cold_vs_sequential": "at least 0.85",
    "write_vs_plain": "at least 0.8",
    "write_vs_zarr": "at least 3",
    "read_amplification": "at most 1.02",
    "padding": "at most 0.02",
    "order_6m_s": "at most 3 s",
    "resume_s": "at most 5 s",
}
