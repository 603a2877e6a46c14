"""Where everything of a store lives, and the header that says what it holds. See FORMAT.md.

Invariants: `zarr.json` of the root carries the header and never changes after creation. Row `r` of the tall array lives
in shard `r // rows_per_shard`. Knows nothing of writers and readers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from cache.errors import CorruptShardError, StoreMismatchError, StoreNotFoundError
from cache.files import canonical_json

FORMAT_VERSION = 1
ROWS_PER_SHARD = 131_072  # 43.7 min at 50 Hz; 256 MiB at 1024 x float16
CHUNK_ROWS = 512  # 1 MiB at 1024 x float16: the unit that carries a checksum
BLOCK_ROWS = 16_384  # 32 MiB at 1024 x float16: the unit that is read at once; no shorter utterance crosses one

Encoding = Literal["float16", "int8"]
ENCODINGS: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "int8": np.dtype("i1")}
FILL: dict[str, float] = {"float16": float("nan"), "int8": -128}  # codes use -127..127


@dataclass(frozen=True, kw_only=True)
class Header:
    """What one store holds; written once, at creation, into the attributes of the root group."""

    format: int
    dim: int
    encoding: Encoding
    rows_per_shard: int
    chunk_rows: int
    block_rows: int
    num_shards: int
    num_planned: int  # utterances in the plan, the rejected ones included
    plan_id: str  # sha256 of the plan's content
    calibration_id: str | None  # int8 only
    fingerprint: dict[str, Any]  # everything needed to recompute a row
    calibration: str | None = None  # int8 only: the calibration array again, in base64, to mend the file from

    @cached_property
    def fingerprint_id(self) -> str:
        """The sha256 of the fingerprint's canonical JSON, in hex."""
        return hashlib.sha256(canonical_json(self.fingerprint)).hexdigest()

    @property
    def dtype(self) -> np.dtype[Any]:
        return ENCODINGS[self.encoding]

    @property
    def arrays(self) -> tuple[str, ...]:
        """The sharded arrays of the store, in the order in which they are placed."""
        return ("features", "scales") if self.encoding == "int8" else ("features",)

    @property
    def bytes_per_row(self) -> int:
        return self.dim * self.dtype.itemsize + (2 if self.encoding == "int8" else 0)

    def to_attributes(self) -> dict[str, Any]:
        attributes = asdict(self) | {"fingerprint_id": self.fingerprint_id}
        if self.calibration is None:
            del attributes["calibration"]
        return {"feature_store": attributes}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> Self:
        header = attributes["feature_store"]
        return cls(**{field.name: header[field.name] for field in fields(cls) if field.name in header})

    def identity(self) -> dict[str, Any]:
        """What the store holds, without the copy of the calibration, which its id stands for."""
        attributes: dict[str, Any] = self.to_attributes()["feature_store"]
        return {name: value for name, value in attributes.items() if name != "calibration"}


