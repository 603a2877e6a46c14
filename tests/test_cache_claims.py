"""Several writers: claims, dead processes and what they leave."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cache_stores import create, fill, make_features, sealed

from cache import FeatureReader, FeatureStore, ShardWriter, store_verify
from cache.claims import Claim, read_owner, sweep
from cache.errors import (
    IncompleteShardError,
    LostClaimError,
    UnplannedUtteranceError,
    UnsealableStoreError,
)
from cache.files import place, temporary_of
from cache.owners import LEASE_S, Owner

FEATURES = make_features([30] * 8)


def write(store: FeatureStore, shard: int) -> None:
    fill(store, FEATURES, [shard])


def append(writer: ShardWriter, utterance_id: str) -> None:
    writer.append(utterance_id, FEATURES[utterance_id], num_samples=1, duration_s=1.0, transcript="")


def a_dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def claim_as(store: FeatureStore, shard: int, **changes: object) -> Path:
    """Leave the claim of another writer behind."""
    mine = Owner.me()
    path = store.layout.claim(shard)
    path.write_text(str(dataclasses.replace(mine, **{"token": "0123456789abcdef"} | changes)))  # type: ignore[arg-type]
    return path


def test_a_claimed_shard_is_not_given_to_another_writer(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    claim = Claim.take(store.layout, 0)
    assert FeatureStore.open(store.path).write_shard(0) is None
    claim.release()
    assert store.write_shard(0) is not None


def test_a_committed_shard_is_not_written_again(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    write(store, 0)
    assert store.write_shard(0) is None


@pytest.mark.parametrize(
    ("changes", "silent_s", "is_taken_over"),
    [
        ({}, 2 * LEASE_S, False),  # this process is running, however long it is silent
        ({"pid": "dead"}, 0, True),
        ({"started": 1}, 0, True),  # its pid was reused, for example after a restart of the container
        ({"boot": "00000000"}, 0, False),  # a reboot, or another machine with the same name
        ({"boot": "00000000"}, 2 * LEASE_S, True),
        ({"host": "elsewhere"}, 0, False),
        ({"host": "elsewhere"}, LEASE_S / 2, False),
        ({"host": "elsewhere"}, 2 * LEASE_S, True),
    ],
)
def test_a_claim_expires_with_its_writer(
    tmp_path: Path, changes: dict[str, object], silent_s: float, is_taken_over: bool
) -> None:
    store = create(tmp_path / "store", FEATURES)
    if changes.get("pid") == "dead":
        changes = {"pid": a_dead_pid()}
    path = claim_as(store, 0, **changes)
    then = path.stat().st_mtime - silent_s
    os.utime(path, (then, then))
    assert (store.write_shard(0) is not None) == is_taken_over


def test_a_living_claim_is_touched_regularly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.claims.LEASE_S", 0.05)
    store = create(tmp_path / "store", FEATURES)
    claim = Claim.take(store.layout, 0)
    os.utime(claim.path, (0, 0))
    beat = threading.Event()
    for _ in range(200):
        if claim.path.stat().st_mtime > 1:
            break
        beat.wait(0.01)
    assert claim.path.stat().st_mtime > 1
    claim.release()
    assert not claim.path.exists()


def test_a_late_writer_drops_its_copy(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    late = store.write_shard(0)
    store.layout.claim(0).unlink()  # as if its lease had expired
    write(FeatureStore.open(store.path), 0)
    before = store.layout.array("features", 0).stat()
    for utterance_id in store.plan(0)["utterance_id"].to_pylist():
        append(late, utterance_id)
    with pytest.raises(LostClaimError, match="its files are kept"):
        late.__exit__(None, None, None)
    assert store.layout.array("features", 0).stat().st_ino == before.st_ino
    assert store_verify(store, deep=True) == []


def test_a_late_writer_does_not_release_the_claim_of_its_successor(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    late = Claim.take(store.layout, 0)
    path = claim_as(store, 0)
    late.release()
    assert read_owner(path).token == "0123456789abcdef"


def test_an_exception_leaves_nothing_but_a_free_shard(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    before = {path for path in store.path.rglob("*") if path.name != "lock"}
    with contextlib.suppress(KeyboardInterrupt), store.write_shard(0) as writer:
        append(writer, "u0")
        raise KeyboardInterrupt
    assert {path for path in store.path.rglob("*") if path.name != "lock"} == before
    write(store, 0)


def test_a_shard_with_a_skipped_utterance_is_not_committed(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    with (
        pytest.raises(IncompleteShardError, match=r"1 of 2 planned utterances neither.*'u1'"),
        store.write_shard(0) as writer,
    ):
        append(writer, "u0")
    assert store.committed_shards() == []
    with store.write_shard(0) as writer:
        append(writer, "u0")
        writer.quarantine("u1", "undecodable", "no sync word")
    assert store.commit(0).num_quarantined == 1


def test_an_unplanned_utterance_is_refused(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    with (
        pytest.raises(UnplannedUtteranceError, match="'u7' is not planned for shard 0"),
        store.write_shard(0) as writer,
    ):
        append(writer, "u7")


def test_an_unfinished_store_cannot_be_sealed(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    write(store, 2)
    with pytest.raises(UnsealableStoreError, match=r"3 of 4 shards.*the first being 0"):
        store.seal()


def test_sealing_again_changes_nothing(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    before = store.layout.sealed.read_bytes()
    assert store.seal() in before.decode()
    assert store.layout.sealed.read_bytes() == before


def test_a_sweep_removes_only_what_dead_writers_left(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    write(store, 0)
    alive, dead = Owner.me(), dataclasses.replace(Owner.me(), pid=a_dead_pid(), token="0" * 16)
    claimed = Claim.take(store.layout, 1)
    kept = [
        store.layout.array("features", 0),
        store.layout.array("features", 1),
        temporary_of(store.layout.array("features", 1), alive),
        store.path / "notes.txt",
    ]
    gone = [
        store.layout.array("features", 2),
        store.layout.index(3),
        temporary_of(store.layout.array("features", 3), dead),
    ]
    unfinished_store = temporary_of(store.path, dead)
    unfinished_store.mkdir()
    for path in [*kept[1:], *gone]:
        path.write_bytes(b"x")
    assert set(sweep(store.layout, store.header)) == {*gone, unfinished_store}
    assert all(path.exists() for path in kept)
    claimed.release()


def test_a_sweep_spares_a_shard_that_is_committed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create(tmp_path / "store", FEATURES)
    orphan = store.layout.array("features", 2)
    orphan.write_bytes(b"x")

    def commit_meanwhile(claim: Path) -> bool:
        store.layout.commit(2).write_bytes(b"a record")
        return True

    monkeypatch.setattr("cache.claims.is_free", commit_meanwhile)
    assert sweep(store.layout, store.header) == []
    assert orphan.exists()


def test_a_sweep_spares_the_files_of_a_remote_writer_with_a_living_claim(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    claim = claim_as(store, 1, host="elsewhere")
    unfinished = temporary_of(store.layout.array("features", 1), read_owner(claim))
    unfinished.write_bytes(b"flushing for longer than a lease")
    os.utime(unfinished, (0, 0))
    assert sweep(store.layout, store.header) == []
    os.utime(claim, (0, 0))
    assert set(sweep(store.layout, store.header)) == {claim, unfinished}


def test_files_left_by_a_dead_writer_do_not_stop_the_next_one(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    store.layout.array("features", 0).write_bytes(b"half a shard")
    write(store, 0)
    assert store_verify(store, deep=True) == []


def test_a_late_writer_replaces_nothing_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match=r"gives no locks \(No locks available\)"):
        store = create(tmp_path / "store", FEATURES)
    late = store.write_shard(0)
    for utterance_id in late.plan["utterance_id"].to_pylist():
        append(late, utterance_id)
    store.layout.claim(0).unlink()
    write(FeatureStore.open(store.path), 0)
    monkeypatch.setattr("cache.writer._is_uncontested", lambda *_: True)  # it was checked just before
    before = store.layout.array("features", 0).stat().st_ino
    with pytest.raises(LostClaimError, match="its files are kept"):
        late.__exit__(None, None, None)
    assert store.layout.array("features", 0).stat().st_ino == before
    assert store_verify(store, deep=True) == []


def test_a_shard_is_on_the_disk_before_its_record_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = create(tmp_path / "store", FEATURES, encoding="int8")
    steps: list[tuple[str, str]] = []

    def spy(name: str, function: Callable[..., object], label: Callable[..., str]) -> None:
        def record(*args: object) -> object:
            steps.append((name, label(*args)))
            return function(*args)

        monkeypatch.setattr(os, name, record)

    def file_of(fd: int, *_: object) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink().relative_to(store.path)).lstrip(".").replace("/.", "/")

    def of_temporary(name: str) -> str:
        return name.partition("~")[0]

    spy("fsync", os.fsync, lambda fd: of_temporary(file_of(fd)))
    spy("link", os.link, lambda _, target: str(Path(target).relative_to(store.path)))
    write(store, 0)
    steps = [step for step in steps if not step[1].startswith("claims")]
    record = "commits/000000.json"
    ours = ["features/c.0.0", "scales/c.0", "index/000000.parquet", "quarantine/000000.jsonl"]
    for name in [*ours, record]:
        folder = name.partition("/")[0]
        wanted = [("fsync", name), ("link", name), ("fsync", folder)]
        assert [step for step in steps if step in wanted] == wanted
    begun = steps.index(("link", record))
    assert all(steps.index(("fsync", name.partition("/")[0])) < begun for name in ours)


def test_many_threads_share_one_store(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)

    def work() -> None:
        mine = FeatureStore.open(store.path)
        for shard in mine.pending_shards():
            if (writer := mine.write_shard(shard)) is not None:
                with writer:
                    for utterance_id in writer.plan["utterance_id"].to_pylist():
                        append(writer, utterance_id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.seal()
    assert store_verify(store, deep=True) == []
    assert len(FeatureReader(store)) == 8


def test_a_placed_file_is_never_replaced(tmp_path: Path) -> None:
    place(tmp_path / "file", [b"first"])
    with pytest.raises(FileExistsError):
        place(tmp_path / "file", [b"second"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"first"
