"""Exceptions raised by the feature store.

Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations

import errno
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECIPE, REQUEST = "recipe.toml", "request.json"  # left in a store by `tinyaudio extract`
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class CacheError(Exception):
    """Base class of all errors that the feature store raises on purpose."""

    def __str__(self) -> str:  # KeyError would print its repr
        return str(self.args[0]) if self.args else ""


class StoreNotFoundError(CacheError, FileNotFoundError):
    """The path is missing or is not a feature store."""


class StoreMismatchError(CacheError, ValueError):
    """The store at this path holds something other than what was requested.

    Attributes:
        differences: field name -> (value in the store, value requested).
    """

    def __init__(self, path: Path, differences: Mapping[str, tuple[Any, Any]]) -> None:
        self.path = path
        self.differences = dict(differences)
        lines = [
            f"  {name}: the store has {found!r}, asked for {asked!r}"
            for name, (found, asked) in sorted(self.differences.items())
        ]
        super().__init__(
            f"feature store {str(path)!r} does not hold what was asked for; these fields differ:\n"
            + "\n".join(lines)
            + "\nAsk for what the store holds, or extract into a new store with --store."
        )


class PlanError(CacheError, ValueError):
    """The plan cannot be stored as it is."""


class UnplannedUtteranceError(CacheError, KeyError):
    """The shard's plan does not list this utterance."""


class IncompleteShardError(CacheError, RuntimeError):
    """Some planned utterances were neither stored nor quarantined."""


class LostClaimError(CacheError, RuntimeError):
    """Another writer took over the shard; its files are kept."""


class UnsealableStoreError(CacheError, RuntimeError):
    """Some shards are not committed yet."""


class CorruptShardError(CacheError, OSError):
    """The bytes on disk differ from those that were committed.

    Attributes:
        shard: the damaged shard, or None if the damage does not belong to one shard.
        found: what is wrong, without the name of the store.
    """

    def __init__(self, store: Path, shard: int | None, found: str) -> None:
        self.shard, self.found = shard, found
        what = "feature store" if shard is None else f"shard {shard} of feature store"
        super().__init__(
            f"{what} {str(store)!r} is damaged: {found}. Run {command_that_made(store)} again to repair it; "
            f"`tinyaudio store verify --deep {shlex.quote(str(store))}` lists every fault."
        )


class DiskFullError(CacheError, OSError):
    """The disk, the quota or the file size limit is exhausted; nothing of the unfinished file is kept."""

    def __init__(self, found: str) -> None:
        super().__init__(f"{found}. Free some space and run the same command again to resume.")
        self.errno = errno.ENOSPC


def is_disk_full(error: BaseException) -> bool:
    """Check whether a write failed because the disk, the quota or the file size limit is exhausted."""
    return isinstance(error, OSError) and error.errno in DISK_FULL


def command_that_made(store: Path) -> str:
    """Return the command that finishes or repairs a store, as words for a message."""
    if not (store / RECIPE).is_file():
        return "the `tinyaudio extract`, `store merge` or `store export` command that made it"
    words = ["tinyaudio", "extract", "--recipe", str(store / RECIPE), "--store", str(store)]
    try:
        splits = json.loads((store / REQUEST).read_text())["splits"]
        words += ["--split", *splits] if len(splits) == 1 else []
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the recipe's splits
    return f"`{shlex.join(words)}`"
