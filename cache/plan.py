"""Plans: which utterance belongs to which shard and row, from lengths alone, before any audio is read.

A plan is an Arrow table. Given: `utterance_id`, `split`, `source_id` (opaque: where the utterance comes from),
`num_frames` (as planned from the duration) and any further columns; added: `shard`, `row` (inside it) and `reason`.
Invariants: the same table gives the same plan; a shard never mixes splits; an utterance never crosses a shard, nor a
block unless it is longer than one; a rejected row has shard -1 and a reason. Knows nothing of audio.
"""

from __future__ import annotations

import hashlib
import io
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cache.errors import PlanError
from cache.layout import ROWS_PER_SHARD, divide_shard

PLAN_COLUMNS = {"utterance_id": pa.string(), "split": pa.string(), "source_id": pa.string(), "num_frames": pa.int32()}
REQUIRED_COLUMNS = {*PLAN_COLUMNS, "shard", "row", "reason"}
MARGIN_FRAMES = 1  # a duration rounded to 1/100 s is off by at most one frame of 20 ms


def make_plan(table: pa.Table, *, rows_per_shard: int = ROWS_PER_SHARD, margin_frames: int = MARGIN_FRAMES) -> pa.Table:
    """Assign a shard and a row to every utterance.

    Shards follow the order of the table, so that each is read from few sources, nearly sequentially; inside a shard
    the rows are assigned by length. About half a percent of the rows stays empty.

    Args:
        table: the columns of `PLAN_COLUMNS`, and optionally `reason` (not empty: rejected by the caller) and others,
            which are kept.
        margin_frames: rows kept free after each utterance, since its real length may exceed the planned one.

    Returns:
        The table with `shard` int32, `row` int32 and `reason` string, sorted by shard. Rejected: "longer_than_shard",
        "no_frames", "duplicate_id" (all but the first), or the caller's reason.

    Raises:
        PlanError: a column is missing or has nulls, or the shard size is not positive.
    """
    if rows_per_shard < 1:
        raise PlanError(f"rows_per_shard is {rows_per_shard}; a shard needs at least one row.")
    if missing := [name for name in PLAN_COLUMNS if name not in table.column_names]:
        raise PlanError(f"the plan has no column {', '.join(missing)}; it needs {', '.join(PLAN_COLUMNS)}.")
    for name, kind in PLAN_COLUMNS.items():
        if table[name].null_count:
            raise PlanError(f"column {name!r} of the plan has {table[name].null_count} nulls; fill them first.")
        table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
    reason = _find_reasons(table, rows_per_shard)
    shard = np.full(len(table), -1, dtype=np.int32)
    row = np.full(len(table), -1, dtype=np.int32)
    lengths = table["num_frames"].to_numpy().astype(np.int64)
    needed = np.minimum(lengths + margin_frames, rows_per_shard)
    accepted = reason == ""
    splits = table["split"].combine_chunks().dictionary_encode()
    codes, first = splits.indices.to_numpy(), 0
    for code in range(len(splits.dictionary)):
        chosen = np.flatnonzero(accepted & (codes == code))
        shard[chosen], row[chosen], used = _pack(needed[chosen], rows_per_shard)
        shard[chosen] += first
        first += used
    for name, column in ("shard", pa.array(shard)), ("row", pa.array(row)), ("reason", pa.array(reason, pa.string())):
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, column)
    return table.take(np.argsort(shard, kind="stable")).combine_chunks()


