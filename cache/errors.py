"""Everything the feature store refuses, as one tree.

    CacheError
      StoreNotFoundError      (FileNotFoundError)  no store there, or something else is
      StoreMismatchError      (ValueError)         a store of another fingerprint, plan or shape
      PlanError               (ValueError)         a plan that cannot be stored
      UnplannedUtteranceError (KeyError)           an utterance that the shard's plan does not name
      IncompleteShardError    (RuntimeError)       a shard closed with utterances neither stored nor quarantined
      LostClaimError          (RuntimeError)       another writer finished the shard in the meantime
      UnsealableStoreError    (RuntimeError)       sealing before the last shard is committed
      CorruptShardError       (OSError)            bytes that are not the ones that were committed
      DiskFullError           (OSError)            no space left in the middle of a write

Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class CacheError(Exception):
    """The base of every error that the feature store raises on purpose."""

    def __str__(self) -> str:  # KeyError would print its repr
        return str(self.args[0]) if self.args else ""


class StoreNotFoundError(CacheError, FileNotFoundError):
    """There is no feature store at this path."""


class StoreMismatchError(CacheError, ValueError):
    """The store at this path holds something else than what was asked for.

    Attributes:
        differences: field name -> (value in the store, value asked for).
    """

    def __init__(self, path: Path, differences: Mapping[str, tuple[Any, Any]]) -> None:
        self.path = path
        self.differences = dict(differences)
        lines = [
            f"  {name}: the store has {found!r}, asked for {asked!r}"
            for name, (found, asked) in sorted(self.differences.items())
        ]
        super().__init__(
            "\n".join(
                [
                    f"feature store {str(path)!r} does not hold what was asked for; these fields differ:",
                    *lines,
                    "Ask for what the store holds, or extract into a new store with --store.",
                ]
            )
        )


class PlanError(CacheError, ValueError):
    """The plan cannot be stored as it is."""


class UnplannedUtteranceError(CacheError, KeyError):
    """The shard's plan does not name this utterance."""


class IncompleteShardError(CacheError, RuntimeError):
    """Some planned utterances were neither stored nor quarantined."""


class LostClaimError(CacheError, RuntimeError):
    """Another writer took the shard over; its work stands."""


class UnsealableStoreError(CacheError, RuntimeError):
    """Some shards are not committed yet."""


class CorruptShardError(CacheError, OSError):
    """The bytes on disk are not the bytes that were committed.

    Attributes:
        shard: the damaged shard, or None where the damage is not one shard's.
    """

    def __init__(self, store: Path, shard: int | None, found: str) -> None:
        self.shard = shard
        what = "feature store" if shard is None else f"shard {shard} of feature store"
        super().__init__(
            f"{what} {str(store)!r} is damaged: {found}. Type {command_that_made(store)}, which repairs exactly what "
            f"is damaged; `tinyaudio store verify --deep {shlex.quote(str(store))}` lists every fault."
        )


class DiskFullError(CacheError, OSError):
    """There was no space left for a file; nothing of it was kept."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"no space left while writing {str(path)!r}; the unfinished file was removed and nothing of it was "
            "committed. Free some space and type the same command again: it continues where it stopped."
        )


# ------------------------------------------------------------------------------------------- what to type

RECIPE, REQUEST = "recipe.toml", "request.json"  # left in a store by `tinyaudio extract`
MADE_BY = "made_by.txt"  # left by merge and export: the line that does it again


def command_that_made(store: Path) -> str:
    """Spell the command that finishes or repairs a store, as far as the store tells."""
    if (store / RECIPE).is_file():
        words = ["tinyaudio", "extract", "--recipe", str(store / RECIPE), "--store", str(store), *_split_option(store)]
        return f"`{shlex.join(words)}`"
    try:
        return f"`{(store / MADE_BY).read_text().strip()}`"
    except OSError:
        return "the `tinyaudio extract` command that made it"


def _split_option(store: Path) -> list[str]:
    """Name the split of a store that was asked for one alone."""
    try:
        (split,) = json.loads((store / REQUEST).read_text())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return ["--split", split]