def divide_shard(rows_per_shard: int) -> tuple[int, int]:
    """Choose chunk and block for a shard: the largest divisors up to 512 and 16,384 rows.

    Returns:
        (chunk_rows, block_rows); a chunk divides a block divides a shard.
    """
    chunk = max(n for n in range(1, min(CHUNK_ROWS, rows_per_shard) + 1) if rows_per_shard % n == 0)
    chunks = rows_per_shard // chunk
    return chunk, chunk * max(n for n in range(1, max(1, BLOCK_ROWS // chunk) + 1) if chunks % n == 0)


@dataclass(frozen=True)
class Layout:
    """The paths of one store."""

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "plan.parquet"

    @property
    def rejected(self) -> Path:
        """The quarantine of what the plan itself refused."""
        return self.root / "quarantine" / "plan.jsonl"

    @property
    def sealed(self) -> Path:
        return self.root / "SEALED.json"

    @property
    def sealed_index(self) -> Path:
        return self.root / "index.parquet"

    @property
    def sealed_commits(self) -> Path:
        return self.root / "commits.jsonl"

    @property
    def calibration(self) -> Path:
        return self.root / "calibration" / "c.0.0"

    @property
    def lock(self) -> Path:
        return self.root / "claims" / "lock"

    @property
    def damaged(self) -> Path:
        """Notes of shards that were found damaged, one empty file each."""
        return self.root / "damaged"

    def array(self, name: str, shard: int) -> Path:
        return self.root / name / (f"c.{shard}.0" if name == "features" else f"c.{shard}")

    def index(self, shard: int) -> Path:
        return self.root / "index" / f"{shard:06d}.parquet"

    def quarantine(self, shard: int) -> Path:
        return self.root / "quarantine" / f"{shard:06d}.jsonl"

    def commit(self, shard: int) -> Path:
        return self.root / "commits" / f"{shard:06d}.json"

    def claim(self, shard: int) -> Path:
        return self.root / "claims" / f"{shard:06d}"

    def files_of(self, shard: int, header: Header) -> dict[str, Path]:
        """The files of a shard by their name inside the store, in the order in which they are placed."""
        paths = [*(self.array(name, shard) for name in header.arrays), self.index(shard), self.quarantine(shard)]
        return {path.relative_to(self.root).as_posix(): path for path in paths}


def read_header(root: Path) -> Header:
    """Read what a store holds.

    Raises:
        StoreNotFoundError: there is no store here.
        StoreMismatchError: there is one of a newer format.
        CorruptShardError: the header does not agree with itself.
    """
    try:
        document = json.loads((root / "zarr.json").read_text())
        header = Header.from_attributes(document["attributes"])
    except (FileNotFoundError, NotADirectoryError):
        found = "holds no feature store" if root.exists() else "does not exist"
        raise StoreNotFoundError(
            f"{str(root)!r} {found}. Make one with `tinyaudio extract --store {root}`, "
            "or name an existing one with --store."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise StoreNotFoundError(
            f"{str(root / 'zarr.json')!r} is not the header of a feature store "
            f"({type(error).__name__}: {error}). Name another folder with --store."
        ) from error
    if header.format > FORMAT_VERSION:
        raise StoreMismatchError(root, {"format": (header.format, FORMAT_VERSION)})
    if document["attributes"]["feature_store"].get("fingerprint_id") != header.fingerprint_id:
        raise CorruptShardError(root, None, "the fingerprint in zarr.json does not match its own id")
    return header


def zarr_metadata(header: Header) -> dict[str, bytes]:
    """Write the `zarr.json` documents of a store, by their names inside it."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": header.to_attributes()}
    return {
        "zarr.json": json.dumps(group, indent=2).encode(),
        **_array_metadata(
            header.arrays, header.dim, header.encoding, header.rows_per_shard, header.chunk_rows, header.num_shards
        ),
    }


@cache
def _array_metadata(
    names: tuple[str, ...], dim: int, encoding: Encoding, rows_per_shard: int, chunk_rows: int, num_shards: int
) -> dict[str, bytes]:
    """Let zarr itself describe the arrays, so that what results is plain Zarr."""
    memory: dict[str, Buffer] = {}
    group = zarr.create_group(store=MemoryStore(memory))
    naming = {"name": "default", "separator": "."}  # no folder for every shard
    for name in names:
        width = (dim,) if name == "features" else ()
        dtype = ENCODINGS[encoding] if name == "features" else np.dtype("<f2")
        group.create_array(
            name,
            shape=(num_shards * rows_per_shard, *width),
            dtype=dtype,
            shards=(rows_per_shard, *width),
            chunks=(chunk_rows, *width),
            compressors=[Crc32cCodec()],
            serializer=BytesCodec(endian="little" if dtype.itemsize > 1 else None),
            fill_value=FILL[encoding] if name == "features" else float("nan"),
            chunk_key_encoding=naming,
            dimension_names=("row", "dim")[: 1 + len(width)],
        )
    if encoding == "int8":
        group.create_array(
            "calibration",
            shape=(2, dim),
            dtype="<f4",
            chunks=(2, dim),
            compressors=[Crc32cCodec()],
            serializer=BytesCodec(endian="little"),
            chunk_key_encoding=naming,
            dimension_names=("mean_or_std", "dim"),
        )
    return {f"{name}/zarr.json": memory[f"{name}/zarr.json"].to_bytes() for name, _ in group.members()}
