"""Which extraction a store holds: another one is refused, a damaged header or calibration is repaired."""

import json
from pathlib import Path
from typing import Literal

import pytest
from cache_stores import calibrate, create, flip, make_again, make_features, sealed

from cache import CacheError, FeatureReader, FeatureStore, store_verify
from cache.errors import CorruptShardError, StoreMismatchError, StoreNotFoundError

FEATURES = make_features([30] * 8)


def test_another_extraction_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    sealed(tmp_path / "store", FEATURES)
    with pytest.raises(StoreMismatchError, match=r"fingerprint.encoder.layer: the store has 3, asked for 4") as error:
        create(tmp_path / "store", FEATURES, fingerprint={"encoder": {"id": "tiny", "layer": 4}})
    assert set(error.value.differences) == {"fingerprint.encoder.layer"}
    with pytest.raises(StoreMismatchError, match="rows_per_shard"):
        create(tmp_path / "store", FEATURES, rows_per_shard=128)
    with pytest.raises(StoreMismatchError, match="plan_id"):
        create(tmp_path / "store", make_features([29] * 8))
    with pytest.raises(StoreMismatchError, match="encoding: the store has 'float16', asked for 'int8'"):
        create(tmp_path / "store", FEATURES, encoding="int8")


def test_another_calibration_is_another_extraction(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES, encoding="int8")
    other = calibrate(make_features([30] * 8, seed=1), 8)
    with pytest.raises(StoreMismatchError, match="calibration_id"):
        create(tmp_path / "store", FEATURES, encoding="int8", calibration=other)
    assert store.fingerprint["store"]["calibration_id"] == store.calibration.id


def change_header(store: FeatureStore, **changes: object) -> None:
    path = store.path / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["feature_store"].update(changes)
    path.write_text(json.dumps(document))


def test_a_damaged_calibration_is_named_and_repaired(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES, encoding="int8")
    other = calibrate(make_features([30] * 8, seed=1), 8)
    for text in (other.to_base64(), "AAAA", "not base64", None):
        change_header(store, calibration=text)
        with pytest.raises(CorruptShardError, match=r"calibration in zarr.json does not match .*tinyaudio extract"):
            FeatureStore.open(store.path)
        assert make_again(store, FEATURES) == []
        assert FeatureStore.open(store.path).calibration.id == store.header.calibration_id
        assert store_verify(FeatureStore.open(store.path), deep=True) == []


def test_a_calibration_array_beside_the_header_is_ignored(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES, encoding="int8")  # stores had one once
    (store.path / "calibration").mkdir()
    (store.path / "calibration" / "c.0.0").write_bytes(b"anything")
    assert store_verify(FeatureStore.open(store.path), deep=True) == []
    assert make_again(store, FEATURES) == []


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_a_flipped_bit_in_the_header_is_repaired_without_losing_a_shard(tmp_path: Path, encoding: str) -> None:
    store = sealed(tmp_path / "store", FEATURES, encoding=encoding)
    path = store.path / "zarr.json"
    before = path.read_bytes()
    for byte in range(0, len(before), 29):
        flip(path, byte)
        assert make_again(store, FEATURES) == []
        assert json.loads(path.read_bytes()) == json.loads(before)
    assert store_verify(FeatureStore.open(store.path), deep=True) == []


def test_a_headerless_store_of_another_extraction_is_not_taken_over(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    (store.path / "zarr.json").unlink()
    with pytest.raises(CacheError, match="another store"):
        create(store.path, FEATURES, fingerprint={"encoder": "other"})
    assert len(store.committed_shards()) == store.num_shards


@pytest.mark.parametrize("what", ["missing", "file", "folder"])
def test_a_path_without_a_store_says_what_to_do(tmp_path: Path, what: str) -> None:
    path = tmp_path / "store"
    if what == "file":
        path.write_text("not a store")
        with pytest.raises(StoreNotFoundError, match="is a file, not a feature store"):
            create(path, FEATURES)
    if what == "folder":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
        with pytest.raises(StoreNotFoundError, match="something else"):
            create(path, FEATURES)
    with pytest.raises(StoreNotFoundError, match="tinyaudio extract --store"):
        FeatureStore.open(path)


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    change_header(store, format=2)
    with pytest.raises(StoreMismatchError, match="format: the store has 2, asked for 1"):
        FeatureStore.open(store.path)


def test_a_changed_fingerprint_is_noticed_on_opening(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    text = (store.path / "zarr.json").read_text()
    (store.path / "zarr.json").write_text(text.replace('"tiny"', '"huge"'))
    with pytest.raises(CorruptShardError, match="does not match its own id"):
        FeatureStore.open(store.path)


def test_an_encoding_of_a_later_version_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = sealed(tmp_path / "store", FEATURES, encoding="int4")
    monkeypatch.setattr("cache.layout.Encoding", Literal["float16", "int8"])
    with pytest.raises(StoreMismatchError, match="encoding: the store has 'int4', asked for 'one of float16, int8'"):
        FeatureStore.open(store.path)


def test_an_int4_store_is_half_an_int8_store_and_is_not_resumed_as_one(tmp_path: Path) -> None:
    features = make_features([64] * 4, dim=1024)
    sizes = {}
    for encoding in ("float16", "int8", "int4"):
        store = sealed(tmp_path / encoding, features, dim=1024, encoding=encoding)
        sizes[encoding] = sum(
            commit.arrays[name].size_bytes for commit in FeatureReader(store).commits.values() for name in commit.arrays
        )
    num_values = 4 * 64 * 1024
    assert sizes["int4"] / num_values <= 0.52
    assert sizes["int8"] / num_values > 1
    calibration = FeatureStore.open(tmp_path / "int4").calibration
    with pytest.raises(StoreMismatchError, match="encoding: the store has 'int4', asked for 'int8'"):
        create(tmp_path / "int4", features, dim=1024, encoding="int8", calibration=calibration)
