"""Creating an empty store, and repairing the parts of a store that belong to no shard: header, Zarr metadata, plan.

Invariants: a new store appears complete or not at all. Everything written here follows from the arguments of
`FeatureStore.create`, so damaged parts can be written again without touching a shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from cache.commits import committed_shards, read_commit
from cache.errors import CorruptShardError, PlanError, StoreMismatchError, StoreNotFoundError
from cache.files import sync, temporary_of, write_temporary
from cache.index import Quarantined, encode_quarantine
from cache.layout import FORMAT_VERSION, Encoding, Header, Layout, divide_shard, read_header, zarr_metadata
from cache.owners import Owner
from cache.plan import REQUIRED_COLUMNS, encode_plan, plan_digest, read_plan
from cache.quantize import Calibration

FOLDERS = ("index", "quarantine", "commits", "claims")
# The fields of a `zarr.json` that decide how an array is read; zarr versions differ in the others.
METADATA_FIELDS = ["zarr_format", "node_type", "attributes", "shape", "data_type", "fill_value"]
METADATA_FIELDS += ["chunk_grid", "chunk_key_encoding", "codecs"]


def make_header(
    plan: pa.Table,
    dim: int,
    fingerprint: Mapping[str, Any],
    encoding: Encoding,
    rows_per_shard: int,
    calibration: Calibration | None,
) -> Header:
    """Make the header of a new store.

    Raises:
        PlanError: the plan was not made by `make_plan` for this shard size.
        ValueError: encoding, calibration and dim do not fit together.
    """
    if encoding not in get_args(Encoding):
        raise ValueError(f"encoding {encoding!r} is unknown; choose one of {', '.join(get_args(Encoding))}.")
    if (calibration is not None) == (encoding == "float16"):
        raise ValueError(f"encoding {encoding!r} {'takes no' if encoding == 'float16' else 'needs a'} calibration.")
    if calibration is not None and calibration.mean.shape != (dim,):
        raise ValueError(f"the calibration has {calibration.mean.shape[0]} dimensions, the features {dim}.")
    if missing := REQUIRED_COLUMNS - set(plan.column_names):
        raise PlanError(f"the plan has no column {', '.join(sorted(missing))}; make it with make_plan.")
    shards, rows = plan["shard"].to_numpy(), plan["row"].to_numpy()
    ends = rows.astype(np.int64) + plan["num_frames"].to_numpy()
    if len(plan) and int(np.where(shards >= 0, ends, 0).max()) > rows_per_shard:
        raise PlanError(
            f"the plan places frames beyond row {rows_per_shard:,} of a shard; make it again with "
            f"make_plan(..., rows_per_shard={rows_per_shard})."
        )
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
        num_shards=int(shards.max(initial=-1)) + 1,
        num_planned=len(plan),
        plan_id=plan_digest(plan),
        calibration_id=calibration_id,
        calibration=None if calibration is None else calibration.to_base64(),
        fingerprint={**fingerprint, "store": store},
    )


def require_same(root: Path, found: Header, requested: Header) -> None:
    """Refuse a store that is not the requested one with a StoreMismatchError that names the fields that differ."""
    if differences := compare_fields(found.identity(), requested.identity()):
        raise StoreMismatchError(root, differences)


def compare_fields(found: Any, requested: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Compare two JSON values: dotted field name -> (found, requested) where they differ; None for an absent field."""
    if isinstance(found, Mapping) and isinstance(requested, Mapping):
        differences: dict[str, tuple[Any, Any]] = {}
        for key in sorted(found.keys() | requested.keys()):
            differences |= compare_fields(found.get(key), requested.get(key), f"{name}.{key}" if name else key)
        return differences
    return {} if found == requested else {name: (found, requested)}


