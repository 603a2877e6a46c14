"""What a store is before its first shard: header, Zarr metadata, plan, calibration and empty folders.

Invariants: a skeleton appears whole or not at all; it is a function of what was asked for, so a damaged one can be made
again beside its shards without touching them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from cache.commits import committed_shards, read_commit
from cache.errors import CorruptShardError, PlanError, StoreMismatchError, StoreNotFoundError
from cache.files import sync_directory, temporary_of
from cache.index import Quarantined, encode_quarantine
from cache.layout import FORMAT_VERSION, Encoding, Header, Layout, divide_shard, read_header, zarr_metadata
from cache.owners import Owner
from cache.plan import REQUIRED_COLUMNS, plan_digest, read_plan, write_plan
from cache.quantize import Calibration
from cache.shards import CRC_BYTES, crc32c

FOLDERS = ("index", "quarantine", "commits", "claims")
METADATA_FIELDS = (
    "zarr_format",
    "node_type",
    "shape",
    "data_type",
    "chunk_grid",
    "chunk_key_encoding",
    "fill_value",
    "codecs",
    "attributes",
)


def describe(
    plan: pa.Table,
    dim: int,
    fingerprint: Mapping[str, Any],
    encoding: Encoding,
    rows_per_shard: int,
    calibration: Calibration | None,
) -> Header:
    """Write the header of the store that is asked for.

    Raises:
        PlanError: the plan was not made by `make_plan` for this shard size.
        ValueError: encoding, calibration and dim do not fit together.
    """
    if encoding not in get_args(Encoding):
        raise ValueError(f"encoding {encoding!r} is unknown; choose one of {', '.join(get_args(Encoding))}.")
    if (calibration is not None) != (encoding == "int8"):
        raise ValueError(f"encoding {encoding!r} {'needs a' if encoding == 'int8' else 'takes no'} calibration.")
    if calibration is not None and calibration.mean.shape != (dim,):
        raise ValueError(f"the calibration has {calibration.mean.shape[0]} dimensions, the features {dim}.")
    chunk_rows, block_rows = divide_shard(rows_per_shard)
    calibration_id = None if calibration is None else calibration.id
    store = {"format": FORMAT_VERSION, "encoding": encoding, "calibration_id": calibration_id, "dim": dim}
    return Header(
        format=FORMAT_VERSION,
        dim=dim,
        encoding=encoding,
        rows_per_shard=rows_per_shard,
        chunk_rows=chunk_rows,
        block_rows=block_rows,
        num_shards=_num_shards(plan, rows_per_shard),
        num_planned=len(plan),
        plan_id=plan_digest(plan),
        calibration_id=calibration_id,
        calibration=None if calibration is None else calibration.to_base64(),
        fingerprint={**fingerprint, "store": store},
    )


def _num_shards(plan: pa.Table, rows_per_shard: int) -> int:
    if missing := REQUIRED_COLUMNS - set(plan.column_names):
        raise PlanError(f"the plan has no column {', '.join(sorted(missing))}; make it with make_plan.")
    shards, rows = plan["shard"].to_numpy(), plan["row"].to_numpy()
    ends = rows.astype(np.int64) + plan["num_frames"].to_numpy()
    if len(plan) and int(np.where(shards >= 0, ends, 0).max()) > rows_per_shard:
        raise PlanError(
            f"the plan places frames beyond row {rows_per_shard:,} of a shard; make it again with "
            f"make_plan(..., rows_per_shard={rows_per_shard})."
        )
    return int(shards.max(initial=-1)) + 1


def require(root: Path, found: Header, asked: Header) -> None:
    """Refuse a store that is not the one asked for.

    Raises:
        StoreMismatchError: naming the fields that differ.
    """
    names = "format", "dim", "encoding", "rows_per_shard", "num_planned", "plan_id", "calibration_id", "fingerprint"
    ours, theirs = ({name: getattr(each, name) for name in names} for each in (found, asked))
    if differences := compare_fields(ours, theirs):
        raise StoreMismatchError(root, differences)


def compare_fields(found: Any, asked: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Compare two JSON values field by field.

    Returns:
        Dotted field name -> (found, asked), for the fields that differ; None stands for an absent one.
    """
    if isinstance(found, Mapping) and isinstance(asked, Mapping):
        differences: dict[str, tuple[Any, Any]] = {}
        for key in sorted(found.keys() | asked.keys()):
            differences |= compare_fields(found.get(key), asked.get(key), f"{name}.{key}" if name else key)
        return differences
    return {} if found == asked else {name: (found, asked)}


