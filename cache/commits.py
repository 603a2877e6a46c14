"""Commit records: a shard exists if and only if it has one.

A record lists every file of its shard with size and digest, and ends with a digest of itself. For array files the
digests are the checksums of the chunks, so that a reader can compare each block with the record: this finds a flipped
bit, and also a file replaced by another valid one. Knows nothing of how files are written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cache.errors import CorruptShardError
from cache.files import BYTES_LOST, canonical_json, place
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
    """The commit record of one finished shard."""

    format: int
    shard: int
    split: str
    fingerprint_id: str
    plan_id: str
    num_utterances: int
    num_frames: int
    num_quarantined: int
    num_clamped: int  # values beyond the range of float16, clamped to it
    duration_s: float  # of the stored utterances
    arrays: dict[str, ArrayFile]  # "features/c.<shard>.0" and, unless float16, "scales/c.<shard>"
    files: dict[str, PlainFile]  # "index/<shard>.parquet", "quarantine/<shard>.jsonl"
    writer: str
    finished_at: str  # UTC, ISO 8601

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in (self.arrays | self.files).values())

    def encode(self) -> bytes:
        """Encode the record as one line of canonical JSON; its `sha256` is that of the same line without it."""
        body = asdict(self)
        return canonical_json(body | {"sha256": hashlib.sha256(canonical_json(body)).hexdigest()}) + b"\n"

    @classmethod
    def decode(cls, line: bytes, *, is_verified: bool = False) -> Self:
        """Read a record back.

        Args:
            is_verified: a digest over these bytes was compared already, so the record's own need not be.

        Raises:
            ValueError: the record is incomplete, or its digest does not match.
        """
        try:
            document: dict[str, Any] = json.loads(line)
            digest = document.pop("sha256", None)
            if not is_verified and hashlib.sha256(canonical_json(document)).hexdigest() != digest:
                raise ValueError("its digest does not match")
            document["arrays"] = {name: ArrayFile(**file) for name, file in document["arrays"].items()}
            document["files"] = {name: PlainFile(**file) for name, file in document["files"].items()}
            return cls(**{field.name: document[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the commit record is unreadable ({error})") from error


def committed_shards(layout: Layout) -> list[int]:
    """List the shards that have a commit record, in order."""
    return sorted(int(path.stem) for path in (layout.root / "commits").glob("[0-9]*.json"))


def read_commit(layout: Layout, header: Header, shard: int) -> Commit:
    """Read a shard's commit record and check that it belongs to this shard, plan and fingerprint.

    Raises:
        FileNotFoundError: the shard is not committed.
        CorruptShardError: the record is damaged or belongs to another shard or store.
    """
    path = layout.commit(shard)
    try:
        line = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(layout.root, shard, path.relative_to(layout.root).as_posix(), error) from error
    return check_commit(layout, header, shard, line)


def check_commit(layout: Layout, header: Header, shard: int, line: bytes, *, is_verified: bool = False) -> Commit:
    """Decode a commit record, as `Commit.decode` does, and check that it is this shard's; errors as `read_commit`."""
    try:
        commit = Commit.decode(line, is_verified=is_verified)
    except ValueError as error:
        raise CorruptShardError(layout.root, shard, str(error)) from error
    expected = {"shard": shard, "plan_id": header.plan_id, "fingerprint_id": header.fingerprint_id}
    wrong = [
        f"{name} {getattr(commit, name)!r}, expected {value!r}"
        for name, value in expected.items()
        if getattr(commit, name) != value
    ]
    if wrong:
        found = f"the commit record belongs to another store or shard: {'; '.join(wrong)}"
        raise CorruptShardError(layout.root, shard, found)
    return commit


def root_digest(commits: Iterable[Commit]) -> str:
    """Compute the digest that seals a store: the sha256 over its commit records in order of shard."""
    digest = hashlib.sha256()
    for commit in sorted(commits, key=lambda commit: commit.shard):
        digest.update(commit.encode())
    return digest.hexdigest()


def check_sizes(root: Path, commit: Commit) -> None:
    """Check that the files of a shard exist and have their committed sizes.

    Raises:
        CorruptShardError: one is missing, or is longer or shorter.
    """
    for name, file in (commit.arrays | commit.files).items():
        try:
            size = os.stat(f"{root}/{name}").st_size  # noqa: PTH116 (a large store has 60,000: half a second less)
        except OSError as error:
            raise unreadable(root, commit.shard, name, error) from error
        if size != file.size_bytes:
            raise CorruptShardError(root, commit.shard, f"{name} has {size:,} bytes, expected {file.size_bytes:,}")


def unreadable(root: Path, shard: int, name: str, error: OSError) -> CorruptShardError:
    """Describe a committed file that cannot be read; if its bytes are lost, note the shard as damaged."""
    if isinstance(error, FileNotFoundError):
        return CorruptShardError(root, shard, f"{name} is missing")
    if error.errno in BYTES_LOST:
        note_damage(Layout(root), shard)
    return CorruptShardError(root, shard, f"{name} cannot be read ({error.strerror})")


def note_damage(layout: Layout, shard: int) -> None:
    """Record that a shard was found damaged, so that the next repair reads every byte of it; best effort."""
    path = layout.damaged / f"{shard:06d}"
    with contextlib.suppress(OSError):  # noted already, or the store is read-only
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            place(path, [b""])


def noted_damage(layout: Layout) -> set[int]:
    """List the shards that were found damaged since the last repair."""
    return {int(path.name) for path in layout.damaged.glob("[0-9]*")}
