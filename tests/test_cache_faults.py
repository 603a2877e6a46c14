"""Every planted fault is found, named, and repaired by making exactly the damaged shards again."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from cache_stores import create, fill, flip, make_again, make_features, sealed
from typer.testing import CliRunner

from cache import FeatureReader, FeatureStore, find_faults, store_repair, store_verify
from cache.errors import CorruptShardError, StoreNotFoundError
from cache.verify import Fault
from tinyaudio.cli.app import app

FEATURES = make_features([30] * 8)


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save time: what these tests plant does not depend on flushing."""
    monkeypatch.setattr("os.fsync", lambda fd: None)


@pytest.fixture(params=["float16", "int8", "int4"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureStore:
    """A sealed store of four shards with two utterances each."""
    return sealed(tmp_path / "store", FEATURES, encoding=request.param)


def swap(path: Path, other: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


def content_of(store: FeatureStore) -> dict[str, bytes]:
    """Every file of the shards of a store, without the commit records, which contain times and names."""
    return {
        path.relative_to(store.path).as_posix(): path.read_bytes()
        for path in sorted(store.path.rglob("*"))
        if path.is_file() and path.parent.name in {"features", "scales", "index", "quarantine"}
    }


Faults = list[tuple[str, Callable[[FeatureStore], object], set[int], set[str]]]
SHARD_FAULTS: Faults = [
    ("flipped bit", lambda s: flip(s.layout.array("features", 2), 5), {2}, {"content"}),
    (
        "flipped checksum",
        lambda s: flip(s.layout.array("features", 2), s.header.chunk_bytes("features", 64) + 1),
        {2},
        {"content"},
    ),
    ("flipped shard index", lambda s: flip(s.layout.array("features", 2), -10), {2}, {"content"}),
    ("truncated", lambda s: s.layout.array("features", 2).open("r+b").truncate(100), {2}, {"size"}),
    ("zero length", lambda s: s.layout.array("features", 2).write_bytes(b""), {2}, {"size"}),
    ("deleted", lambda s: s.layout.array("features", 2).unlink(), {2}, {"missing"}),
    (
        "two shards swapped",
        lambda s: swap(s.layout.array("features", 2), s.layout.array("features", 3)),
        {2, 3},
        {"content"},
    ),
    ("index deleted", lambda s: s.layout.index(2).unlink(), {2}, {"missing"}),
    ("index flipped", lambda s: flip(s.layout.index(2), 30), {2}, {"content"}),
    ("two indexes swapped", lambda s: swap(s.layout.index(2), s.layout.index(3)), {2, 3}, {"content", "size"}),
    ("quarantine replaced", lambda s: s.layout.quarantine(2).write_text("{}\n"), {2}, {"size"}),
]


RECORD_FAULTS: Faults = [
    ("record flipped", lambda s: flip(s.layout.commit(2), 40), {2}, {"record", "seal"}),
    ("record deleted", lambda s: s.layout.commit(2).unlink(), {2}, {"missing"}),
    ("two records swapped", lambda s: swap(s.layout.commit(2), s.layout.commit(3)), {2, 3}, {"record", "seal"}),
    ("all records deleted", lambda s: shutil.rmtree(s.path / "commits"), {0, 1, 2, 3}, {"missing"}),
]


@pytest.mark.parametrize(
    ("plant", "shards", "kinds"),
    [fault[1:] for fault in (*SHARD_FAULTS, *RECORD_FAULTS)],
    ids=[fault[0] for fault in (*SHARD_FAULTS, *RECORD_FAULTS)],
)
def test_a_fault_is_found_named_and_repaired(
    store: FeatureStore, plant: Callable[[FeatureStore], object], shards: set[int], kinds: set[str]
) -> None:
    before = content_of(store)
    plant(store)
    faults = store_verify(store, deep=True)
    assert {fault.shard for fault in faults} == shards
    assert {fault.kind for fault in faults} <= kinds
    assert all("tinyaudio extract" in fault.message for fault in faults)
    assert make_again(store, FEATURES) == sorted(shards)
    assert store_verify(store, deep=True) == []
    assert content_of(store) == before


@pytest.mark.parametrize(
    ("plant", "shards"),
    [fault[1:3] for fault in (*SHARD_FAULTS, *RECORD_FAULTS)],
    ids=[fault[0] for fault in (*SHARD_FAULTS, *RECORD_FAULTS)],
)
def test_the_command_names_the_damaged_shards_and_the_repairing_command(
    tmp_path: Path, plant: Callable[[FeatureStore], object], shards: set[int]
) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    (store.path / "recipe.toml").write_text("")
    plant(store)
    result = CliRunner().invoke(app, ["store", "verify", str(store.path), "--deep"])
    assert result.exit_code == 1
    assert {int(number) for number in re.findall(r"\(shard (\d+)\)", result.stdout)} == shards
    command = f"`tinyaudio extract --recipe {store.path}/recipe.toml --store {store.path}`"
    assert all(command in line for line in result.stdout.splitlines())


def test_a_damaged_shard_without_a_record_is_made_again(store: FeatureStore) -> None:
    flip(store.layout.array("features", 2), 5)
    store.layout.commit(2).unlink()
    assert make_again(store, FEATURES) == [2]
    assert store_verify(store, deep=True) == []


@pytest.mark.parametrize(
    ("plant", "shards"),
    [
        (plant, shards)
        for name, plant, shards, _ in SHARD_FAULTS
        if name in {"truncated", "zero length", "deleted", "two shards swapped", "index deleted"}
    ],
)
def test_the_quick_check_finds_what_needs_no_full_read(
    store: FeatureStore, plant: Callable[[FeatureStore], object], shards: set[int]
) -> None:
    plant(store)
    assert {fault.shard for fault in store_verify(store)} == shards


@pytest.mark.parametrize("byte", [0, 100, -1])
def test_a_reader_never_hands_out_a_damaged_chunk(store: FeatureStore, byte: int) -> None:
    flip(store.layout.array("features", 2), byte % store.header.chunk_bytes("features"))
    reader = FeatureReader(store)
    damaged = store.plan(2)["utterance_id"].to_pylist()
    for position, utterance_id in enumerate(reader.index["utterance_id"].to_pylist()):
        if utterance_id in damaged:
            with pytest.raises(CorruptShardError, match="store verify"):
                reader.read([position])
            with pytest.raises(CorruptShardError, match="store verify"):
                reader.get(utterance_id)
        else:
            reader.read([position])


@pytest.mark.parametrize("name", ["truncated", "zero length", "deleted"])
def test_a_reader_refuses_a_cut_store_on_opening(store: FeatureStore, name: str) -> None:
    next(plant for other, plant, _, _ in SHARD_FAULTS if other == name)(store)
    with pytest.raises(CorruptShardError, match=r"shard 2.*tinyaudio extract"):
        FeatureReader(store)


def test_a_reader_refuses_swapped_shards(store: FeatureStore) -> None:
    swap(store.layout.array("features", 2), store.layout.array("features", 3))
    reader = FeatureReader(store)
    for shard in (2, 3):
        with pytest.raises(CorruptShardError, match="not the one that was committed"):
            reader.get(store.plan(shard)["utterance_id"][0].as_py())


def test_what_the_deep_check_found_is_repaired_without_reading_everything(store: FeatureStore) -> None:
    flip(store.layout.array("features", 2), 5)
    store_verify(store, deep=True)
    assert {fault.shard for fault in store_repair(store, deep=False)} == {2}
    assert store.pending_shards() == [2]


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureStore:
    """A store of several chunks a shard, treated as too large to be read completely on every repair."""
    monkeypatch.setattr("cache.verify.SMALL_BYTES", 0)
    return sealed(tmp_path / "store", make_features([500] * 8), rows_per_shard=2048)


def in_chunk(store: FeatureStore, chunk: int) -> int:
    return chunk * (store.header.chunk_rows * store.header.bytes_per_row + 4) + 5


def test_damage_found_by_a_reader_is_repaired_by_extract_alone(large: FeatureStore) -> None:
    flip(large.layout.array("features", 1), in_chunk(large, 1))
    assert store_verify(large) == []  # neither the first nor the last chunk
    assert store_repair(large) == []
    with pytest.raises(CorruptShardError, match=r"chunk 1 of features.*store verify --deep"):
        FeatureReader(large).read(range(8))
    assert {(fault.shard, fault.kind) for fault in store_verify(large)} == {(1, "content")}
    assert {fault.shard for fault in store_repair(large)} == {1}
    assert large.pending_shards() == [1]
    assert not list(large.layout.damaged.iterdir())


def test_a_damaged_store_that_may_only_be_read_is_still_named(
    large: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(large.layout.array("features", 1), in_chunk(large, 1))

    def read_only(self: Path, *args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(CorruptShardError, match="chunk 1 of features"):
        FeatureReader(large).read(range(8))
    assert [fault.kind for fault in store_verify(large, deep=True)] == ["content"]


def fail_to_read(monkeypatch: pytest.MonkeyPatch, path: Path, code: int) -> None:
    """Make every read of a file's chunks fail."""
    preadv, stat = os.preadv, path.stat()

    def read(fd: int, buffers: list[memoryview], offset: int) -> int:
        if os.fstat(fd).st_ino == stat.st_ino:
            raise OSError(code, os.strerror(code))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr("os.preadv", read)


def test_a_bad_sector_is_a_fault_like_any_other(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store.layout.array("features", 2)
    fail_to_read(monkeypatch, path, errno.EIO)
    (fault,) = store_verify(store, deep=True)
    assert (fault.kind, fault.shard, fault.path) == ("unreadable", 2, "features/c.2.0")
    assert "Input/output error" in fault.message
    with pytest.raises(CorruptShardError, match=r"features/c\.2\.0 cannot be read \(Input/output error\)"):
        FeatureReader(store).read(range(8))
    store_repair(store)
    monkeypatch.undo()
    assert make_again(store, FEATURES) == [2]
    assert store_verify(store, deep=True) == []


def test_a_shard_that_is_only_out_of_reach_is_not_made_again(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_read(monkeypatch, store.layout.array("features", 2), errno.EACCES)
    (fault,) = store_verify(store, deep=True)
    assert (fault.kind, fault.shard) == ("out_of_reach", 2)
    assert "Make it readable" in fault.message
    assert store_repair(store) == [fault]
    assert store.pending_shards() == []
    assert store.is_sealed


def test_the_quick_check_of_a_sound_store_reads_no_features(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.verify.read_chunks", None)
    assert store_verify(store) == []


def test_an_interrupted_check_notes_what_it_found(store: FeatureStore) -> None:
    flip(store.layout.array("features", 1), 5)
    checks = find_faults(store, deep=True)
    assert next(checks).shard == 1
    checks.close()
    assert {fault.shard for fault in store_repair(store, deep=False)} == {1}


def test_repairing_a_sound_store_changes_nothing(store: FeatureStore) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file()}
    assert store_repair(store) == []
    assert make_again(store, FEATURES) == []
    after = {path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file()}
    assert {path.name for path in before if before[path] != after.get(path)} <= {"lock"}


def test_a_shard_of_another_extraction_is_foreign(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    other = sealed(tmp_path / "other", FEATURES, fingerprint={"encoder": {"id": "other"}})
    shutil.copy(other.layout.commit(2), store.layout.commit(2))
    assert {(fault.shard, fault.kind) for fault in store_verify(store)} == {(2, "record"), (2, "seal")}
    assert make_again(store, FEATURES) == [2]
    assert store_verify(store, deep=True) == []


def test_a_foreign_shard_of_an_unsealed_store_is_made_again(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    fill(store, FEATURES)
    other = sealed(tmp_path / "other", FEATURES, fingerprint={"encoder": {"id": "other"}})
    shutil.copy(other.layout.commit(2), store.layout.commit(2))
    (fault,) = store_verify(store)
    assert (fault.shard, fault.kind) == (2, "record")
    assert "fingerprint_id" in fault.message
    assert make_again(store, FEATURES) == [2]
    assert store_verify(store, deep=True) == []


def test_a_shard_of_another_plan_is_stale(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    other = sealed(tmp_path / "other", make_features([31] * 8))
    shutil.copy(other.layout.commit(2), store.layout.commit(2))
    assert {(fault.shard, fault.kind) for fault in store_verify(store)} >= {(2, "record")}
    shutil.copy(other.layout.plan, store.layout.plan)
    assert (None, "plan") in {(fault.shard, fault.kind) for fault in store_verify(store)}
    assert make_again(store, FEATURES) == [2]
    assert store_verify(store, deep=True) == []


@pytest.mark.parametrize(
    "name",
    [
        "zarr.json",
        "features/zarr.json",
        "plan.parquet",
        "quarantine/plan.jsonl",
        "SEALED.json",
        "index.parquet",
        "commits.jsonl",
    ],
)
@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_damaged_file_of_no_shard_is_repaired_without_losing_a_shard(tmp_path: Path, name: str, how: str) -> None:
    store = sealed(tmp_path / "store", FEATURES, encoding="int8")
    path = store.path / name
    path.unlink() if how == "deleted" else path.write_bytes(b'{"nothing": 1}\n')
    if name == "zarr.json":
        with pytest.raises(StoreNotFoundError, match=r"tinyaudio|--store"):
            FeatureStore.open(store.path)
    elif (name, how) != ("SEALED.json", "deleted"):  # that store is merely not sealed
        faults = store_verify(FeatureStore.open(store.path))
        assert {fault.shard for fault in faults} == {None}
        if path.parent == store.path and name != "plan.parquet":
            with pytest.raises(CorruptShardError, match="tinyaudio extract"):
                assert len(FeatureReader(store.path).index)
    assert make_again(store, FEATURES) == []
    assert store_verify(FeatureStore.open(store.path), deep=True) == []


def test_faults_become_json(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    store.layout.array("features", 2).unlink()
    (fault,) = store_verify(store)
    assert Fault(**json.loads(json.dumps(asdict(fault)))) == fault


def test_a_record_altered_under_the_seal_is_not_believed(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    path = store.layout.sealed_commits
    before = path.read_bytes()
    altered = before.replace(b'"num_clamped":0', b'"num_clamped":1', 1)  # sound JSON, of the same length
    assert altered != before
    path.write_bytes(altered)
    with pytest.raises(CorruptShardError, match="digest"):
        FeatureReader(store.path)
