"""`bench store` reports every figure, and its figures react to what they measure."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from cache import EpochOrder, FeatureReader, FeatureStore, epoch_order
from pipelines.bench import store as bench


def test_the_benchmark_reports_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "NUM_UTTERANCES", 20_000)
    monkeypatch.setattr(bench, "PADDING_UTTERANCES", 20_000)
    monkeypatch.setattr(bench, "WIDE_MB", 4)
    result = json.loads(json.dumps(bench.bench_store(tmp_path, size_mb=16, rounds=1, seed=0)))
    for name in (
        "read_warm_vs_zarr",
        "read_cold_vs_zarr",
        "read_cold_vs_sequential",
        "write_vs_plain",
        "write_vs_zarr",
        "order_6m_s",
        "resume_s",
        "break_even_float16",
        "break_even_int8",
    ):
        assert result[name] > 0
    assert 1 <= result["read_amplification"] < 1.2
    assert 0 <= result["padding"] <= 0.03
    assert result["worlds_agree"] is True
    assert {"store", "sequential", "zarr", "memmap"} <= result["read_cold_mb_s"].keys()
    assert result["lengths"] == "log-normal length (median 7 s, sigma 0.6, cut to 2-30 s, mean 8.3 s)"
    assert result["skipped"] == []
    assert bench.NOTES.keys() <= result.keys()
    assert list(tmp_path.iterdir()) == []


def test_worlds_that_order_an_epoch_differently_do_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PADDING_UTTERANCES", 20_000)
    calls = itertools.count()

    def moody(*args: object, **options: object) -> EpochOrder:
        return epoch_order(*args, **options | {"seed": next(calls) // 4})  # another one for the resume

    assert bench._worlds_agree(0)
    monkeypatch.setattr(bench, "epoch_order", moody)
    assert not bench._worlds_agree(0)


def test_read_amplification_shows_blocks_that_are_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(store: FeatureStore, split: str, world_size: int) -> FeatureReader:
        return FeatureReader(store, split=split, cache_bytes=2 * store.header.block_rows * store.header.bytes_per_row)

    monkeypatch.setattr(bench, "WIDE_MB", 4)
    monkeypatch.setattr(bench, "open_training_reader", forgetful)
    assert bench._amplification(tmp_path, 0) > 2


@pytest.mark.parametrize("world", [1, 2, 8])
def test_training_reads_every_block_once_while_it_reads_ahead(tmp_path: Path, world: int) -> None:
    store = bench.make_wide_store(tmp_path, 50, 0)
    readers = [bench.open_training_reader(store, "train", world) for _ in range(world)]
    frames = readers[0].num_frames.astype(np.int64)
    costs = bench._decoder_positions(frames)
    order = epoch_order(readers[0].starts, costs, budget=bench.BATCH_BUDGET, seed=0, epoch=0, num_streams=8)
    for number in range(len(order)):
        later = number + bench.BLOCKS_AHEAD * world
        if later < len(order):
            readers[number % world].prefetch(order[later])
        readers[number % world].read_rows(order[number])
    read = sum(reader.bytes_read for reader in readers)
    assert read < 1.15 * store.num_shards * store.rows_per_shard * store.header.bytes_per_row


def test_a_linked_store_is_a_store(tmp_path: Path) -> None:
    starts, frames = bench._index_like(2_000, 0)
    store = bench.make_linked_store(tmp_path / "linked", starts, frames, 0)
    reader = FeatureReader(store, split="train")
    assert len(reader) == 2_000
    assert 12 < np.mean([len(text.split()) for text in reader.index["transcript"].to_pylist()]) < 28
    assert sum(rows.features.shape[0] for rows in reader.read_rows(range(100))) == frames[:100].sum()


def test_lengths_are_like_those_of_loquacious_set() -> None:
    seconds = bench.loquacious_like_frames(50_000, 0) / 50
    assert seconds.min() >= 1.95
    assert seconds.max() <= 30
    assert 8 <= np.mean(seconds) <= 8.6
