"""Which extraction a store is of: another one is refused, and its header and calibration are told from damage.

Run: pytest tests/test_cache_identity.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_stores import calibrate, create, flip, make_again, make_features, sealed

from cache import CacheError, FeatureStore, store_diff, store_repair, store_verify
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


def test_a_lost_calibration_comes_back_from_its_copy_in_the_header(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES, encoding="int8")
    before = store.layout.calibration.read_bytes()
    flip(store.layout.calibration, 3)
    damaged = FeatureStore.open(store.path)
    assert damaged.calibration.id == store.header.calibration_id
    (fault,) = store_verify(damaged)
    assert (fault.kind, fault.path) == ("calibration", "calibration/c.0.0")
    assert "the copy in zarr.json is whole" in fault.message
    store_repair(damaged)
    assert store.layout.calibration.read_bytes() == before
    assert store_verify(FeatureStore.open(store.path)) == []


def change_header(store: FeatureStore, change: Callable[[dict[str, object]], object]) -> FeatureStore:
    path = store.path / "zarr.json"
    document = json.loads(path.read_text())
    change(document["attributes"]["feature_store"])
    path.write_text(json.dumps(document))
    return FeatureStore.open(store.path)


def test_a_damaged_copy_of_the_calibration_is_named_and_mended(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES, encoding="int8")
    other = calibrate(make_features([30] * 8, seed=1), 8)
    damaged = change_header(store, lambda header: header.update(calibration=other.to_base64()))
    assert [(fault.kind, fault.path) for fault in store_verify(damaged)] == [("calibration", "zarr.json")]
    assert damaged.calibration.id == store.header.calibration_id
    assert make_again(damaged, FEATURES) == []
    assert store_verify(FeatureStore.open(store.path)) == []


def test_a_store_from_before_the_copy_is_sound(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES, encoding="int8")
    older = change_header(store, lambda header: header.pop("calibration"))
    assert store_verify(older, deep=True) == []
    assert store_diff(store.path, older.path) == {}
    older.layout.calibration.unlink()
    with pytest.raises(CorruptShardError, match="neither"):
        FeatureStore.open(store.path).calibration  # noqa: B018


def test_training_on_another_fingerprint_is_refused(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    store.require_fingerprint(store.fingerprint)
    with pytest.raises(StoreMismatchError, match=r"encoder\.id: the store has 'tiny', asked for 'huge'"):
        store.require_fingerprint(store.fingerprint | {"encoder": {"id": "huge", "layer": 3}})


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
    document = json.loads((store.path / "zarr.json").read_text())
    document["attributes"]["feature_store"]["format"] = 2
    (store.path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreMismatchError, match="format: the store has 2, asked for 1"):
        FeatureStore.open(store.path)


def test_a_changed_fingerprint_is_noticed_on_opening(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    text = (store.path / "zarr.json").read_text()
    (store.path / "zarr.json").write_text(text.replace('"tiny"', '"huge"'))
    with pytest.raises(CorruptShardError, match="does not match its own id"):
        FeatureStore.open(store.path)
