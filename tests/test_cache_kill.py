"""Writers killed at any moment leave no wrong shard."""

from pathlib import Path

import pytest
from kill_store_writers import run


def check(kills: int, folder: Path) -> None:
    seen = run(kills, seed=kills, folder=folder)
    assert seen.pop("kills") == kills
    assert seen.pop("stores") >= 1
    redone = seen.pop("redone_per_kill")
    assert redone.keys() <= {"0", "1", "2"}  # the one being filled and the one being committed
    assert any(shards != "0" for shards in redone), "no writer died at work"
    assert not any(seen.values()), seen


def test_twenty_killed_writers_leave_no_wrong_shard(tmp_path: Path) -> None:
    check(20, tmp_path)


@pytest.mark.slow
def test_five_hundred_killed_writers_leave_no_wrong_shard(tmp_path: Path) -> None:
    check(500, tmp_path)
