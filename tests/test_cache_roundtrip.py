"""What goes into a feature store comes out of it, by every way of reading."""

import base64
import pickle
import tempfile
import threading
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
import zarr
from cache_stores import calibrate, create, fill, make_features, make_table, sealed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache import FeatureReader, FeatureStore, Quantized, make_plan, store_verify
from cache.blocks import BlockCache, Rows
from cache.index import decode_quarantine
from cache.layout import Encoding

LENGTHS = st.lists(st.integers(1, 64), max_size=24)


def dequantized(stored: np.ndarray | Quantized) -> np.ndarray:
    return stored.dequantize() if isinstance(stored, Quantized) else stored


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lengths=LENGTHS,
    dim=st.integers(1, 9),
    rows_per_shard=st.sampled_from([64, 65, 67, 96]),
    encoding=st.sampled_from(get_args(Encoding)),
)
def test_every_utterance_comes_back(lengths: list[int], dim: int, rows_per_shard: int, encoding: str) -> None:
    features = make_features(lengths, dim)
    with tempfile.TemporaryDirectory() as folder:
        store = sealed(Path(folder) / "store", features, dim=dim, rows_per_shard=rows_per_shard, encoding=encoding)
        reader = FeatureReader(store)
        assert sorted(reader.index["utterance_id"].to_pylist()) == sorted(features)
        for utterance_id, stored in zip(
            reader.index["utterance_id"].to_pylist(), reader.read(range(len(reader))), strict=True
        ):
            expected = features[utterance_id]
            if encoding == "float16":
                np.testing.assert_array_equal(stored, expected.astype(np.float16))
            else:
                # Half a step that reaches the peak; below 8 bits a frame may clip, but never has more error in all.
                top = 127 if encoding == "int8" else 2 ** (store.header.bits - 1) - 0.5
                step = np.abs((expected - store.calibration.mean) / store.calibration.std).max(1, keepdims=True) / top
                error = np.abs(stored.dequantize() - expected)
                allowed = 0.51 * step * store.calibration.std * 1.001 + 1e-4
                if encoding == "int8":
                    assert (error <= allowed).all()
                total = np.square(error / store.calibration.std).sum(1, keepdims=True)
                assert (total <= dim * np.square(0.51 * step * 1.001 + 1e-4 / store.calibration.std.min())).all()
            np.testing.assert_array_equal(dequantized(reader.get(utterance_id)), dequantized(stored))
        assert store_verify(store, deep=True) == []


@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS, encoding=st.sampled_from(["float16", "int8", "int4", "int3"]))
def test_plain_zarr_reads_the_same_numbers(lengths: list[int], encoding: str) -> None:
    features = make_features(lengths)
    with tempfile.TemporaryDirectory() as folder:
        store = sealed(Path(folder) / "store", features, encoding=encoding)
        group = zarr.open_group(store.path, mode="r")
        reader = FeatureReader(store)
        for row, rows in zip(reader.index.to_pylist(), reader.read_rows(range(len(reader))), strict=True):
            place = slice(row["start"], row["start"] + row["num_frames"])
            np.testing.assert_array_equal(group["features"][place], rows.features)
            if rows.scales is not None:
                np.testing.assert_array_equal(group["scales"][place], rows.scales)
        if encoding != "float16":
            content = base64.b64decode(group.attrs["feature_store"]["calibration"])
            np.testing.assert_array_equal(np.frombuffer(content, "<f4").reshape(2, 8), store.calibration.array)


@pytest.mark.parametrize(("encoding", "fill_value"), [("float16", np.nan), ("int8", -128), ("int4", 0)])
def test_rows_without_an_utterance_read_as_fill(tmp_path: Path, encoding: str, fill_value: float) -> None:
    features = make_features([10, 20])
    store = sealed(tmp_path / "store", features, encoding=encoding)
    rows = zarr.open_group(store.path, mode="r")["features"][...]
    used = np.zeros(len(rows), dtype=bool)
    for row in FeatureReader(store).index.to_pylist():
        used[row["start"] : row["start"] + row["num_frames"]] = True
    np.testing.assert_array_equal(rows[~used], np.full((64 - 30, rows.shape[1]), fill_value))
    assert np.isfinite(rows[used]).all()
    if encoding != "float16":
        assert np.isnan(zarr.open_group(store.path, mode="r")["scales"][...][~used]).all()


