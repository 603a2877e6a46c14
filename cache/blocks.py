"""Read a store by the block: long runs of chunks, by several threads, each chunk checked against its commit record.

A block of 16,384 rows is 32 MiB at 1024 x float16: long enough for any disk to read it at full speed. Invariants: bytes
that differ from the committed ones never leave this module; what is kept stays within `cache_bytes`. Knows nothing of
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


@dataclass(frozen=True, eq=False)
class Rows:
    """A run of rows as stored, read-only: features (n, dim) float16, or codes (n, dim) int8 and scales (n,) float16."""

    features: NDArray[Any]
    scales: NDArray[np.float16] | None

    @property
    def size_bytes(self) -> int:
        return self.features.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def slice(self, start: int, stop: int) -> Rows:
        """Give some of the rows, without a copy."""
        return Rows(self.features[start:stop], None if self.scales is None else self.scales[start:stop])

    @staticmethod
    def join(parts: list[Rows]) -> Rows:
        """Give several runs as one; a single one is not copied."""
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
        The rows asked for; views of the chunks that were read.

    Raises:
        CorruptShardError: a file is missing, short or unreadable, or a chunk is not the one that was committed. Noted
            in the store, so that the next repair knows where to look.
    """
    first, last = start // header.chunk_rows, -(-stop // header.chunk_rows)
    arrays: list[NDArray[Any]] = []
    for name in header.arrays:
        shape = (header.chunk_rows, header.dim) if name == "features" else (header.chunk_rows,)
        dtype = header.dtype if name == "features" else np.dtype("<f2")
        path = layout.array(name, commit.shard)
        file = commit.arrays[path.relative_to(layout.root).as_posix()]
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                rows, _, computed = read_chunks(
                    fd, first, last - first, shape, dtype, buffer if name == "features" else None
                )
            finally:
                os.close(fd)
        except OSError as error:
            raise unreadable(layout.root, commit.shard, path.relative_to(layout.root).as_posix(), error) from error
        except EOFError as error:
            raise CorruptShardError(layout.root, commit.shard, f"in {name} {error}") from error
        if (wrong := np.flatnonzero(computed != file.checksums[first:last])).size:
            note_damage(layout, commit.shard)
            raise CorruptShardError(
                layout.root, commit.shard, f"chunk {first + wrong[0]} of {name} is not the one that was committed"
            )
        rows.flags.writeable = False
        arrays.append(rows)
    offset = first * header.chunk_rows
    return Rows(arrays[0], arrays[1] if len(arrays) > 1 else None).slice(start - offset, stop - offset)


class _Buffers:
    """Memory of blocks, used again as soon as nobody looks at it any more.

    Fresh memory has to be found and zeroed by the kernel, which takes longer than reading a block that is in its cache.
    """

    def __init__(self, size_bytes: int, most_spare: int) -> None:
        self._size_bytes = size_bytes
        self._spare: deque[NDArray[np.uint8]] = deque(maxlen=most_spare)

    def take(self) -> NDArray[np.uint8]:
        """Give a buffer that comes back by itself when the last view of it is gone."""
        try:
            memory = self._spare.pop()
        except IndexError:
            memory = np.empty(self._size_bytes, np.uint8)
        lent = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(lent, self._spare.append, memory).atexit = False
        return lent


class BlockCache:
    """The blocks of a store, each read once while it is in use; safe to share between threads.

    The block that was wanted longest ago leaves first. In the order of `cache.order`, asked for 16 batches ahead, that
    reads 1.002 times the useful bytes with half as much room again as the windows of 8 streams need, where dropping the
    blocks in the order in which they came reads 1.03 times, and 1.7 times when asked for 32 batches ahead. One stream
    alone needs room for two windows (100,000 and 300,000 utterances of 8 s, batches of 4,096 decoder positions).
    """

    def __init__(
        self, layout: Layout, header: Header, commits: Mapping[int, Commit], num_threads: int, cache_bytes: int
    ) -> None:
        self._layout, self._header, self._commits = layout, header, commits
        self._num_threads, self.cache_bytes = num_threads, cache_bytes
        self.bytes_read = 0  # from the file system, checksums included
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="blocks")
        self._kept: OrderedDict[int, Future[Rows]] = OrderedDict()
        header = self._header
        self._buffers = _Buffers(header.block_rows * header.dim * header.dtype.itemsize, self.capacity)

    def fetch(self, blocks: Iterable[int]) -> dict[int, Future[Rows]]:
        """Give blocks that are kept and begin to read the others.

        A block holds the used rows of `block_rows` rows of one shard, so the last one of a shard may be short.
        """
        if self._pid != os.getpid():  # forked: threads and locks did not come along
            self._start()
        with self._lock:
            wanted = {}
            for block in blocks:
                if block not in self._kept:
                    self._kept[block] = self._pool.submit(self._read, block)
                self._kept.move_to_end(block)
                wanted[block] = self._kept[block]
            self._evict(wanted)
        return wanted

    def clear(self) -> None:
        """Forget all blocks."""
        with self._lock:
            self._kept.clear()

    @property
    def capacity(self) -> int:
        """Blocks that may be kept."""
        return max(1, self.cache_bytes // (self._header.block_rows * self._header.bytes_per_row))

    def _evict(self, wanted: Mapping[int, Future[Rows]]) -> None:
        surplus = len(self._kept) - self.capacity
        for block in [block for block in self._kept if block not in wanted][: max(surplus, 0)]:
            del self._kept[block]  # never cancelled: another thread may be waiting for it

    def _read(self, block: int) -> Rows:
        header = self._header
        shard, start = divmod(block * header.block_rows, header.rows_per_shard)
        commit = self._commits[shard]
        (features, *_) = commit.arrays.values()
        used = len(features.checksums) * header.chunk_rows
        stop = min(start + header.block_rows, used)
        rows = read_rows(self._layout, header, commit, start, stop, self._buffers.take())
        with self._lock:
            self.bytes_read += rows.size_bytes
        return rows
