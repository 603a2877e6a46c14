"""Reading a store in blocks: long runs of chunks, by several threads, each chunk checked against its commit record.

A block of 16,384 rows is 32 MiB at 1024 x float16: long enough for any disk to read it at full speed. Invariants: bytes
that differ from the committed ones never leave this module; the blocks kept stay within `cache_bytes`. Knows nothing of
utterances.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.commits import Commit, note_damage, unreadable
from cache.errors import CorruptShardError
from cache.layout import Header, Layout
from cache.shards import read_chunks

NUM_THREADS = 2  # that read blocks: they keep a disk busy


@dataclass(frozen=True, eq=False)
class Rows:
    """Consecutive rows as stored, read-only: features (n, dim) float16; or codes and scales, as `quantize` returns."""

    features: NDArray[Any]
    scales: NDArray[np.float16] | None

    @property
    def size_bytes(self) -> int:
        return self.features.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def slice(self, start: int, stop: int) -> Rows:
        """Return some of the rows, without a copy."""
        return Rows(self.features[start:stop], None if self.scales is None else self.scales[start:stop])

    @staticmethod
    def join(parts: list[Rows]) -> Rows:
        """Concatenate rows; a single part is not copied."""
        if len(parts) == 1:
            return parts[0]
        scales = [part.scales for part in parts if part.scales is not None]
        return Rows(np.concatenate([part.features for part in parts]), np.concatenate(scales) if scales else None)


def read_rows(
    layout: Layout, header: Header, commit: Commit, start: int, stop: int, buffer: NDArray[np.uint8] | None = None
) -> Rows:
    """Read and check the chunks of one shard that cover rows `start` to `stop`, all of them used rows of the shard.

    Args:
        buffer: memory to read the features into; None to allocate.

    Returns:
        The requested rows; views of the chunks that were read.

    Raises:
        CorruptShardError: a file is missing, short or unreadable, or a chunk differs from the committed one. This is
            noted in the store, so that the next repair knows where to look.
    """
    first, last = start // header.chunk_rows, -(-stop // header.chunk_rows)
    arrays: list[NDArray[Any]] = []
    for name, spec in header.arrays.items():
        path = layout.array(name, commit.shard)
        in_store = path.relative_to(layout.root).as_posix()
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                rows, _, computed = read_chunks(
                    fd,
                    first,
                    last - first,
                    (header.chunk_rows, *spec.row_shape),
                    spec.dtype,
                    buffer if name == "features" else None,
                )
            finally:
                os.close(fd)
        except OSError as error:
            raise unreadable(layout.root, commit.shard, in_store, error) from error
        except EOFError as error:
            raise CorruptShardError(layout.root, commit.shard, f"in {name} {error}") from error
        if (wrong := np.flatnonzero(computed != commit.arrays[in_store].checksums[first:last])).size:
            note_damage(layout, commit.shard)
            found = f"chunk {first + wrong[0]} of {name} is not the one that was committed"
            raise CorruptShardError(layout.root, commit.shard, found)
        rows.flags.writeable = False
        arrays.append(rows)
    offset = first * header.chunk_rows
    return Rows(arrays[0], arrays[1] if len(arrays) > 1 else None).slice(start - offset, stop - offset)


class BlockCache:
    """The blocks of a store, each read once while it is in use; safe to share between threads.

    The least recently requested block is dropped first. In the order of `cache.order`, requested 16 batches ahead, that
    reads 1.002 times the useful bytes with 1.5 times the memory of the windows of 8 streams. Dropping blocks in the
    order in which they came reads 1.03 times, and 1.7 times when requested 32 batches ahead. A single stream needs
    memory for two windows (100,000 and 300,000 utterances of 8 s, batches of 4,096 decoder positions).
    """

    def __init__(self, layout: Layout, header: Header, commits: Mapping[int, Commit], cache_bytes: int) -> None:
        self._layout, self._header, self._commits, self.cache_bytes = layout, header, commits, cache_bytes
        self.bytes_read = 0  # of rows, without checksums
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="blocks")
        self._kept: OrderedDict[int, Future[Rows]] = OrderedDict()
        self._spare_buffers: deque[NDArray[np.uint8]] = deque(maxlen=self.capacity)

    def fetch(self, blocks: Iterable[int]) -> dict[int, Future[Rows]]:
        """Return blocks that are kept and begin to read the others.

        A block holds the used rows among `block_rows` rows of one shard, so the last block of a shard may be short.
        """
        if self._pid != os.getpid():  # after a fork: threads and locks are not copied
            self._start()
        with self._lock:
            requested = {}
            for block in blocks:
                if block not in self._kept:
                    self._kept[block] = self._pool.submit(self._read, block)
                self._kept.move_to_end(block)
                requested[block] = self._kept[block]
            surplus = max(0, len(self._kept) - self.capacity)
            for block in [block for block in self._kept if block not in requested][:surplus]:
                del self._kept[block]  # never cancelled: another thread may be waiting for it
        return requested

    def clear(self) -> None:
        """Drop all blocks."""
        with self._lock:
            self._kept.clear()

    @property
    def capacity(self) -> int:
        """Blocks that may be kept."""
        return max(1, self.cache_bytes // (self._header.block_rows * self._header.bytes_per_row))

    def _take_buffer(self) -> NDArray[np.uint8]:
        """Return memory for a block, which is reused once the last view of it is gone.

        Fresh memory has to be found and zeroed by the kernel, which takes longer than reading a block from the page
        cache: without this, reading is two to three times slower.
        """
        try:
            memory = self._spare_buffers.pop()
        except IndexError:
            memory = np.empty(self._header.chunk_bytes("features", self._header.block_rows), np.uint8)
        view = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(view, self._spare_buffers.append, memory).atexit = False
        return view

    def _read(self, block: int) -> Rows:
        header = self._header
        shard, start = divmod(block * header.block_rows, header.rows_per_shard)
        commit = self._commits[shard]
        (features, *_) = commit.arrays.values()
        stop = min(start + header.block_rows, len(features.checksums) * header.chunk_rows)
        rows = read_rows(self._layout, header, commit, start, stop, self._take_buffer())
        with self._lock:
            self.bytes_read += rows.size_bytes
        return rows
