"""The bytes of one Zarr v3 shard file: chunks with their checksums, then an index with its own checksum.

    chunk 0 | crc32c | chunk 1 | crc32c | ... | (offset u64, nbytes u64) per chunk | crc32c        all little-endian

Invariants: byte for byte what zarr writes for codecs `bytes` + `crc32c`, index at the end. Chunks after the last used
row are not in the file; the index marks them with 2**64 - 1 and Zarr reads them as fill values. Knows nothing of
utterances.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

CRC_BYTES = 4
ABSENT = 2**64 - 1  # Zarr's mark, as offset and as size, for a chunk that is not in the file


def crc32c(buffer: NDArray[np.generic] | bytes) -> int:
    """Compute the Castagnoli checksum (RFC 3720, appendix B.4) of contiguous bytes; releases the GIL."""
    checksum: int = google_crc32c.value(buffer)
    return checksum


def shard_size(num_chunks: int, chunks_per_shard: int, chunk_bytes: int) -> int:
    """Compute the bytes of a shard file whose first `num_chunks` chunks are present."""
    return num_chunks * (chunk_bytes + CRC_BYTES) + chunks_per_shard * 16 + CRC_BYTES


def encode_shard(
    chunks: NDArray[np.generic], chunks_per_shard: int, checksums: NDArray[np.uint32]
) -> Iterator[bytes | memoryview]:
    """Encode a shard file as buffers to be written in order; the chunks are not copied.

    Args:
        chunks: (n, chunk_rows, ...) contiguous, n <= chunks_per_shard.
        checksums: (n,) uint32, filled in as the buffers are taken.
    """
    for number, chunk in enumerate(chunks):
        checksums[number] = crc32c(chunk)
        yield bytes_of(chunk)
        yield checksums[number].astype("<u4").tobytes()
    index = expected_index(len(chunks), chunks_per_shard, chunks[0].nbytes if len(chunks) else 0).tobytes()
    yield index
    yield crc32c(index).to_bytes(CRC_BYTES, "little")


def bytes_of(array: NDArray[np.generic]) -> memoryview:
    """Return the memory of a contiguous array as bytes."""
    view: memoryview = array.reshape(-1).view(np.uint8).data
    return view


def expected_index(num_chunks: int, chunks_per_shard: int, chunk_bytes: int) -> NDArray[np.uint64]:
    """Compute the index of a shard whose first `num_chunks` chunks are present, (chunks_per_shard, 2) uint64.

    Each row is a chunk's offset and size, little-endian, or `ABSENT` twice.
    """
    index = np.full((chunks_per_shard, 2), ABSENT, dtype="<u8")
    index[:num_chunks, 0] = np.arange(num_chunks, dtype=np.uint64) * (chunk_bytes + CRC_BYTES)
    index[:num_chunks, 1] = chunk_bytes + CRC_BYTES
    return index


def read_chunks(
    fd: int,
    first: int,
    count: int,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
    buffer: NDArray[np.uint8] | None = None,
) -> tuple[NDArray[np.generic], NDArray[np.uint32], NDArray[np.uint32]]:
    """Read consecutive chunks and compute their checksums; nothing is compared.

    Args:
        first, count: the chunks; the caller knows that they are present.
        shape: of one chunk, (chunk_rows, ...).
        buffer: memory to read into, at least `count` chunks long; None to allocate.

    Returns:
        The rows, (count * chunk_rows, ...) contiguous; the checksums found in the file and those computed from the
        rows, (count,) uint32 each.

    Raises:
        EOFError: the file ends before the last of these chunks.
    """
    chunk_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    memory = np.empty(count * chunk_bytes, np.uint8) if buffer is None else buffer[: count * chunk_bytes]
    chunks = memory.view(dtype).reshape(count, *shape)
    found, computed = np.empty(count, dtype="<u4"), np.empty(count, dtype="<u4")
    for number in range(count):  # the checksum is computed while the chunk is still in the processor's cache
        offset = (first + number) * (chunk_bytes + CRC_BYTES)
        _read_exactly(fd, bytes_of(chunks[number]), offset)
        _read_exactly(fd, bytes_of(found[number : number + 1]), offset + chunk_bytes)
        computed[number] = crc32c(chunks[number])
    return chunks.reshape(count * shape[0], *shape[1:]), found, computed


def _read_exactly(fd: int, view: memoryview, offset: int) -> None:
    while view:
        size = os.preadv(fd, [view], offset)
        if size == 0:
            raise EOFError(f"the file ends at byte {offset:,}")
        view, offset = view[size:], offset + size


def read_index(path: Path, chunks_per_shard: int) -> NDArray[np.uint64]:
    """Read the index of a shard file, in the form that `expected_index` returns.

    Raises:
        ValueError: the index is incomplete or damaged.
    """
    size = chunks_per_shard * 16 + CRC_BYTES
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        if file.tell() < size:
            raise ValueError(f"{file.tell():,} bytes, fewer than the index alone")
        file.seek(-size, os.SEEK_END)
        encoded = file.read(size)
    if crc32c(encoded[:-CRC_BYTES]) != int.from_bytes(encoded[-CRC_BYTES:], "little"):
        raise ValueError("the checksum of the shard index does not match")
    return np.frombuffer(encoded[:-CRC_BYTES], dtype="<u8").reshape(chunks_per_shard, 2)