def test_a_full_shard_file_is_byte_for_byte_what_zarr_writes(tmp_path: Path) -> None:
    features = make_features([64], dim=3)
    store = sealed(tmp_path / "ours", features, dim=3)
    copy = zarr.create_array(
        tmp_path / "zarr",
        shape=(64, 3),
        dtype="<f2",
        shards=(64, 3),
        chunks=(store.header.chunk_rows, 3),
        compressors=[zarr.codecs.Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    copy[...] = features["u0"].astype(np.float16)
    assert store.layout.array("features", 0).read_bytes() == (tmp_path / "zarr" / "c.0.0").read_bytes()


def test_a_shard_does_not_depend_on_the_order_of_its_utterances(tmp_path: Path) -> None:
    features = make_features([10, 20, 5, 7])
    forward, backward = create(tmp_path / "a", features), create(tmp_path / "b", features)
    for store, ids in (forward, ["u0", "u1", "u2", "u3"]), (backward, ["u3", "u2", "u1", "u0"]):
        with store.write_shard(0) as writer:
            for utterance_id in ids:
                writer.append(utterance_id, features[utterance_id], num_samples=1, duration_s=1.0, transcript="")
    for name in ("features/c.0.0", "index/000000.parquet"):
        assert (forward.path / name).read_bytes() == (backward.path / name).read_bytes()


def test_an_empty_corpus_makes_an_empty_store(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", {})
    assert store.num_shards == 0
    assert store.is_sealed
    assert len(FeatureReader(store)) == 0
    assert zarr.open_group(store.path, mode="r")["features"].shape == (0, 8)
    assert store_verify(store, deep=True) == []


def test_an_utterance_as_long_as_a_shard_is_stored_and_a_longer_one_quarantined(tmp_path: Path) -> None:
    features = make_features([64, 65, 1])
    store = sealed(tmp_path / "store", features)
    reader = FeatureReader(store)
    assert set(reader.index["utterance_id"].to_pylist()) == {"u0", "u2"}
    np.testing.assert_array_equal(reader.get("u0"), features["u0"].astype(np.float16))
    (line,) = decode_quarantine(store.layout.rejected.read_bytes())
    assert (line["utterance_id"], line["reason"]) == ("u1", "longer_than_shard")


def test_splits_never_share_a_shard(tmp_path: Path) -> None:
    features = make_features([10] * 12)
    splits = ["train"] * 7 + ["dev"] * 5
    store = sealed(tmp_path / "store", features, splits=splits)
    for shard in range(store.num_shards):
        assert len(set(store.plan(shard)["split"].to_pylist())) == 1
    assert len(FeatureReader(store, split="train")) == 7
    assert len(FeatureReader(store, split="dev")) == 5
    with pytest.raises(ValueError, match=r"split 'test' has no finished shard.*'dev', 'train'"):
        FeatureReader(store, split="test")


def test_a_column_read_alone_is_that_of_the_index(tmp_path: Path) -> None:
    features = make_features([10, 40, 7, 30, 12, 33, 20, 21], seed=3)
    splits = ["train", "dev", "train", "test", "dev", "train", "test", "train"]
    store = create(tmp_path / "store", features, splits=splits)
    fill(store, features)
    for seal in (False, True):
        if seal:
            store.seal()
        for split in (None, "train", "dev", "test"):
            index = FeatureReader(store, split=split).index
            assert set(index["split"].to_pylist()) == ({split} if split else {"train", "dev", "test"})
            for name in index.column_names:
                alone = FeatureReader(store, split=split)
                assert alone.column(name).to_pylist() == index[name].to_pylist()
                assert ("index" in alone.__dict__) is not seal  # a sealed one is read without the rest


def test_an_unsealed_store_shows_exactly_its_committed_shards(tmp_path: Path) -> None:
    features = make_features([30] * 8)
    store = create(tmp_path / "store", features)
    assert len(FeatureReader(store)) == 0
    fill(store, features, [1])
    reader = FeatureReader(store)
    assert set(reader.index["utterance_id"].to_pylist()) == set(store.plan(1)["utterance_id"].to_pylist())
    assert store.pending_shards() == [0, 2, 3]
    assert store.pending_shards(part=(1, 2)) == [2, 3]


def test_a_longer_utterance_than_planned_uses_room_left_over(tmp_path: Path) -> None:
    features = make_features([10, 10, 10])
    store = create(tmp_path / "store", features)
    longer = make_features([10, 14, 40], seed=1)
    with store.write_shard(0) as writer:
        for utterance_id, stays in ("u0", True), ("u1", True), ("u2", False):
            assert stays == writer.append(
                utterance_id, longer[utterance_id], num_samples=1, duration_s=1.0, transcript=""
            )
    reader = FeatureReader(store)
    for utterance_id in ("u0", "u1"):
        np.testing.assert_array_equal(reader.get(utterance_id), longer[utterance_id].astype(np.float16))
    (line,) = decode_quarantine(store.layout.quarantine(0).read_bytes())
    assert line["reason"] == "longer_than_planned"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding", ["float16", "int8", "int4"])
def test_features_that_are_not_finite_are_quarantined(tmp_path: Path, bad: float, encoding: str) -> None:
    features = make_features([10, 10])
    store = create(tmp_path / "store", features, encoding=encoding)
    features["u1"][3, 2] = bad
    fill(store, features)
    assert FeatureReader(store).index["utterance_id"].to_pylist() == ["u0"]
    (line,) = decode_quarantine(store.layout.quarantine(0).read_bytes())
    assert (line["utterance_id"], line["reason"]) == ("u1", "non_finite")
    scales_or_values = zarr.open_group(store.path, mode="r")["features" if encoding == "float16" else "scales"][...]
    assert np.count_nonzero(np.isfinite(scales_or_values.reshape(64, -1)[:, 0])) == 10


def test_values_beyond_float16_are_clamped_and_counted(tmp_path: Path) -> None:
    features = make_features([10])
    features["u0"][0, :2] = 1e6, -1e6
    store = sealed(tmp_path / "store", features)
    assert FeatureReader(store).get("u0")[0, :2].tolist() == [65504, -65504]
    assert store.commit(0).num_clamped == 2


def test_a_pickled_reader_opens_where_it_arrives(tmp_path: Path) -> None:
    features = make_features([10] * 20)
    store = sealed(tmp_path / "store", features, splits=["train"] * 10 + ["dev"] * 10)
    reader = pickle.loads(pickle.dumps(FeatureReader(store, split="dev")))
    assert len(reader) == 10
    assert len(reader.read([0, 9])) == 2


def test_frames_are_handed_out_without_a_copy_and_read_only(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", make_features([10, 10]))
    first, second = FeatureReader(store).read([0, 1])
    assert np.shares_memory(first, first.base)
    assert first.base is second.base
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1


def test_prefetched_blocks_are_read_once(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", make_features([30] * 20))
    reader = FeatureReader(store)
    reader.prefetch(range(20))
    reader.read(range(20))
    reader.read(range(20))
    used = sum(len(file.checksums) for shard in range(store.num_shards) for file in store.commit(shard).arrays.values())
    assert reader.bytes_read == used * store.header.chunk_rows * 8 * 2


def test_a_block_that_leaves_the_cache_still_reaches_its_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = sealed(tmp_path / "store", make_features([60] * 3))
    commits = {shard: store.commit(shard) for shard in range(3)}
    blocks = BlockCache(store.layout, store.header, commits, cache_bytes=1)
    gate, read = threading.Event(), BlockCache._read

    def read_later(self: BlockCache, block: int) -> Rows:
        gate.wait(10)
        return read(self, block)

    monkeypatch.setattr(BlockCache, "_read", read_later)
    waiting = [blocks.fetch([block])[block] for block in range(3)]
    gate.set()
    assert [len(future.result(10).features) for future in waiting] == [64] * 3


def test_the_least_recently_used_block_leaves_first(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", make_features([60] * 3))
    block_bytes = store.header.block_rows * store.header.bytes_per_row
    reader = FeatureReader(store, cache_bytes=2 * block_bytes)
    for position in (0, 1, 0, 2, 0):
        reader.read([position])
    assert reader.bytes_read == 3 * block_bytes


def test_a_small_cache_still_reads_everything(tmp_path: Path) -> None:
    features = make_features([30] * 20)
    reader = FeatureReader(sealed(tmp_path / "store", features), cache_bytes=1)
    for _ in range(2):
        for utterance_id, frames in zip(reader.index["utterance_id"].to_pylist(), reader.read(range(20)), strict=True):
            np.testing.assert_array_equal(frames, features[utterance_id].astype(np.float16))


def test_plan_of_another_shard_size_is_refused(tmp_path: Path) -> None:
    plan = make_plan(make_table(make_features([60, 60])), rows_per_shard=128)
    with pytest.raises(ValueError, match="beyond row 64"):
        FeatureStore.create(tmp_path / "store", plan=plan, dim=8, rows_per_shard=64, fingerprint={})


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_a_quantised_store_needs_its_calibration_and_float16_takes_none(tmp_path: Path, encoding: str) -> None:
    features = make_features([10])
    with pytest.raises(ValueError, match="needs a calibration"):
        create(tmp_path / "a", features, encoding=encoding, calibration=None)
    with pytest.raises(ValueError, match="takes no calibration"):
        create(tmp_path / "b", features, calibration=calibrate(features, 8))


def test_extra_columns_travel_with_the_plan(tmp_path: Path) -> None:
    table = make_table(make_features([10, 20])).append_column("text", pa.array(["one", "two"]))
    plan = make_plan(table, rows_per_shard=64)
    store = FeatureStore.create(tmp_path / "store", plan=plan, dim=8, rows_per_shard=64, fingerprint={})
    assert store.plan(0)["text"].to_pylist() == ["one", "two"]
