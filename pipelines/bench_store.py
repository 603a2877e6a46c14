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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from cache import FeatureReader, FeatureStore, make_plan
from cache.durable import sync_directory
from cache.layout import ROWS_PER_SHARD
from cache.order import EpochOrder, epoch_order

DIM = 1024  # HuBERT-large
FRAME_RATE = 50  # Hz
MIB = 1 << 20
NUM_UTTERANCES = 6_000_000  # about LoquaciousSet large
PADDING_UTTERANCES = 600_000
BATCH_BUDGET = 4096  # decoder positions, the default of `train.batch_tokens`
POSITIONS_PER_S = 10 + 4  # projected frames and about four tokens of text
PROMPT_POSITIONS = 60
CACHE_BYTES = 512 * MIB  # less than the corpus, so that blocks come and go as in a long run
WINDOW_BLOCKS = 2
PREFETCH_UTTERANCES = 160  # about four blocks
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
        corpus = _make_corpus(folder, size_mb, seed)
        skipped = [name for name in CONTESTANTS if importlib.util.find_spec(name) is None]
        readers = _readers(corpus, folder, seed)
        cold = _race_readers(readers, rounds, is_cold=True)
        warm = _race_readers(readers, rounds, is_cold=False)
        writes = _race_writers(corpus, folder, rounds)
        order_s, resume_s, agree = _measure_order(corpus, rounds, seed)
        cold_mb_s = {name: statistics.median(speeds) for name, speeds in cold.items()}
        return asdict(
            StoreBench(
                read_warm_vs_zarr=_ratio(warm, "store", "zarr"),
                read_cold_vs_zarr=_ratio(cold, "store", "zarr"),
                read_cold_vs_sequential=_ratio(cold, "store", "sequential"),
                write_vs_plain=_ratio(writes, "store", "plain"),
                write_vs_zarr=_ratio(writes, "store", "zarr"),
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


# ------------------------------------------------------------------------------------------- what is read


@dataclass(frozen=True, kw_only=True)
class _Corpus:
    store: FeatureStore
    rows: NDArray[np.float16]  # (rows_per_shard, DIM): every shard holds slices of these
    starts: NDArray[np.int64]
    num_frames: NDArray[np.int64]
    order: EpochOrder
    sample: NDArray[np.int64]  # positions for the contestants that read utterance by utterance

    @property
    def files(self) -> list[Path]:
        return [self.store.layout.array("features", shard) for shard in range(self.store.num_shards)]


def loquacious_like_frames(count: int, seed: int) -> NDArray[np.int64]:
    """Draw utterance lengths like LoquaciousSet's: log-normal (median 7 s, sigma 0.6), cut to 2-30 s; mean 8.3 s."""
    rng = np.random.default_rng(seed)
    seconds = rng.lognormal(np.log(7.0), 0.6, 2 * count)
    seconds = seconds[(seconds >= 2) & (seconds <= 30)][:count]
    return ((seconds * 16_000).astype(np.int64) - 400) // 320 + 1


def _make_corpus(folder: Path, size_mb: int, seed: int) -> _Corpus:
    rows_per_shard = min(ROWS_PER_SHARD, size_mb * MIB // (2 * DIM))
    total = size_mb * MIB // (2 * DIM)
    lengths = loquacious_like_frames(total // 50, seed)
    lengths = np.minimum(lengths[: max(1, int(np.searchsorted(np.cumsum(lengths), total * 0.99)))], rows_per_shard)
    rows = np.random.default_rng(seed).standard_normal((rows_per_shard, DIM), dtype=np.float32).astype(np.float16)
    store = _create(folder / "store", lengths, rows_per_shard)
    for shard in store.pending_shards():
        _write_shard(store, shard, rows)
    store.seal()
    reader = FeatureReader(store)
    frames = reader.num_frames.astype(np.int64)
    order = epoch_order(
        reader.starts,
        frames,
        budget=int(max(12_000, frames.max())),
        seed=seed,
        epoch=0,
        block_rows=store.header.block_rows,
        window_blocks=WINDOW_BLOCKS,
    )
    sample = np.random.default_rng(seed).permutation(len(reader))[: max(16, len(reader) // 4)]
    return _Corpus(store=store, rows=rows, starts=reader.starts, num_frames=frames, order=order, sample=sample)


def _create(path: Path, lengths: NDArray[np.int64], rows_per_shard: int) -> FeatureStore:
    ids = [f"u{i}" for i in range(len(lengths))]
    plan = make_plan(
        rows_per_shard=rows_per_shard,
        table=pa.table(
            {
                "utterance_id": ids,
                "split": ["train"] * len(ids),
                "source_id": ids,
                "num_frames": pa.array(lengths, pa.int32()),
            }
        ),
    )
    return FeatureStore.create(path, plan=plan, dim=DIM, rows_per_shard=rows_per_shard, fingerprint={"bench": True})


def _write_shard(store: FeatureStore, shard: int, rows: NDArray[np.float16]) -> tuple[float, float]:
    """Write a shard out of slices of `rows`; returns the seconds of the appends and of the commit."""
    plan = store.plan(shard)
    columns = (plan[name].to_pylist() for name in ("utterance_id", "row", "num_frames"))
    places = list(zip(*columns, strict=True))
    begun = time.perf_counter()
    writer = store.write_shard(shard)
    assert writer is not None
    with writer:
        for utterance_id, row, num_frames in places:
            writer.append(utterance_id, rows[row : row + num_frames], num_samples=0, duration_s=0.0, transcript="")
        appended = time.perf_counter()
    return appended - begun, time.perf_counter() - appended


# ------------------------------------------------------------------------------------------- reading

Reader = tuple[list[Path], Callable[[], int]]  # the files to drop when cold; reads, and returns bytes of features


def _readers(corpus: _Corpus, folder: Path, seed: int) -> dict[str, Reader]:
    """Prepare the contestants, the optional ones where installed."""
    flat = folder / "rows.bin"
    with flat.open("wb") as file:
        for _ in range(corpus.store.num_shards):
            file.write(corpus.rows.data)
    ours = FeatureReader(corpus.store.path, cache_bytes=CACHE_BYTES)
    readers: dict[str, Reader] = {
        "store": (corpus.files, lambda: _read_store(corpus, ours)),
        "sequential": (corpus.files, lambda: _read_sequentially(corpus.files)),
        "zarr": (corpus.files, lambda: _read_zarr(corpus)),
        "memmap": ([flat], lambda: _read_slices(corpus, np.memmap(flat, np.float16, "r").reshape(-1, DIM))),
    }
    for name, prepare in (
        ("tensorstore", _prepare_tensorstore),
        ("zarrs", _prepare_zarrs),
        ("h5py", _prepare_h5py),
        ("lhotse", _prepare_lhotse),
    ):
        if importlib.util.find_spec(name) is not None:
            readers[name] = prepare(corpus, folder)
    return readers


def _race_readers(readers: dict[str, Reader], rounds: int, *, is_cold: bool) -> dict[str, list[float]]:
    speeds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, (files, read) in readers.items():
            if not speeds[name]:
                read()  # finds memory, fills the page cache
            if is_cold:
                drop_from_page_cache(files)
            speeds[name].append(_speed(read))
    return speeds


def _speed(work: Callable[[], int]) -> float:
    begun = time.perf_counter()
    size = work()
    return size / 1e6 / (time.perf_counter() - begun)


def _ratio(speeds: dict[str, list[float]], ours: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(speeds[ours], speeds[other], strict=True))


def drop_from_page_cache(files: list[Path]) -> None:
    """Flush files and make the next read come from the disk."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _read_store(corpus: _Corpus, reader: FeatureReader) -> int:
    reader.clear()
    size = 0
    for number, positions in corpus.order.batches():
        reader.prefetch(corpus.order.positions[corpus.order.bounds[number] :][:PREFETCH_UTTERANCES])
        size += sum(rows.features.nbytes for rows in reader.read_rows(positions))
    return size


def _read_sequentially(files: list[Path]) -> int:
    buffer, size = bytearray(4 * MIB), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while read := file.readinto(buffer):
                size += read
    return size


def _read_slices(corpus: _Corpus, array: Any) -> int:
    return sum(np.array(array[start : start + length]).nbytes for start, length in _slices(corpus))


def _slices(corpus: _Corpus) -> Iterator[tuple[int, int]]:
    for position in corpus.sample:
        yield int(corpus.starts[position]), int(corpus.num_frames[position])


def _read_zarr(corpus: _Corpus) -> int:
    return _read_slices(corpus, zarr.open_group(corpus.store.path, mode="r")["features"])


def _prepare_tensorstore(corpus: _Corpus, folder: Path) -> Reader:
    import tensorstore  # optional extra `bench`, as below

    def read() -> int:
        array = tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(corpus.store.path / "features")}}
        ).result()
        return sum(array[start : start + length].read().result().nbytes for start, length in _slices(corpus))

    return corpus.files, read


def _prepare_zarrs(corpus: _Corpus, folder: Path) -> Reader:
    import zarrs  # noqa: F401  # registers its codec pipeline

    def read() -> int:
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            return _read_zarr(corpus)

    return corpus.files, read


def _prepare_h5py(corpus: _Corpus, folder: Path) -> Reader:
    import h5py

    path = folder / "rows.h5"
    with h5py.File(path, "w") as file:
        rows = corpus.rows.shape[0]
        array = file.create_dataset(
            "features",
            (corpus.store.num_shards * rows, DIM),
            "<f2",
            chunks=(corpus.store.header.chunk_rows, DIM),
            fletcher32=True,
        )
        for shard in range(corpus.store.num_shards):
            array[shard * rows : (shard + 1) * rows] = corpus.rows

    def read() -> int:
        with h5py.File(path, "r") as file:
            return _read_slices(corpus, file["features"])

    return [path], read


def _prepare_lhotse(corpus: _Corpus, folder: Path) -> Reader:
    from lhotse.features.io import NumpyFilesReader, NumpyFilesWriter

    path = folder / "lhotse"
    with NumpyFilesWriter(path) as writer:
        keys = [
            writer.write(f"u{start}", corpus.rows[start % len(corpus.rows) :][:length])
            for start, length in _slices(corpus)
        ]

    def read() -> int:
        reader = NumpyFilesReader(path)
        return sum(reader.read(key).nbytes for key in keys)

    return [file for file in path.rglob("*") if file.is_file()], read


# ------------------------------------------------------------------------------------------- writing


def _race_writers(corpus: _Corpus, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Write one shard in each round: by the store with its commit, plainly with fsync, and by zarr with fsync.

    The store is timed from the moment at which all frames are in memory, as the others are, and again with the copying
    that happens before, while the encoder works.
    """
    frames = np.asarray(corpus.store.plan(0)["num_frames"], dtype=np.int64)
    store = _create(folder / "written", np.tile(frames, rounds + 2), corpus.store.rows_per_shard)
    speeds: dict[str, list[float]] = {"store": [], "store with append": [], "plain": [], "zarr": []}
    _write_shard(store, 0, corpus.rows)  # finds memory, as the first of many shards does
    for number in range(rounds):
        plain, theirs = folder / f"plain{number}", folder / f"zarr{number}"
        array = zarr.create_array(
            theirs,
            shape=corpus.rows.shape,
            dtype="<f2",
            shards=corpus.rows.shape,
            chunks=(corpus.store.header.chunk_rows, DIM),
            compressors=[Crc32cCodec()],
        )
        append_s, commit_s = _write_shard(store, number + 1, corpus.rows)
        size = store.commit(number + 1).num_frames * DIM * 2 / 1e6
        speeds["store"].append(size / commit_s)
        speeds["store with append"].append(size / (append_s + commit_s))
        speeds["plain"].append(_speed(partial(_write_plainly, plain, corpus.rows)))
        speeds["zarr"].append(_speed(partial(_write_zarr, array, theirs, corpus.rows)))
        plain.unlink()
        shutil.rmtree(theirs)
        store.layout.array("features", number + 1).unlink()
    return speeds


def _write_plainly(path: Path, rows: NDArray[np.float16]) -> int:
    with path.open("wb", buffering=0) as file:
        view = rows.reshape(-1).view(np.uint8).data
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())
    sync_directory(path.parent)
    return rows.nbytes


def _write_zarr(array: Any, path: Path, rows: NDArray[np.float16]) -> int:
    array[...] = rows
    for file in path.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    sync_directory(path)
    return rows.nbytes


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


def _amplification(corpus: _Corpus, seed: int) -> float:
    """Read an epoch in order, and compare the bytes read with the bytes of features."""
    reader = FeatureReader(corpus.store)
    for _, positions in corpus.order.batches():
        reader.read_rows(positions)
    return reader.bytes_read / (int(corpus.num_frames.sum()) * DIM * 2)


def _measure_order(corpus: _Corpus, rounds: int, seed: int) -> tuple[float, float, bool]:
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