def _find_reasons(table: pa.Table, rows_per_shard: int) -> NDArray[np.object_]:
    """Name why each utterance is rejected; empty if it is accepted."""
    lengths = table["num_frames"].to_numpy()
    reason = np.full(len(table), "", dtype=object)
    reason[lengths < 1] = "no_frames"
    reason[lengths > rows_per_shard] = "longer_than_shard"
    codes = table["utterance_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    is_repeated = np.ones(len(table), dtype=bool)
    is_repeated[np.unique(codes, return_index=True)[1]] = False
    reason[is_repeated] = "duplicate_id"
    if "reason" in table.column_names:
        given = np.array(pc.fill_null(table["reason"], "").to_pylist(), dtype=object)
        reason = np.where(given != "", given, reason)
    return reason


def _pack(needed: NDArray[np.int64], rows_per_shard: int) -> tuple[NDArray[np.int32], NDArray[np.int32], int]:
    """Fill one shard after another; within a shard, the longest utterance goes first, into the first block it fits.

    Thus a block holds utterances of similar length, with which `cache.order` needs little padding and few blocks in
    memory. Returns shard and row of each length, and the number of shards.
    """
    block_rows = divide_shard(rows_per_shard)[1]
    lengths: list[int] = needed.tolist()
    shards, rows = [0] * len(lengths), [0] * len(lengths)
    queue, shard = deque(range(len(lengths))), 0
    held: set[int] = set()
    while queue:
        chosen = [queue.popleft()]
        total = lengths[chosen[0]]
        while queue and total + lengths[queue[0]] <= rows_per_shard:
            chosen.append(queue.popleft())
            total += lengths[chosen[-1]]
        free = [block_rows] * (rows_per_shard // block_rows)
        left = []
        for index in sorted(chosen, key=lambda index: (index not in held, -lengths[index])):
            row = _fit(free, lengths[index], block_rows)
            if row is None:
                left.append(index)
            else:
                shards[index], rows[index] = shard, row
        held = set(left)  # they come first in the next shard
        queue.extendleft(sorted(left, reverse=True))
        shard += 1
    return np.array(shards, dtype=np.int32), np.array(rows, dtype=np.int32), shard


def _fit(free: list[int], length: int, block_rows: int) -> int | None:
    """Take `length` rows of the first block (or run of empty blocks) that has them free; None if there is none."""
    if length <= block_rows:
        for block, rows in enumerate(free):
            if length <= rows:
                free[block] = rows - length
                return (block + 1) * block_rows - rows
        return None
    blocks = -(-length // block_rows)
    for first in range(len(free) - blocks + 1):
        if all(rows == block_rows for rows in free[first : first + blocks]):
            free[first : first + blocks] = [0] * (blocks - 1) + [blocks * block_rows - length]
            return first * block_rows
    return None


def plan_digest(table: pa.Table) -> str:
    """Compute the id of a plan: the sha256 of its content, independent of the Parquet writer.

    Columns in order of name; of each its name, then strings as little-endian uint32 lengths and UTF-8 bytes, numbers as
    little-endian values with nulls as zero.
    """
    digest = hashlib.sha256()
    for name in sorted(table.column_names):
        digest.update(name.encode() + b"\0")
        for buffer in _content(table[name]):
            digest.update(buffer)
    return digest.hexdigest()


def _content(column: pa.ChunkedArray) -> list[bytes | memoryview]:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        chunks = pc.fill_null(column.cast(pa.large_string()), "").chunks
        joined = pa.concat_arrays(chunks or [pa.array([], pa.large_string())])
        lengths = pc.binary_length(joined).to_numpy(zero_copy_only=False).astype("<u4")
        offsets, data = joined.buffers()[1:]
        bounds = np.frombuffer(offsets, dtype="<i8")[joined.offset : joined.offset + len(joined) + 1]
        text = memoryview(data)[int(bounds[0]) : int(bounds[-1])] if data is not None and len(joined) else b""
        return [lengths.tobytes(), text]
    values: NDArray[Any] = pc.fill_null(column, pa.scalar(0, column.type)).to_numpy()
    return [values.astype(values.dtype.newbyteorder("<")).tobytes()]


def encode_plan(table: pa.Table) -> bytes:
    """Encode a plan as Parquet, with row groups small enough that one shard's rows are found quickly."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=65_536)
    return sink.getvalue()


def read_plan(path: Path, shard: int | None = None) -> pa.Table:
    """Read a plan, or one shard's part of it, in plan order."""
    return pq.read_table(path, filters=None if shard is None else [("shard", "=", shard)])
