"""The feature store: ragged frames under string ids, in one tall Zarr array, written shard by shard.

    store = FeatureStore.create(path, plan=make_plan(table), dim=1024, encoding="float16", fingerprint={...})
    for shard in store.pending_shards():
        with store.write_shard(shard) as writer: ...
    store.seal()

Invariants: a store holds one extraction, and what it holds never changes after creation; the same calls resume it.
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
from cache.create import create_empty, make_header, repair_metadata, require_same
from cache.errors import CorruptShardError, StoreNotFoundError, UnsealableStoreError, command_that_made
from cache.files import canonical_json, exclusive, place
from cache.index import INDEX_SCHEMA, decode_index, encode_table, read_committed
from cache.layout import ROWS_PER_SHARD, Encoding, Header, Layout, read_header
from cache.plan import read_plan
from cache.quantize import Calibration
from cache.writer import ShardWriter, claim_shard


class FeatureStore:
    """One extraction on disk, finished or not."""

    def __init__(self, layout: Layout, header: Header) -> None:
        self.layout, self.header = layout, header
        self.path, self.fingerprint, self.fingerprint_id = layout.root, header.fingerprint, header.fingerprint_id
        self.dim, self.encoding, self.rows_per_shard = header.dim, header.encoding, header.rows_per_shard
        self.num_shards = header.num_shards
        self._spare_arrays: list[dict[str, NDArray[Any]]] = []

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
        """Create a store, or open the identical one that exists.

        Several processes may do this at once: one creates the store, the others open it. Files left by dead writers
        are removed, and a damaged header or plan is written again; for damaged shards see `store_repair`.

        Args:
            plan: from `make_plan`, with the same `rows_per_shard`.
            fingerprint: JSON values, everything needed to recompute a row; format, encoding and calibration are added
                under the key "store".
            calibration: required for all encodings but float16, which takes none.

        Raises:
            StoreMismatchError: the existing store differs; the fields are named.
            StoreNotFoundError: the path exists and is not a store.
            PlanError: the plan was not made for this shard size.
        """
        root = Path(path)
        if root.exists() and not root.is_dir():
            raise StoreNotFoundError(f"{str(root)!r} is a file, not a feature store. Pass a folder with --store.")
        header = make_header(plan, dim, fingerprint, encoding, rows_per_shard, calibration)
        if not root.exists() or not any(root.iterdir()):
            create_empty(root, header, plan)
        else:
            repair_metadata(root, header, plan)
        store = cls.open(root)
        require_same(root, store.header, header)
        sweep(store.layout, store.header)
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a store that exists.

        Raises:
            StoreNotFoundError: the path is missing or is not a store.
            CorruptShardError: its header is damaged.
        """
        root = Path(path)
        return cls(Layout(root), read_header(root))

    @cached_property
    def calibration(self) -> Calibration | None:
        """Mean and standard deviation of a quantised store; None for float16."""
        text = self.header.calibration
        return None if text is None else Calibration.from_base64(text, self.dim)

    def plan(self, shard: int | None = None) -> pa.Table:
        """Read the plan: one shard's rows in the order of their sources, or all.

        Raises:
            CorruptShardError: it cannot be read.
        """
        try:
            return read_plan(self.layout.plan, shard)
        except (OSError, pa.ArrowException) as error:
            raise CorruptShardError(self.path, None, f"its plan cannot be read ({error})") from error

    @property
    def is_sealed(self) -> bool:
        return self.layout.sealed.exists()

    def committed_shards(self) -> list[int]:
        """List the shards that are finished."""
        return committed_shards(self.layout)

    def pending_shards(self, part: tuple[int, int] = (0, 1)) -> list[int]:
        """List the shards that are not written yet.

        Args:
            part: (i, N): only the i-th of N runs of neighbouring shards, which share sources. Runs differ in length by
                one shard at most.
        """
        index, parts = part
        if not 0 <= index < parts:
            raise ValueError(f"part {index}/{parts} does not exist; number the {parts} parts from 0 to {parts - 1}.")
        done = set(self.committed_shards())
        first, end = index * self.num_shards // parts, (index + 1) * self.num_shards // parts
        return [shard for shard in range(first, end) if shard not in done]

    def commit(self, shard: int) -> Commit:
        """Read a shard's commit record; errors as `commits.read_commit`."""
        return read_commit(self.layout, self.header, shard)

    def write_shard(self, shard: int) -> ShardWriter | None:
        """Begin to write a shard, in a context manager that commits when it is left without an exception.

        None if the shard is committed or claimed by a living writer.
        """
        claim = claim_shard(self.layout, self.header, shard)
        if claim is None:
            return None
        try:
            plan, calibration = self.plan(shard), self.calibration
            return ShardWriter(self.layout, self.header, shard, plan, calibration, claim, self._spare_arrays)
        except BaseException:
            claim.release()
            raise

    def seal(self) -> str:
        """Finalize a store: one index, one file of commit records, and a digest over everything, which is returned.

        Sealing again changes nothing.

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
        contents = {
            self.layout.sealed_index: index,
            self.layout.sealed_commits: b"".join(commit.encode() for commit in commits),
            self.layout.sealed: canonical_json(seal) + b"\n",  # last: its presence means sealed
        }
        with exclusive(self.layout.lock):
            if not self.is_sealed:
                for path, content in contents.items():
                    path.unlink(missing_ok=True)
                    place(path, [content])
        return root
