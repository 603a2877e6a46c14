"""Reading features by utterance, fast enough to train from, every byte checked.

Invariants: a shard without a commit record does not exist; every byte handed out was checked against that record.
Frames are read-only views of the blocks they were read with, not copies. Files are opened lazily, in the process that
reads; no fork is needed. Knows nothing of batches or models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cache.blocks import BlockCache, Rows, read_rows
from cache.commits import Commit, check_commit, check_sizes
from cache.errors import CorruptShardError
from cache.index import INDEX_SCHEMA, decode_index, read_committed, read_index
from cache.quantize import Calibration, Quantized
from cache.store import FeatureStore

CACHE_BYTES = 6 << 30  # 1.5 times the windows of `cache.order`; for all ranks of a machine together


class FeatureReader:
    """The stored utterances of a store, or of one split of it, by position in `index`."""

    def __init__(
        self, store: FeatureStore | str | os.PathLike[str], *, split: str | None = None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """Open a store for reading, finished or not.

        Args:
            split: only its utterances; None for all.
            cache_bytes: limit on the blocks kept in memory; views still in use keep theirs alive beyond it. One of
                several ranks needs only its share of `CACHE_BYTES`.

        Raises:
            StoreNotFoundError: there is no store.
            CorruptShardError: a committed file is missing or has another size.
            ValueError: the store does not contain this split.
        """
        self.store = store if isinstance(store, FeatureStore) else FeatureStore.open(store)
        self.split, self.cache_bytes = split, cache_bytes
        self._columns: dict[str, pa.ChunkedArray] = {}
        for commit in self.commits.values():
            check_sizes(self.store.path, commit)
        splits = {commit.split for commit in self.commits.values()}
        if split is not None and split not in splits:
            raise ValueError(
                f"split {split!r} has no finished shard in {str(self.store.path)!r}; it holds "
                f"{', '.join(map(repr, sorted(splits))) or 'nothing yet'}."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.store.path), self.split, self.cache_bytes)

    @cached_property
    def commits(self) -> dict[int, Commit]:
        """The commit records by shard."""
        layout, header = self.store.layout, self.store.header
        if not self.store.is_sealed:
            return {shard: self.store.commit(shard) for shard in self.store.committed_shards()}
        lines = self._sealed(layout.sealed_commits, "root").read_bytes().splitlines(keepends=True)
        return {shard: check_commit(layout, header, shard, line, is_verified=True) for shard, line in enumerate(lines)}

    @cached_property
    def index(self) -> pa.Table:
        """One row per utterance, in order of rows; see `cache.index.INDEX_SCHEMA`.

        Raises:
            CorruptShardError: an index file differs from the committed one.
        """
        if self.store.is_sealed:
            return self._select_split(read_index(self._sealed_index))
        commits = [commit for commit in self.commits.values() if self.split in (None, commit.split)]
        parts = [decode_index(read_committed(self.store.path, commit, "index")) for commit in commits]
        return pa.concat_tables(parts) if parts else INDEX_SCHEMA.empty_table()

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of `index`, errors as there; of a sealed store it is read alone: training needs no text."""
        if "index" in self.__dict__ or not self.store.is_sealed:
            return self.index[name]
        if name not in self._columns:
            self._columns[name] = self._select_split(read_index(self._sealed_index, [name]))[name]
        return self._columns[name]

    def _select_split(self, table: pa.Table) -> pa.Table:
        """Keep the rows of the split without a copy: they are contiguous, since a shard has one split."""
        if self.split is None:
            return table
        parts, start = [table.slice(0, 0)], 0
        for split, commits in groupby(self.commits.values(), lambda commit: commit.split):
            size = sum(commit.num_utterances for commit in commits)
            if split == self.split:
                parts.append(table.slice(start, size))
            start += size
        return pa.concat_tables(parts)

    @cached_property
    def _sealed_index(self) -> Path:
        return self._sealed(self.store.layout.sealed_index, "index_sha256")

    def _sealed(self, path: Path, field: str) -> Path:
        """Return the path of a file of a sealed store, after its digest was compared with a field of the seal."""
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            expected = json.loads(self.store.layout.sealed.read_bytes())[field]
        except (OSError, ValueError, KeyError, TypeError) as error:
            found = f"it is sealed, but its seal or {path.name} cannot be read ({error})"
            raise CorruptShardError(self.store.path, None, found) from error
        if digest != expected:
            found = f"{path.name} is not the file that was sealed (its digest differs)"
            raise CorruptShardError(self.store.path, None, found)
        return path

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First row of each utterance: (N,) int64."""
        return np.asarray(self.column("start"), dtype=np.int64)

    @cached_property
    def num_frames(self) -> NDArray[np.int32]:
        """Frames of each utterance: (N,) int32."""
        return np.asarray(self.column("num_frames"), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def calibration(self) -> Calibration | None:
        """Mean and standard deviation of a quantised store; None for float16."""
        return self.store.calibration

    @cached_property
    def _blocks(self) -> BlockCache:
        return BlockCache(self.store.layout, self.store.header, self.commits, self.cache_bytes)

    def clear(self) -> None:
        """Drop the blocks in memory; the next read goes to the file system."""
        self._blocks.clear()

    @property
    def bytes_read(self) -> int:
        """Feature bytes read in blocks so far, for the read amplification."""
        return self._blocks.bytes_read

    def read_rows(self, positions: Sequence[int] | NDArray[np.integer]) -> list[Rows]:
        """Read utterances as stored, in complete blocks.

        Args:
            positions: rows of `index`. Neighbours in the store share blocks, so read in an order that keeps them close
                (see `cache.order`); for a single utterance, `get` reads less.

        Raises:
            CorruptShardError: the bytes differ from those that were committed.
        """
        block_rows = self.store.header.block_rows
        spans = []
        for position in positions:
            start = int(self.starts[position])
            stop = start + int(self.num_frames[position])
            spans.append((start, stop, range(start // block_rows, -(-stop // block_rows))))
        futures = self._blocks.fetch(dict.fromkeys(block for _, _, blocks in spans for block in blocks))
        utterances = []
        for start, stop, blocks in spans:
            parts = []
            for block in blocks:
                offset = block * block_rows
                parts.append(futures[block].result().slice(max(start - offset, 0), min(stop - offset, block_rows)))
            utterances.append(Rows.join(parts))
        return utterances

    def read(self, positions: Sequence[int] | NDArray[np.integer]) -> list[NDArray[Any] | Quantized]:
        """Read utterances: (T, dim) float16 each, or `Quantized` from a quantised store. See `read_rows`."""
        return [self._decode(rows) for rows in self.read_rows(positions)]

    def get(self, utterance_id: str) -> NDArray[Any] | Quantized:
        """Read one utterance, and only the chunks that contain it; errors as `read_rows`.

        Raises:
            KeyError: it is not stored here.
        """
        position = pc.index(self.column("utterance_id"), utterance_id).as_py()
        if position < 0:
            raise KeyError(
                f"utterance {utterance_id!r} is not stored in {str(self.store.path)!r}; "
                "its quarantine may contain the reason (`tinyaudio store info`)."
            )
        return self._decode(self.rows_of(position))

    def rows_of(self, position: int) -> Rows:
        """Read one utterance as stored, only the chunks that contain it; nothing is cached. Errors as `read_rows`."""
        shard, start = divmod(int(self.starts[position]), self.store.rows_per_shard)
        stop = start + int(self.num_frames[position])
        return read_rows(self.store.layout, self.store.header, self.commits[shard], start, stop)

    def prefetch(self, positions: Sequence[int] | NDArray[np.integer]) -> None:
        """Begin to read the blocks of the utterances that are needed next, in that order, up to the cache's capacity.

        About 160 utterances ahead keep two threads busy.
        """
        chosen = np.asarray(positions, dtype=np.int64)
        block_rows = self.store.header.block_rows
        first, last = self.starts[chosen], self.starts[chosen] + self.num_frames[chosen] - 1
        blocks = np.stack([first // block_rows, last // block_rows], axis=1).reshape(-1).tolist()
        self._blocks.fetch(islice(dict.fromkeys(blocks), self._blocks.capacity))

    def _decode(self, rows: Rows) -> NDArray[Any] | Quantized:
        if rows.scales is None:
            return rows.features
        calibration, bits = self.store.calibration, self.store.header.bits
        assert calibration is not None
        assert bits is not None
        return Quantized(rows.features, rows.scales, calibration, bits)


def _reopen(path: str, split: str | None, cache_bytes: int) -> FeatureReader:
    """Unpickle a reader, without the checks that were made when it was opened."""
    reader = FeatureReader.__new__(FeatureReader)
    reader.store = FeatureStore.open(path)
    reader.split, reader.cache_bytes = split, cache_bytes
    reader._columns = {}
    return reader