def create_empty(root: Path, header: Header, plan: pa.Table) -> None:
    """Create an empty store in a temporary folder and rename it; if another process was faster, keep its store."""
    temporary = temporary_of(root, Owner.me())
    temporary.mkdir(parents=True)
    try:
        for folder in (*FOLDERS, *header.arrays):
            (temporary / folder).mkdir()
        for name, content in _documents(header, plan).items():
            (temporary / name).write_bytes(content)
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        try:
            temporary.rename(root)
        except OSError:
            if not (root / "zarr.json").exists():
                raise
        sync(root.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def repair_metadata(root: Path, header: Header, plan: pa.Table) -> list[str]:
    """Write damaged headers, Zarr metadata and plans of an existing store again, and return their names.

    Raises:
        StoreMismatchError: the store holds something other than what is requested.
        StoreNotFoundError: the folder is not a store.
        CorruptShardError: the header is damaged, and the commit records are those of another store.
    """
    layout = Layout(root)
    try:
        require_same(root, read_header(root), header)
    except (StoreNotFoundError, CorruptShardError):
        if not layout.plan.exists() or not layout.commit(0).parent.is_dir():
            found = f"{str(root)!r} holds something else than a feature store"
            raise StoreNotFoundError(f"{found}. Pass a new folder with --store.") from None
        for shard in committed_shards(layout)[:1]:
            read_commit(layout, header, shard)
    except StoreMismatchError:
        if not _is_only_the_header_damaged(layout, header):
            raise
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)
    damaged = metadata_faults(root, header)
    if damaged:
        documents = _documents(header, plan)
        for name in [*damaged, *(["quarantine/plan.jsonl"] if "plan.parquet" in damaged else [])]:
            path = root / name
            path.parent.mkdir(exist_ok=True)
            write_temporary(path, [documents[name]], Owner.me()).replace(path)
            sync(path.parent)
    return list(damaged)


def _is_only_the_header_damaged(layout: Layout, header: Header) -> bool:
    """Check whether a store whose header differs has the arrays and the first commit record of the requested store."""
    try:
        shards = committed_shards(layout)[:1]
        records = [read_commit(layout, header, shard) for shard in shards]
    except CorruptShardError:
        return False
    return bool(records) and not metadata_faults(layout.root, header).keys() - {"zarr.json"}


def metadata_faults(root: Path, header: Header) -> dict[str, str]:
    """Find damaged files that belong to no shard and no seal: name inside the store -> what is wrong with it."""
    layout = Layout(root)
    faults = {
        name: "it does not describe this store"
        for name, expected in zarr_metadata(header).items()
        if not _is_equivalent(root / name, expected)
    }
    try:
        plan = read_plan(layout.plan)
        digest = plan_digest(plan)
    except (OSError, ValueError, pa.ArrowException) as error:
        return faults | {"plan.parquet": f"it is unreadable ({error})"}
    if digest != header.plan_id:
        faults["plan.parquet"] = f"it is plan {digest[:12]}, expected plan {header.plan_id[:12]}"
    elif len(plan) != header.num_planned:
        faults["zarr.json"] = f"num_planned is {header.num_planned:,}, the plan has {len(plan):,} rows"
    elif not layout.rejected.exists() or layout.rejected.read_bytes() != _encode_rejected(plan):
        faults["quarantine/plan.jsonl"] = "it does not list what the plan rejected"
    return faults


def _is_equivalent(path: Path, expected: bytes) -> bool:
    """Check whether a `zarr.json` agrees with another in all fields that matter."""
    try:
        found, wanted = json.loads(path.read_text()), json.loads(expected)
        return all(found.get(field) == wanted.get(field) for field in METADATA_FIELDS)
    except (OSError, ValueError, AttributeError):
        return False


def _documents(header: Header, plan: pa.Table) -> dict[str, bytes]:
    """Encode all files of an empty store, by their names inside it."""
    return {**zarr_metadata(header), "plan.parquet": encode_plan(plan), "quarantine/plan.jsonl": _encode_rejected(plan)}


def _encode_rejected(plan: pa.Table) -> bytes:
    """Encode the quarantine of the utterances that the plan rejected."""
    rows = plan.filter(pa.array(plan["shard"].to_numpy() < 0))
    return encode_quarantine(
        [
            Quarantined(
                utterance_id=row["utterance_id"],
                split=row["split"],
                shard=-1,
                reason=row["reason"],
                detail=f"planned at {row['num_frames']} frames",
            )
            for row in rows.select(["utterance_id", "split", "reason", "num_frames"]).to_pylist()
        ]
    )
