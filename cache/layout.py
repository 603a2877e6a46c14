"""The paths inside a store, and the header that describes what it holds. See FORMAT.md.

Invariants: `zarr.json` of the root carries the header and never changes after creation. Row `r` of the tall array lies
in shard `r // rows_per_shard`. Knows nothing of writers and readers.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from cache.errors import CorruptShardError, StoreMismatchError, StoreNotFoundError
from cache.files import canonical_json
from cache.quantize import Calibration, packed_bytes

FORMAT_VERSION = 1
ROWS_PER_SHARD = 131_072  # 43.7 min at 50 Hz; 256 MiB at 1024 x float16
CHUNK_ROWS = 512  # 1 MiB at 1024 x float16: the unit that carries a checksum
BLOCK_ROWS = 16_384  # 32 MiB at 1024 x float16: the unit that is read at once; no shorter utterance crosses one

Encoding = Literal["float16", "int8", "int7", "int6", "int5", "int4", "int3", "int2"]


@dataclass(frozen=True)
class ArraySpec:
    """The type of one sharded array of a store."""

    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]  # (dim,) or (bytes of packed codes,) for features, () for scales
    fill_value: float  # of rows that belong to no utterance
    axes: tuple[str, ...] = ("row", "dim")

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize


def bits_of(encoding: Encoding) -> int | None:
    """Return the bits of a quantised encoding's codes; None for float16."""
    return None if encoding == "float16" else int(encoding.removeprefix("int"))


def arrays_of(encoding: Encoding, dim: int) -> dict[str, ArraySpec]:
    """Name the sharded arrays of an encoding, in the order in which their files are put in place."""
    bits = bits_of(encoding)
    if bits is None:
        return {"features": ArraySpec(np.dtype("<f2"), (dim,), float("nan"))}
    if bits == 8:
        features = ArraySpec(np.dtype("i1"), (dim,), -128)  # codes use -127..127
    else:
        features = ArraySpec(np.dtype("u1"), (packed_bytes(dim, bits),), 0, ("row", "byte"))  # the scale says: unused
    return {"features": features, "scales": ArraySpec(np.dtype("<f2"), (), float("nan"), ("row",))}


def bytes_per_row(encoding: Encoding, dim: int) -> int:
    """Compute the bytes of one frame in a store, without checksums."""
    return sum(spec.row_bytes for spec in arrays_of(encoding, dim).values())


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
    num_planned: int  # utterances in the plan, including rejected ones
    plan_id: str  # sha256 of the plan's content
    calibration_id: str | None  # null for float16
    fingerprint: dict[str, Any]  # everything needed to recompute a row
    calibration: str | None = None  # absent for float16: mean and std, see `Calibration.to_base64`

    @cached_property
    def fingerprint_id(self) -> str:
        """The sha256 of the fingerprint's canonical JSON, in hex."""
        return hashlib.sha256(canonical_json(self.fingerprint)).hexdigest()

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """The sharded arrays of the store by name, in the order in which their files are put in place."""
        return arrays_of(self.encoding, self.dim)

    @property
    def bits(self) -> int | None:
        """Bits of a code; None for float16."""
        return bits_of(self.encoding)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.arrays["features"].dtype

    @property
    def bytes_per_row(self) -> int:
        return bytes_per_row(self.encoding, self.dim)

    def chunk_bytes(self, array: str, rows: int | None = None) -> int:
        """Compute the bytes of one chunk of an array, or of some rows of it."""
        return (rows or self.chunk_rows) * self.arrays[array].row_bytes

    def identity(self) -> dict[str, Any]:
        """Return what the store holds, field by field; the calibration is represented by its id."""
        return {name: value for name, value in asdict(self).items() if name != "calibration"}


