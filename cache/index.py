"""The index: one row per stored utterance, with the place of its frames and its transcript.

Invariants: rows are sorted by `start`; `start` counts rows of the tall array, so `features[start:start + num_frames]`
is the utterance. Knows nothing of the arrays themselves.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from cache.commits import Commit, PlainFile, unreadable
from cache.errors import CorruptShardError

INDEX_SCHEMA = pa.schema(
    [
        pa.field("utterance_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),  # row of the tall array
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("duration_s", pa.float64(), nullable=False),
        pa.field("transcript", pa.string(), nullable=False),
        pa.field("speaker", pa.string()),
        pa.field("source", pa.string()),
        pa.field("extra", pa.string()),  # a JSON object with further values of the writer
    ]
)


class Quarantined(TypedDict):
    """A line of a quarantine file: an utterance that was not stored, and why."""

    utterance_id: str
    split: str
    shard: int
    reason: str
    detail: str


def encode_index(rows: list[dict[str, Any]]) -> bytes:
    """Encode index rows as Parquet, sorted by start."""
    return encode_table(pa.Table.from_pylist(sorted(rows, key=lambda row: int(row["start"])), schema=INDEX_SCHEMA))


def encode_table(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def decode_index(content: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(content), schema=INDEX_SCHEMA)


def read_index(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read an index file, or some of its columns."""
    with pa.memory_map(str(path)) as file:
        return pq.read_table(file, schema=INDEX_SCHEMA, columns=columns)


def encode_quarantine(lines: list[Quarantined]) -> bytes:
    """Encode quarantine lines, one JSON object each; an empty list gives an empty file."""
    return "".join(json.dumps(line, ensure_ascii=True) + "\n" for line in lines).encode()


def decode_quarantine(content: bytes) -> list[Quarantined]:
    return [json.loads(line) for line in content.splitlines()]


def read_committed(root: Path, commit: Commit, folder: str) -> bytes:
    """Read a shard's file in `folder` ("index" or "quarantine"), complete and checked.

    Raises:
        CorruptShardError: it is missing, unreadable or differs from the committed file.
    """
    (name,) = (name for name in commit.files if name.startswith(folder + "/"))
    try:
        content = (root / name).read_bytes()
    except OSError as error:
        raise unreadable(root, commit.shard, name, error) from error
    if PlainFile.of(content) != commit.files[name]:
        raise CorruptShardError(root, commit.shard, f"{name} is not the file that was committed (its digest differs)")
    return content
