"""The commit record: the only truth about a shard. No record, no shard.

A record names every file of its shard with its size and digest, and closes with a digest of itself. Of the array files
the digests are those of the chunks, so that a reader can check each block it reads against the record: a flipped bit,
but also a file swapped for another sound one, cannot pass. Knows nothing of how files are written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cache.durable import canonical_json
from cache.errors import CorruptShardError
from cache.layout import Header, Layout


@dataclass(frozen=True, kw_only=True)
class ArrayFile:
    """A shard file of one Zarr array, as committed."""

    size_bytes: int
    chunk_crc32c: str  # eight hex digits per chunk present, in order

    @cached_property
    def checksums(self) -> NDArray[np.uint32]:
        """The checksum of each chunk present: (n,) uint32."""
        return np.frombuffer(bytes.fromhex(self.chunk_crc32c), dtype=">u4").astype(np.uint32)

    @classmethod
    def of(cls, size_bytes: int, checksums: NDArray[np.uint32]) -> Self:
        return cls(size_bytes=size_bytes, chunk_crc32c=checksums.astype(">u4").tobytes().hex())


@dataclass(frozen=True, kw_only=True)
class PlainFile:
    """An index or a quarantine file, as committed."""

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> Self:
        return cls(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


@dataclass(frozen=True, kw_only=True)
class Commit:
    """One shard, finished."""

    format: int
    shard: int
    split: str
    fingerprint_id: str
    plan_id: str
    num_utterances: int
    num_frames: int
    num_quarantined: int
    num_clamped: int  # values beyond the range of float16, clamped to it
    duration_s: float  # of what is stored
    arrays: dict[str, ArrayFile]  # "features/c.<shard>.0" and, for int8, "scales/c.<shard>"
    files: dict[str, PlainFile]  # "index/<shard>.parquet", "quarantine/<shard>.jsonl"
    writer: str
    finished_at: str  # UTC, ISO 8601

    @property
    def size_bytes(self) -> int:
        arrays = sum(file.size_bytes for file in self.arrays.values())
        return arrays + sum(file.size_bytes for file in self.files.values())

    def encode(self) -> bytes:
        """Spell the record: one line of canonical JSON, its `sha256` being that of the same line without it."""
        body = asdict(self)
        return canonical_json(body | {"sha256": hashlib.sha256(canonical_json(body)).hexdigest()}) + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> Self:
        """Read a record back.

        Raises:
            ValueError: it is not a whole record, or its digest does not match.
        """
        document: dict[str, Any] = json.loads(line)
        digest = document.pop("sha256", None)
        if hashlib.sha256(canonical_json(document)).hexdigest() != digest:
            raise ValueError("the digest of the commit record does not match")
        document["arrays"] = {name: ArrayFile(**file) for name, file in document["arrays"].items()}
        document["files"] = {name: PlainFile(**file) for name, file in document["files"].items()}
        return cls(**{field.name: document[field.name] for field in fields(cls)})


def committed_shards(layout: Layout) -> list[int]:
    """List the shards that have a commit record, in order."""
    names = [path.name for path in (layout.root / "commits").glob("[0-9]*.json")]
    return sorted(int(name.removesuffix(".json")) for name in names)


def read_commit(layout: Layout, header: Header, shard: int) -> Commit:
    """Read a shard's commit record and check that it belongs to this shard, plan and fingerprint.

    Raises:
        FileNotFoundError: the shard is not committed.
        CorruptShardError: the record is damaged or another's.
    """
    line = layout.commit(shard).read_bytes()
    return check_commit(layout, header, shard, line)


def check_commit(layout: Layout, header: Header, shard: int, line: bytes) -> Commit:
    """Decode a commit record and check whose it is.

    Raises:
        CorruptShardError: it is damaged or another's.
    """
    try:
        commit = Commit.decode(line)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptShardError(layout.root, shard, f"its commit record is unreadable ({error})") from error
    wrong = {
        name: (getattr(commit, name), expected)
        for name, expected in (("shard", shard), ("plan_id", header.plan_id), ("fingerprint_id", header.fingerprint_id))
        if getattr(commit, name) != expected
    }
    if wrong:
        found = "; ".join(f"{name} {found!r} instead of {expected!r}" for name, (found, expected) in wrong.items())
        raise CorruptShardError(layout.root, shard, f"its commit record is of another store or shard: {found}")
    return commit


def root_digest(commits: Iterable[Commit]) -> str:
    """Compute the digest that seals a store: the sha256 over its commit records in order of shard."""
    digest = hashlib.sha256()
    for commit in sorted(commits, key=lambda commit: commit.shard):
        digest.update(commit.encode())
    return digest.hexdigest()


def check_sizes(root: Path, commit: Commit) -> None:
    """Check that the files of a shard are there at their committed sizes.

    Raises:
        CorruptShardError: one is missing, or is longer or shorter.
    """
    for name, file in (commit.arrays | commit.files).items():
        try:
            size = (root / name).stat().st_size
        except FileNotFoundError:
            raise CorruptShardError(root, commit.shard, f"{name} is missing") from None
        if size != file.size_bytes:
            raise CorruptShardError(
                root, commit.shard, f"{name} has {size:,} bytes, committed with {file.size_bytes:,}"
            )
