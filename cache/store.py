"""The feature store: ragged frames under string ids, in one tall Zarr array, shard by shard.

    store = FeatureStore.create(path, plan=make_plan(table), dim=1024, encoding="float16", fingerprint={...})
    for shard in store.pending_shards():
        with store.write_shard(shard) as writer: ...
    store.seal()

Invariants: a store holds one extraction; what it is never changes after creation; typing the same again continues.
Knows nothing of speech, models or torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from numpy.typing import NDArray

from cache.claims import sweep
from cache.commits import Commit, committed_shards, read_commit, root_digest
from cache.create import build, compare_fields, describe, mend, require
from cache.errors import (
    CorruptShardError,
    StoreMismatchError,
    StoreNotFoundError,
    UnsealableStoreError,
    command_that_made,
)
from cache.files import canonical_json, exclusive, place
from cache.index import INDEX_SCHEMA, decode_index, encode_table, read_committed
from cache.layout import ROWS_PER_SHARD, Encoding, Header, Layout, read_header
from cache.plan import read_plan
from cache.quantize import Calibration
from cache.shards import CRC_BYTES
from cache.writer import ShardWriter, claim_shard


class FeatureStore:
    """One extraction on disk, finished or on its way."""

    def __init__(self, layout: Layout, header: Header) -> None:
        self.layout, self.header = layout, header
        self._spare: list[NDArray[Any]] = []  # memory for shards, used again

    # ------------------------------------------------------------------------------------------- making and opening

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        plan: pa.Table,
        dim: int,
        fingerprint: Mapping[str, Any],
        encoding: Encoding = "float16",
        rows_per_shard: int = ROWS_PER_SHARD,
        calibration: Calibration | None = None,
    ) -> Self:
        """Make a store, or open the identical one that is there.

        Several processes may do this at once: one makes it, the others open it. What dead writers left is swept
        away, and a damaged header, plan or calibration is written again; for damaged shards see `store_repair`.

        Args:
            plan: what `make_plan` gave, with the same `rows_per_shard`.
            dim: features per frame.
            fingerprint: JSON values, everything needed to recompute a row; format, encoding and calibration are added
                under the key "store".
            calibration: for int8, and only then.

        Raises:
            StoreMismatchError: the store there differs; the fields are named.
            StoreNotFoundError: something else than a store is there.
            PlanError: the plan was not made for this shard size.
        """
        root = Path(path)
        if root.exists() and not root.is_dir():
            raise StoreNotFoundError(f"{str(root)!r} is a file, not a feature store. Name a folder with --store.")
        header = describe(plan, dim, fingerprint, encoding, rows_per_shard, calibration)
        if not root.exists() or not any(root.iterdir()):
            build(root, header, plan, calibration)
        else:
            mend(root, header, plan, calibration)
        store = cls.open(root)
        require(root, store.header, header)
        sweep(store.layout, store.header)
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a store that exists.

        Raises:
            StoreNotFoundError: there is none.
            CorruptShardError: its header is damaged.
        """
        root = Path(path)
        return cls(Layout(root), read_header(root))

    def require_fingerprint(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse a store of another extraction.

        Args:
            fingerprint: a whole fingerprint, as `store.fingerprint` gives it.

        Raises:
            StoreMismatchError: naming the fields that differ.
        """
        if differences := compare_fields(self.fingerprint, fingerprint):
            raise StoreMismatchError(self.path, differences)

    # ------------------------------------------------------------------------------------------- what it is

    @property
    def path(self) -> Path:
        return self.layout.root

    @property
    def dim(self) -> int:
        return self.header.dim

    @property
    def encoding(self) -> Encoding:
        return self.header.encoding

    @property
    def rows_per_shard(self) -> int:
        return self.header.rows_per_shard

    @property
    def num_shards(self) -> int:
        return self.header.num_shards

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.header.fingerprint

    @property
    def fingerprint_id(self) -> str:
        return self.header.fingerprint_id

    @cached_property
    def calibration(self) -> Calibration | None:
        """Mean and std of an int8 store, out of its file or the copy in the header; None for float16.

        Raises:
            CorruptShardError: neither is the calibration that the header names.
        """
        if self.header.calibration_id is None:
            return None
        found = self.calibration_file() or self.calibration_copy()
        if found is None:
            raise CorruptShardError(
                self.path,
                None,
                "neither its calibration file nor the copy in its header is the one that the header names",
            )
        return found

    def calibration_file(self) -> Calibration | None:
        """Read the calibration's file; None if it is not the one that the header names."""
        try:
            return self._named(Calibration.from_bytes(self.layout.calibration.read_bytes()[:-CRC_BYTES], self.dim))
        except (OSError, ValueError):
            return None

    def calibration_copy(self) -> Calibration | None:
        """Read the calibration's copy in the header; None if it is not the one that the header names, or none."""
        try:
            return self._named(Calibration.from_base64(self.header.calibration or "", self.dim))
        except ValueError:
            return None

    def _named(self, calibration: Calibration) -> Calibration | None:
        return calibration if calibration.id == self.header.calibration_id else None

    def plan(self, shard: int | None = None) -> pa.Table:
        """Read the plan: one shard's rows in the order of their sources, or all.

        Raises:
            CorruptShardError: it cannot be read.
        """
        try:
            return read_plan(self.layout.plan, shard)
        except (OSError, pa.ArrowException) as error:
            raise CorruptShardError(self.path, None, f"its plan cannot be read ({error})") from error

    # ------------------------------------------------------------------------------------------- how far it is

    @property
    def is_sealed(self) -> bool:
        return self.layout.sealed.exists()

    def committed_shards(self) -> list[int]:
        """List the shards that are finished."""
        return committed_shards(self.layout)

    def pending_shards(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """List the shards still to be written.

        Args:
            part: (i, N): only the shards that are i modulo N, for the i-th of N machines.
        """
        index, parts = part
        if not 0 <= index < parts:
            raise ValueError(f"part {index}/{parts} does not exist; number the {parts} parts from 0 to {parts - 1}.")
        done = set(self.committed_shards())
        return [shard for shard in range(index, self.num_shards, parts) if shard not in done]

    def commit(self, shard: int) -> Commit:
        """Read a shard's commit record.

        Raises:
            FileNotFoundError: the shard is not committed.
            CorruptShardError: the record is damaged, or another store's.
        """
        return read_commit(self.layout, self.header, shard)

    # ------------------------------------------------------------------------------------------- writing

    def write_shard(self, shard: int) -> ShardWriter | None:
        """Begin a shard.

        Returns:
            A context manager that commits when left without an exception; None if the shard is committed or a living
            writer is at it.
        """
        claim = claim_shard(self.layout, self.header, shard)
        if claim is None:
            return None
        try:
            return ShardWriter(self.layout, self.header, shard, self.plan(shard), self.calibration, claim, self._spare)
        except BaseException:
            claim.release()
            raise

    def seal(self) -> str:
        """Close a finished store: one index, one file of commit records, and a digest over everything.

        Returns:
            The root digest. Sealing again changes nothing.

        Raises:
            UnsealableStoreError: some shards are not committed.
            CorruptShardError: a shard's record or index is damaged.
        """
        if pending := self.pending_shards():
            raise UnsealableStoreError(
                f"{len(pending)} of {self.num_shards} shards of {str(self.path)!r} are not committed yet, the first "
                f"being {pending[0]}. Finish them with {command_that_made(self.path)}."
            )
        commits = [self.commit(shard) for shard in range(self.num_shards)]
        root = root_digest(commits)
        tables = [decode_index(read_committed(self.path, commit, "index")) for commit in commits]
        index = encode_table(pa.concat_tables(tables) if tables else INDEX_SCHEMA.empty_table())
        seal = {
            "format": self.header.format,
            "root": root,
            "num_shards": self.num_shards,
            "fingerprint_id": self.fingerprint_id,
            "plan_id": self.header.plan_id,
            "num_utterances": sum(commit.num_utterances for commit in commits),
            "num_frames": sum(commit.num_frames for commit in commits),
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }
        with exclusive(self.layout.lock):
            if not self.is_sealed:
                for path, content in (
                    (self.layout.sealed_index, index),
                    (self.layout.sealed_commits, b"".join(commit.encode() for commit in commits)),
                    (self.layout.sealed, canonical_json(seal) + b"\n"),
                ):
                    path.unlink(missing_ok=True)
                    place(path, [content])
        return root
