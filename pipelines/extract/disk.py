"""Whether the disk takes another shard: beside those begun here and elsewhere, and the margin that stays free.

Where there is none, extraction waits (`extract.disk_patience_s`) for somebody to make room, and goes on by itself.
"""

import errno
import logging
import shutil
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import constants

from cache import FeatureStore
from cache.claims import is_free
from cache.errors import DiskFullError
from pipelines.recipes import Recipe
from pipelines.retry import pause

POLL_S = 60.0  # between looks at a disk that has no room

_log = logging.getLogger("tinyaudio")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_disk_full(error: BaseException) -> bool:
    """Say whether a write failed for want of space, quota or file size."""
    return isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in _FULL)


def wait_for_room(why: str, left_s: float) -> bool:
    """Say that somebody has to make room, and wait a while; whether this process is giving up."""
    _log.warning("%s; waiting for room, for up to %.1f h more", why, left_s / 3600)
    return pause(min(POLL_S, left_s))


class DiskRoom:
    """The disk under one store, and under the hub client's cache if whole files are fetched into it."""

    def __init__(self, recipe: Recipe, store: FeatureStore) -> None:
        self._store, self._margin = store, int(recipe.extract.disk_margin_gb * 1e9)
        self._fetches_files = recipe.corpus.name is not None and recipe.corpus.fetch == "files"

    def lack(self, mine: Collection[int]) -> str:
        """Say what is missing for one more shard; nothing if there is room.

        Args:
            mine: shards that this process has begun; what others have begun is seen from their claims.
        """
        others = self._num_others(mine)
        needed = self._store.rows_per_shard * self._store.header.bytes_per_row * (1 + len(mine) + others)
        places = [(self._store.path, needed)]
        if self._fetches_files:
            cache = Path(constants.HF_HUB_CACHE)
            places.append((next(path for path in (cache, *cache.parents) if path.exists()), 0))
        for place, need in places:
            free = shutil.disk_usage(place).free
            if free < need + self._margin:
                begun = f", with {others} that others have begun," if others else ""
                return (
                    f"{free / 1e9:.2f} GB free at {str(place)!r}; the next shards{begun} need {need / 1e9:.2f} GB and "
                    f"the recipe keeps {self._margin / 1e9:g} GB clear (extract.disk_margin_gb)"
                )
        return ""

    def _num_others(self, mine: Collection[int]) -> int:
        claims = self._store.layout.claim(0).parent.glob("[0-9]*")
        theirs = [path for path in claims if path.name.isdigit() and int(path.name) not in mine]
        return sum(not is_free(path) for path in theirs)
