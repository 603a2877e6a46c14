"""How fast the feature store is on this disk, against what else one could use, side by side in one run.

Every contestant reads (or writes) the same rows, in rounds, one after the other; what is reported is medians and ratios
inside a round, since absolute speeds say more about the machine's other work. Cold means: flushed, and dropped from the
page cache file by file. Optional contestants are skipped when not installed, and the report says so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cache import FeatureReader, FeatureStore, epoch_order, make_plan
from cache.commits import ArrayFile, Commit, PlainFile, root_digest
from cache.index import encode_table
from cache.layout import ROWS_PER_SHARD, zarr_metadata
from cache.shards import crc32c, shard_size
from pipelines.bench.store_contestants import (
    DIM,
    LENGTHS,
    NARROW,
    create_store,
    drop_from_page_cache,
    loquacious_like_frames,
    make_corpus,
    make_readers,
    make_wide_store,
    race_readers,
    race_writers,
    ratio,
)
from pipelines.train.batches import BLOCKS_AHEAD, open_training_reader

FRAME_RATE = 50  # Hz
NUM_UTTERANCES = 6_000_000  # about LoquaciousSet large
PADDING_UTTERANCES = 600_000
WIDE_MB = 150  # of narrow rows: 1,200 blocks, of which training keeps 192
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
    resume_s: float  # from a sealed store of as many utterances to a batch in the middle of an epoch
    worlds_agree: bool  # worlds of 1, 2, 4 and 8, and a resume, each by itself give the same batches
    read_warm_mb_s: dict[str, float]
    read_cold_mb_s: dict[str, float]
    write_mb_s: dict[str, float]
    break_even_float16: float  # encoder speed, times real time, above which caching on this disk is slower
    break_even_int8: float
    size_mb: int
    rounds: int
    lengths: str  # the distribution of the utterances' lengths
    load_average: float
    skipped: list[str]  # contestants that are not installed


def bench_store(directory: Path, *, size_mb: int = 1024, rounds: int = 5, seed: int = 0) -> dict[str, Any]:
    """Measure reading, writing and ordering on the disk that `directory` is on.

    Args:
        directory: an existing folder; a subfolder of some three times `size_mb` and 0.5 GB is made there and removed.
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
        order_s, resume_s = _measure_order(folder, rounds, seed)
        cold_mb_s = {name: statistics.median(speeds) for name, speeds in cold.items()}
        return asdict(
            StoreBench(
                read_warm_vs_zarr=ratio(warm, "store", "zarr"),
                read_cold_vs_zarr=ratio(cold, "store", "zarr"),
                read_cold_vs_sequential=ratio(cold, "store", "sequential"),
                write_vs_plain=ratio(writes, "store", "plain"),
                write_vs_zarr=ratio(writes, "store", "zarr"),
                read_amplification=_amplification(folder, seed),
                padding=_padding(seed),
                order_6m_s=order_s,
                resume_s=resume_s,
                worlds_agree=_worlds_agree(seed),
                read_warm_mb_s={name: statistics.median(speeds) for name, speeds in warm.items()},
                read_cold_mb_s=cold_mb_s,
                write_mb_s={name: statistics.median(speeds) for name, speeds in writes.items()},
                break_even_float16=cold_mb_s["store"] * 1e6 / (DIM * 2 * FRAME_RATE),
                break_even_int8=cold_mb_s["store"] * 1e6 / ((DIM + 2) * FRAME_RATE),
                size_mb=size_mb,
                rounds=rounds,
                lengths=LENGTHS,
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


def _amplification(folder: Path, seed: int) -> float:
    """Read an epoch as training does, ahead and within its memory, and compare with the bytes of features."""
    reader = open_training_reader(make_wide_store(folder, WIDE_MB, seed), "train", world_size=1)
    frames = reader.num_frames.astype(np.int64)
    order = epoch_order(reader.starts, _decoder_positions(frames), budget=BATCH_BUDGET, seed=seed, epoch=0)
    for number, positions in order.batches():
        if number + BLOCKS_AHEAD < len(order):
            reader.prefetch(order[number + BLOCKS_AHEAD])
        reader.read_rows(positions)
    return reader.bytes_read / (int(frames.sum()) * NARROW * 2)


def _worlds_agree(seed: int) -> bool:
    """Compare the batches of several worlds and of a resume, each of which orders the epoch anew."""
    starts, frames = _index_like(PADDING_UTTERANCES, seed)

    def batches(world: int, start: int = 0) -> list[tuple[int, bytes]]:
        order = epoch_order(starts, _decoder_positions(frames), budget=BATCH_BUDGET, seed=seed, epoch=1)
        ranks = (order.batches(start=start, rank=rank, world=world) for rank in range(world))
        return sorted((number, positions.tobytes()) for rank in ranks for number, positions in rank)

    whole = batches(1)
    middle = len(whole) // 2
    return all(batches(world) == whole for world in (2, 4, 8)) and batches(8, middle) == whole[middle:]


def _measure_order(folder: Path, rounds: int, seed: int) -> tuple[float, float]:
    """Time the order of an epoch of six million utterances, and all of a resume up to the first batch of features.

    Returns:
        Median seconds of the order; median seconds to open a store of that size from the disk (header, seal, commit
        records, sizes of all files, index without its text), order the epoch and read a batch in the middle of it.
    """
    starts, frames = _index_like(NUM_UTTERANCES, seed)
    store = make_hollow_store(folder / "hollow", starts, frames, seed)
    order_s, resume_s = [], []
    for number in range(rounds):
        drop_from_page_cache([store.layout.sealed_index, store.layout.sealed_commits])
        begun = time.perf_counter()
        reader = FeatureReader(store.path, split="train")
        costs = _decoder_positions(reader.num_frames.astype(np.int64))
        opened = time.perf_counter()
        order = epoch_order(reader.starts, costs, budget=BATCH_BUDGET, seed=seed, epoch=number)
        order_s.append(time.perf_counter() - opened)
        reader.read_rows(order[len(order) // 2])
        reader.column("utterance_id")  # a batch names its utterances
        resume_s.append(time.perf_counter() - begun)
    return statistics.median(order_s), statistics.median(resume_s)


# ------------------------------------------------------------------------------------------- a store of any size


def make_hollow_store(path: Path, starts: NDArray[np.int64], lengths: NDArray[np.int64], seed: int) -> FeatureStore:
    """Make a sealed store of any size whose shards are holes: all zeros, which take no space on the disk.

    Header, commit records, seal and index, with random words for text, are whole: opening it costs what it costs.
    """
    shard_of = (starts // ROWS_PER_SHARD).astype(np.int32)
    store = create_store(path, lengths[:1], ROWS_PER_SHARD)
    header = replace(store.header, num_shards=int(shard_of[-1]) + 1)
    (path / "zarr.json").write_bytes(zarr_metadata(header)["zarr.json"])
    store = FeatureStore.open(path)
    chunks = header.rows_per_shard // header.chunk_rows
    size = shard_size(chunks, chunks, header.chunk_rows * header.bytes_per_row)
    checksums = np.full(chunks, crc32c(bytes(header.chunk_rows * header.bytes_per_row)), np.uint32)
    features, counts = ArrayFile.of(size, checksums), np.bincount(shard_of, minlength=header.num_shards).tolist()
    commits = [_hollow_shard(store, shard, features, counts[shard]) for shard in range(header.num_shards)]
    index = encode_table(_random_index(starts, lengths, shard_of, seed))
    store.layout.sealed_index.write_bytes(index)
    store.layout.sealed_commits.write_bytes(b"".join(commit.encode() for commit in commits))
    seal = {"root": root_digest(commits), "index_sha256": hashlib.sha256(index).hexdigest()}
    store.layout.sealed.write_text(json.dumps(seal))
    return store


def _hollow_shard(store: FeatureStore, shard: int, features: ArrayFile, num_utterances: int) -> Commit:
    (features_path, *plain_paths) = store.layout.files_of(shard, store.header).items()
    with features_path[1].open("wb") as file:
        file.truncate(features.size_bytes)
    for _, path in plain_paths:
        path.touch()
    return Commit(
        format=store.header.format,
        shard=shard,
        split="train",
        fingerprint_id=store.fingerprint_id,
        plan_id=store.header.plan_id,
        num_utterances=num_utterances,
        num_frames=0,
        num_quarantined=0,
        num_clamped=0,
        duration_s=0.0,
        arrays={features_path[0]: features},
        files={name: PlainFile.of(b"") for name, _ in plain_paths},
        writer="bench",
        finished_at="",
    )


def _random_index(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], shard_of: NDArray[np.int32], seed: int
) -> pa.Table:
    """Fill an index with two random sentences of ten words an utterance, which is what 8 s of English are."""
    rng, count = np.random.default_rng(seed), len(starts)
    words = np.array(["".join(rng.choice(list("etaoinshrdlu"), size)) for size in rng.integers(2, 9, 2_000)], object)
    sentences = pa.array([" ".join(words[rng.integers(0, len(words), 10)]) for _ in range(5_000)])
    halves = [pa.chunked_array([sentences]).take(rng.integers(0, len(sentences), count)) for _ in range(2)]
    columns = {
        "utterance_id": pa.array(np.arange(count)).cast(pa.string()),
        "split": pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["train"]).cast(pa.string()),
        "shard": pa.array(shard_of),
        "start": pa.array(starts),
        "num_frames": pa.array(lengths.astype(np.int32)),
        "num_samples": pa.array(lengths * 320 + 80),
        "duration_s": pa.array(lengths / 50),
        "transcript": pc.binary_join_element_wise(*halves, " "),
    }
    nothing = pa.nulls(count, pa.string())
    return pa.table(columns | dict.fromkeys(("speaker", "source", "extra"), nothing))


# ------------------------------------------------------------------------------------------- for people


def format_table(result: dict[str, Any]) -> str:
    """Write the result as lines for people."""
    width = 20
    lines = [
        f"{result['size_mb']:,} MiB, {result['rounds']} rounds, load average {result['load_average']:.1f}; utterances "
        f"of {result['lengths']}",
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
        f"{'worlds_agree':<26}{result['worlds_agree']!s:>8}   True: worlds of 1, 2, 4, 8 and a resume, by themselves",
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
    "resume_s": "at most 5 s: open a store of as many utterances cold, order the epoch, read a batch of its middle",
}
