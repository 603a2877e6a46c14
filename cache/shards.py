"""The bytes of one Zarr v3 shard file: chunks with their checksums, then the index with its own.

    chunk 0 | crc32c | chunk 1 | crc32c | ... | (offset u64, nbytes u64) per chunk | crc32c        all little-endian

Invariants: byte for byte what zarr writes for codecs `bytes` + `crc32c`, index at the end. Chunks after the last used
row are absent from the file; the index marks them with 2**64 - 1 and Zarr reads them as fill. Knows nothing of
utterances.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from cache.files import IOV_MAX

CRC_BYTES = 4
HOT_BYTES = 1 << 20  # read and checksummed at a time: fits the second-level cache of a core
ABSENT = 2**64 - 1  # Zarr's mark, as offset and as size, for a chunk that is not in the file


def crc32c(buffer: NDArray[np.generic] | bytes) -> int:
    """Compute the Castagnoli checksum (RFC 3720, appendix B.4) of contiguous bytes; releases the GIL."""
    checksum: int = google_crc32c.value(buffer)  # a numpy array passes as it is, without a copy
    return checksum


def num_chunks_used(num_rows: int, chunk_rows: int) -> int:
    """Count the chunks that hold `num_rows` rows."""
    return -(-num_rows // chunk_rows)


def shard_size(num_chunks: int, chunks_per_shard: int, chunk_bytes: int) -> int:
    """Compute the bytes of a shard file whose first `num_chunks` chunks are present."""
    return num_chunks * (chunk_bytes + CRC_BYTES) + chunks_per_shard * 16 + CRC_BYTES


def encode_shard(
    chunks: NDArray[np.generic], chunks_per_shard: int, checksums: NDArray[np.uint32]
) -> Iterator[bytes | memoryview]:
    """Lay out a shard file as buffers to be written in order; nothing is copied.

    Args:
        chunks: (n, chunk_rows, ...) contiguous, n <= chunks_per_shard.
        checksums: (n,) uint32, filled in on the way.
    """
    for number, (chunk, content) in enumerate(zip(chunks, _parts(chunks), strict=True)):
        checksums[number] = crc32c(chunk)
        yield content
        yield checksums[number].astype("<u4").tobytes()
    index = expected_index(len(chunks), chunks_per_shard, chunks[0].nbytes if len(chunks) else 0).tobytes()
    yield index
    yield crc32c(index).to_bytes(CRC_BYTES, "little")


def expected_index(num_chunks: int, chunks_per_shard: int, chunk_bytes: int) -> NDArray[np.uint64]:
    """Lay out the index of a shard whose first `num_chunks` chunks are present.

    Returns:
        (chunks_per_shard, 2) little-endian uint64: offset and size of each chunk, `ABSENT` twice for one that is not.
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
    """Read a run of chunks, payload and checksums parted by the kernel, and compute the checksums of what was read.

    Goes a few chunks at a time, so that they are still in the processor's cache when their checksum is computed.

    Args:
        first, count: the run; the caller knows that these chunks are present.
        shape: of one chunk, (chunk_rows, ...).
        buffer: memory to read into, at least `count` chunks long; None to allocate.

    Returns:
        The rows, (count * chunk_rows, ...) contiguous; the checksums found in the file and those of the rows, (count,)
        uint32 each. Nothing is compared.

    Raises:
        EOFError: the file ends inside the run.
    """
    chunk_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    raw = np.empty(count * chunk_bytes, np.uint8) if buffer is None else buffer[: count * chunk_bytes]
    chunks = raw.reshape(count, chunk_bytes)
    found, computed = np.empty(count, dtype="<u4"), np.empty(count, dtype="<u4")
    at_once = max(1, HOT_BYTES // chunk_bytes)
    for begin in range(0, count, at_once):
        part = slice(begin, begin + at_once)
        pairs = zip(_parts(chunks[part]), _parts(found[part]), strict=True)
        _read_into(fd, [view for pair in pairs for view in pair], (first + begin) * (chunk_bytes + CRC_BYTES))
        computed[part] = [crc32c(chunk) for chunk in chunks[part]]
    return raw.view(dtype).reshape(count * shape[0], *shape[1:]), found, computed


def _parts(array: NDArray[np.generic]) -> list[memoryview]:
    flat: memoryview = array.reshape(-1).view(np.uint8).data
    size = len(flat) // max(len(array), 1)
    return [flat[i * size : (i + 1) * size] for i in range(len(array))]


def _read_into(fd: int, views: list[memoryview], offset: int) -> None:
    while views:
        read = os.preadv(fd, views[:IOV_MAX], offset)
        if read == 0:
            raise EOFError(f"the file ends at byte {offset:,}")
        offset += read
        while read:
            if read < len(views[0]):
                views[0] = views[0][read:]
                break
            read -= len(views.pop(0))


def read_index(path: Path, chunks_per_shard: int) -> NDArray[np.uint64]:
    """Read the index of a shard file.

    Returns:
        As `expected_index` lays it out.

    Raises:
        ValueError: the index is not whole.
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
