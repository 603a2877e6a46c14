"""A full disk commits nothing, and the same command resumes once space is freed."""

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cache_stores import create, fill, make_features

from cache import FeatureReader, store_verify
from cache.errors import DiskFullError, is_disk_full

FEATURES = make_features([30] * 8)


def test_a_disk_that_fills_in_the_middle_of_a_shard_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = create(tmp_path / "store", FEATURES)
    fill(store, FEATURES, [0])
    before = {path for path in store.path.rglob("*") if path.name != "lock"}

    def first_bytes_fit(*args: object) -> Iterator[bytes]:
        yield b"first bytes"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("cache.writer.encode_shard", first_bytes_fit)
    with pytest.raises(DiskFullError, match="Free some space and run the same command again") as error:
        fill(store, FEATURES, [1])
    assert is_disk_full(error.value)
    monkeypatch.undo()
    assert {path for path in store.path.rglob("*") if path.name != "lock"} == before
    fill(store, FEATURES)
    store.seal()
    assert store_verify(store, deep=True) == []


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    features = make_features([1000], dim=64)
    store = create(tmp_path / "store", features, dim=64, rows_per_shard=1024)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(DiskFullError):
            fill(store, features)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.pending_shards() == [0]
    fill(store, features)
    assert store_verify(store, deep=True) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of four megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a tmpfs needs root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_full_disk_is_survived_and_continued_when_space_is_back(small_disk: Path) -> None:
    features = make_features([4000] * 4, dim=128)  # a megabyte each
    store = create(small_disk / "store", features, dim=128, rows_per_shard=4096)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(1 << 20))
    with pytest.raises(DiskFullError, match="no space left"):
        fill(store, features)
    done = store.committed_shards()
    assert len(done) in (1, 2)
    assert store_verify(store, deep=True) == []
    assert not list(store.path.rglob("*.tmp"))
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    fill(create(small_disk / "store", features, dim=128, rows_per_shard=4096), features)
    store.seal()
    assert store_verify(store, deep=True) == []
    for utterance_id, frames in features.items():
        np.testing.assert_array_equal(FeatureReader(store).get(utterance_id), frames.astype(np.float16))