def divide_shard(rows_per_shard: int) -> tuple[int, int]:
    """Choose (chunk_rows, block_rows): the largest up to 512 and 16,384; a chunk divides a block divides a shard."""
    chunk = max(n for n in range(1, min(CHUNK_ROWS, rows_per_shard) + 1) if rows_per_shard % n == 0)
    chunks = rows_per_shard // chunk
    return chunk, chunk * max(n for n in range(1, max(1, BLOCK_ROWS // chunk) + 1) if chunks % n == 0)


class Layout:
    """The paths of one store."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.plan = root / "plan.parquet"
        self.rejected = root / "quarantine" / "plan.jsonl"  # the utterances that the plan itself rejected
        self.sealed = root / "SEALED.json"
        self.sealed_index = root / "index.parquet"
        self.sealed_commits = root / "commits.jsonl"
        self.lock = root / "claims" / "lock"
        self.damaged = root / "damaged"  # one empty file for each shard that was found damaged

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
        """List the files of a shard by their name inside the store, in the order in which they are put in place."""
        paths = [*(self.array(name, shard) for name in header.arrays), self.index(shard), self.quarantine(shard)]
        return {path.relative_to(self.root).as_posix(): path for path in paths}


def read_header(root: Path) -> Header:
    """Read the header of a store.

    Raises:
        StoreNotFoundError: there is no store here.
        StoreMismatchError: the store has a newer format, or an encoding that is not known here.
        CorruptShardError: the header contradicts itself.
    """
    try:
        attributes = json.loads((root / "zarr.json").read_text())["attributes"]["feature_store"]
        header = Header(**{field.name: attributes[field.name] for field in fields(Header) if field.name in attributes})
        if header.format > FORMAT_VERSION:
            raise StoreMismatchError(root, {"format": (header.format, FORMAT_VERSION)})
        if attributes["fingerprint_id"] != header.fingerprint_id:
            raise CorruptShardError(root, None, "the fingerprint in zarr.json does not match its own id")
        for name in ("format", "encoding", "dim", "calibration_id"):
            if getattr(header, name) != (expected := header.fingerprint["store"][name]):
                found = f"{name} in zarr.json is {getattr(header, name)!r}, expected {expected!r} as in its fingerprint"
                raise CorruptShardError(root, None, found)
        if header.encoding not in get_args(Encoding):
            raise StoreMismatchError(root, {"encoding": (header.encoding, f"one of {', '.join(get_args(Encoding))}")})
        if header.rows_per_shard % header.block_rows or header.block_rows % header.chunk_rows:
            found = "rows_per_shard, block_rows and chunk_rows in zarr.json are not multiples of each other"
            raise CorruptShardError(root, None, found)
        if header.calibration_id is not None and _calibration_id(header) != header.calibration_id:
            raise CorruptShardError(root, None, "the calibration in zarr.json does not match its own id")
    except (FileNotFoundError, NotADirectoryError):
        found = "is not a feature store" if root.exists() else "does not exist"
        raise StoreNotFoundError(
            f"{str(root)!r} {found}. Make one with `tinyaudio extract --store {root}`, or name an existing store."
        ) from None
    except (StoreMismatchError, CorruptShardError):
        raise
    except (ValueError, KeyError, TypeError, ArithmeticError) as error:
        raise StoreNotFoundError(
            f"{str(root / 'zarr.json')!r} is not the header of a feature store "
            f"({type(error).__name__}: {error}). Pass another folder with --store."
        ) from error
    return header


def _calibration_id(header: Header) -> str | None:
    try:
        return Calibration.from_base64(header.calibration or "", header.dim).id
    except ValueError:
        return None


def zarr_metadata(header: Header) -> dict[str, bytes]:
    """Create the `zarr.json` documents of a store, by their names inside it."""
    attributes = asdict(header) | {"fingerprint_id": header.fingerprint_id}
    if header.calibration is None:
        del attributes["calibration"]
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"feature_store": attributes}}
    documents = {"zarr.json": json.dumps(group, indent=2).encode()}
    for name, spec in header.arrays.items():
        num_rows = header.num_shards * header.rows_per_shard
        documents[f"{name}/zarr.json"] = _array_metadata(spec, num_rows, header.rows_per_shard, header.chunk_rows)
    return documents


@cache
def _array_metadata(spec: ArraySpec, num_rows: int, rows_per_shard: int, chunk_rows: int) -> bytes:
    """Let zarr itself describe an array, so that the result is plain Zarr."""
    memory: dict[str, Buffer] = {}
    zarr.create_group(store=MemoryStore(memory)).create_array(
        "array",
        shape=(num_rows, *spec.row_shape),
        dtype=spec.dtype,
        shards=(rows_per_shard, *spec.row_shape),
        chunks=(chunk_rows, *spec.row_shape),
        compressors=[Crc32cCodec()],
        serializer=BytesCodec(endian="little" if spec.dtype.itemsize > 1 else None),
        fill_value=spec.fill_value,
        chunk_key_encoding={"name": "default", "separator": "."},  # instead of a folder for every shard
        dimension_names=spec.axes,
    )
    return memory["array/zarr.json"].to_bytes()
