"""What `bench store` races: the stores that are read and written, and the contestants.

Optional contestants (extra `bench`) are imported where they are used, and left out when not installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from cache import EpochOrder, FeatureReader, FeatureStore, epoch_order, make_plan
from cache.files import sync_directory
from cache.layout import ROWS_PER_SHARD

DIM = 1024  # HuBERT-large
NARROW = 4  # of the store on which read amplification is counted
LENGTHS = "log-normal length (median 7 s, sigma 0.6, cut to 2-30 s, mean 8.3 s)"
MIB = 1 << 20
CACHE_BYTES = 512 * MIB  # less than the corpus, so that blocks come and go as in a long run
WINDOW_BLOCKS = 2
PREFETCH_UTTERANCES = 160  # about four blocks


@dataclass(frozen=True, kw_only=True)
class BenchCorpus:
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
    """Draw utterance lengths like LoquaciousSet's, as `LENGTHS` says."""
    rng = np.random.default_rng(seed)
    seconds = rng.lognormal(np.log(7.0), 0.6, 2 * count)
    seconds = seconds[(seconds >= 2) & (seconds <= 30)][:count]
    return ((seconds * 16_000).astype(np.int64) - 400) // 320 + 1


def make_corpus(folder: Path, size_mb: int, seed: int) -> BenchCorpus:
    rows_per_shard = min(ROWS_PER_SHARD, size_mb * MIB // (2 * DIM))
    total = size_mb * MIB // (2 * DIM)
    lengths = loquacious_like_frames(total // 50, seed)
    lengths = np.minimum(lengths[: max(1, int(np.searchsorted(np.cumsum(lengths), total * 0.99)))], rows_per_shard)
    rows = np.random.default_rng(seed).standard_normal((rows_per_shard, DIM), dtype=np.float32).astype(np.float16)
    store = create_store(folder / "store", lengths, rows_per_shard)
    for shard in store.pending_shards():
        write_shard(store, shard, rows)
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
    return BenchCorpus(store=store, rows=rows, starts=reader.starts, num_frames=frames, order=order, sample=sample)


def make_wide_store(folder: Path, size_mb: int, seed: int) -> FeatureStore:
    """Make a store of full-size blocks of narrow rows, so that there are many times the blocks that a window holds."""
    lengths = loquacious_like_frames(size_mb * MIB // (2 * NARROW) // 425, seed)
    store = create_store(folder / "wide", lengths, ROWS_PER_SHARD, NARROW)
    rows = np.zeros((ROWS_PER_SHARD, NARROW), np.float16)
    for shard in store.pending_shards():
        write_shard(store, shard, rows)
    store.seal()
    return store


def create_store(path: Path, lengths: NDArray[np.int64], rows_per_shard: int, dim: int = DIM) -> FeatureStore:
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
    return FeatureStore.create(path, plan=plan, dim=dim, rows_per_shard=rows_per_shard, fingerprint={"bench": True})


def write_shard(store: FeatureStore, shard: int, rows: NDArray[np.float16]) -> tuple[float, float]:
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


def make_readers(corpus: BenchCorpus, folder: Path, seed: int) -> dict[str, Reader]:
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


def race_readers(readers: dict[str, Reader], rounds: int, *, is_cold: bool) -> dict[str, list[float]]:
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


def ratio(speeds: dict[str, list[float]], ours: str, other: str) -> float:
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


def _read_store(corpus: BenchCorpus, reader: FeatureReader) -> int:
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


def _read_slices(corpus: BenchCorpus, array: Any) -> int:
    return sum(np.array(array[start : start + length]).nbytes for start, length in _slices(corpus))


def _slices(corpus: BenchCorpus) -> Iterator[tuple[int, int]]:
    for position in corpus.sample:
        yield int(corpus.starts[position]), int(corpus.num_frames[position])


def _read_zarr(corpus: BenchCorpus) -> int:
    return _read_slices(corpus, zarr.open_group(corpus.store.path, mode="r")["features"])


def _prepare_tensorstore(corpus: BenchCorpus, folder: Path) -> Reader:
    import tensorstore  # optional extra `bench`, as below

    def read() -> int:
        array = tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(corpus.store.path / "features")}}
        ).result()
        return sum(array[start : start + length].read().result().nbytes for start, length in _slices(corpus))

    return corpus.files, read


def _prepare_zarrs(corpus: BenchCorpus, folder: Path) -> Reader:
    import zarrs  # noqa: F401  # registers its codec pipeline

    def read() -> int:
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            return _read_zarr(corpus)

    return corpus.files, read


def _prepare_h5py(corpus: BenchCorpus, folder: Path) -> Reader:
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


def _prepare_lhotse(corpus: BenchCorpus, folder: Path) -> Reader:
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


def race_writers(corpus: BenchCorpus, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Write one shard in each round: by the store with its commit, plainly with fsync, and by zarr with fsync.

    The store is timed from the moment at which all frames are in memory, as the others are, and again with the copying
    that happens before, while the encoder works.
    """
    frames = np.asarray(corpus.store.plan(0)["num_frames"], dtype=np.int64)
    store = create_store(folder / "written", np.tile(frames, rounds + 2), corpus.store.rows_per_shard)
    speeds: dict[str, list[float]] = {"store": [], "store with append": [], "plain": [], "zarr": []}
    write_shard(store, 0, corpus.rows)  # finds memory, as the first of many shards does
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
        append_s, commit_s = write_shard(store, number + 1, corpus.rows)
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