# ------------------------------------------------------------------------------------------- on the disk


def build(root: Path, header: Header, plan: pa.Table, calibration: Calibration | None) -> None:
    """Make a whole empty store; if another process was faster, leave its."""
    with _beside(root, header, plan, calibration) as skeleton:
        try:
            skeleton.rename(root)
        except OSError:
            if not (root / "zarr.json").exists():
                raise
        sync_directory(root.parent)


def mend(root: Path, header: Header, plan: pa.Table, calibration: Calibration | None) -> list[str]:
    """Replace what is damaged of the skeleton of an existing store; its shards are not touched.

    Returns:
        The names of the files that were replaced.

    Raises:
        StoreMismatchError: the store there holds something else than what is asked for.
        StoreNotFoundError: what is there is not a store.
    """
    try:
        require(root, read_header(root), header)
    except (StoreNotFoundError, CorruptShardError):
        _recognise(root, header)
    replaced = []
    with _beside(root, header, plan, calibration) as skeleton:
        for path in sorted(path for path in skeleton.rglob("*") if path.is_file()):
            name = path.relative_to(skeleton).as_posix()
            target = root / name
            if not is_sound(target, path, header):
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
                sync_directory(target.parent)
                replaced.append(name)
        for folder in FOLDERS:
            (root / folder).mkdir(exist_ok=True)
    return replaced


def _recognise(root: Path, header: Header) -> None:
    """Make sure that a folder without a header is this store's, by its commit records."""
    layout = Layout(root)
    if not layout.plan.exists() or not (root / "commits").is_dir():
        raise StoreNotFoundError(
            f"{str(root)!r} holds something else than a feature store. Name a new folder with --store."
        )
    for shard in committed_shards(layout)[:1]:
        read_commit(layout, header, shard)


def is_sound(path: Path, model: Path, header: Header) -> bool:
    """Say whether a file of a skeleton means the same as its model."""
    try:
        if path.name == "plan.parquet":
            return plan_digest(read_plan(path)) == header.plan_id
        if path.name == "zarr.json":
            return _means(path, model.read_bytes())
        return path.read_bytes() == model.read_bytes()
    except (OSError, ValueError, pa.ArrowException):
        return False


def metadata_faults(root: Path, header: Header) -> list[str]:
    """Name the Zarr metadata files that do not say what the header says."""
    return [name for name, expected in zarr_metadata(header).items() if not _means(root / name, expected)]


def _means(path: Path, expected: bytes) -> bool:
    """Say whether a `zarr.json` agrees with another in all that matters, whichever zarr wrote them."""
    try:
        found, wanted = json.loads(path.read_text()), json.loads(expected)
        return all(found.get(field) == wanted.get(field) for field in METADATA_FIELDS)
    except (OSError, ValueError, AttributeError):
        return False


def encode_rejected(plan: pa.Table) -> bytes:
    """Write the quarantine of what the plan refused."""
    rows = plan.filter(pa.array(plan["shard"].to_numpy() < 0))
    lines = rows.select(["utterance_id", "split", "reason", "num_frames"]).to_pylist()
    return encode_quarantine(
        [
            Quarantined(
                utterance_id=line["utterance_id"],
                split=line["split"],
                shard=-1,
                reason=line["reason"],
                detail=f"planned at {line['num_frames']} frames",
            )
            for line in lines
        ]
    )


def encode_calibration(calibration: Calibration) -> bytes:
    """Lay out the one chunk of the calibration array."""
    content = calibration.array.tobytes()
    return content + crc32c(content).to_bytes(CRC_BYTES, "little")


@contextmanager
def _beside(root: Path, header: Header, plan: pa.Table, calibration: Calibration | None) -> Iterator[Path]:
    """Make a skeleton next to its place, flushed to the disk, and clear away what is left of it afterwards."""
    skeleton = temporary_of(root, Owner.me())
    skeleton.mkdir(parents=True)
    try:
        layout = Layout(skeleton)
        for name, document in zarr_metadata(header).items():
            (skeleton / name).parent.mkdir(exist_ok=True)
            (skeleton / name).write_bytes(document)
        if calibration is not None:
            layout.calibration.write_bytes(encode_calibration(calibration))
        for folder in FOLDERS:
            (skeleton / folder).mkdir()
        write_plan(plan, layout.plan)
        layout.rejected.write_bytes(encode_rejected(plan))
        for path in (*skeleton.rglob("*"), skeleton):
            _sync(path)
        yield skeleton
    finally:
        shutil.rmtree(skeleton, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
