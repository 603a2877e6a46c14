"""An independent reader, written from cache/FORMAT.md alone: struct, json, hashlib and a Parquet library."""

import base64
import hashlib
import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr
from cache_stores import create, make_features, sealed

import cache
from cache import Calibration, FeatureReader, FeatureStore, Quantized

FORMAT = (Path(cache.__file__).parent / "FORMAT.md").read_text()


def crc32c(content: bytes) -> int:
    """RFC 3720, bit by bit."""
    value = 0xFFFFFFFF
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def read_shard(store: Path, name: str, record: dict[str, Any], number: str, width: int, chunk_rows: int) -> list[Any]:
    """Read all numbers of a shard file, checked against its commit record."""
    content = (store / name).read_bytes()
    assert len(content) == record["arrays"][name]["size_bytes"]
    checksums = record["arrays"][name]["chunk_crc32c"]
    size = chunk_rows * width * struct.calcsize(number)
    values: list[Any] = []
    for k in range(len(checksums) // 8):
        chunk = content[k * (size + 4) :][:size]
        assert crc32c(chunk) == int(checksums[8 * k : 8 * k + 8], 16)
        assert struct.unpack_from("<I", content, k * (size + 4) + size) == (crc32c(chunk),)
        values += struct.unpack(f"<{chunk_rows * width}{number}", chunk)
    return values


def read_store(store: Path) -> dict[str, list[list[float]]]:
    """Read every utterance of a store, as FORMAT.md says."""
    header = json.loads((store / "zarr.json").read_text())["attributes"]["feature_store"]
    assert header["format"] == 1
    assert hashlib.sha256(canonical(header["fingerprint"])).hexdigest() == header["fingerprint_id"]
    dim, chunk_rows = header["dim"], header["chunk_rows"]
    utterances = {}
    for path in sorted((store / "commits").iterdir()):
        record = json.loads(path.read_text())
        digest = record.pop("sha256")
        assert hashlib.sha256(canonical(record)).hexdigest() == digest
        shard = int(path.stem)
        assert (record["shard"], record["plan_id"], record["fingerprint_id"]) == (
            shard,
            header["plan_id"],
            header["fingerprint_id"],
        )
        for name, file in record["files"].items():
            assert hashlib.sha256((store / name).read_bytes()).hexdigest() == file["sha256"]
        encoding = header["encoding"]
        is_quantised, bits = encoding != "float16", int(encoding.removeprefix("int")) if encoding != "float16" else 16
        name, zero = f"features/c.{shard}.0", 0.0
        if bits < 8:
            width, zero = math.ceil(dim * bits / 8), (2**bits - 1) / 2
            packed = read_shard(store, name, record, "B", width, chunk_rows)
            numbers = [int.from_bytes(packed[i : i + width], "little") for i in range(0, len(packed), width)]
            values = [number >> (d * bits) & (2**bits - 1) for number in numbers for d in range(dim)]
        else:
            values = read_shard(store, name, record, "b" if is_quantised else "e", dim, chunk_rows)
        scales = read_shard(store, f"scales/c.{shard}", record, "e", 1, chunk_rows) if is_quantised else []
        mean, std = read_calibration(header) if is_quantised else ([], [])
        for row in pq.read_table(store / f"index/{shard:06d}.parquet").to_pylist():
            first = row["start"] % header["rows_per_shard"]
            frames = [values[r * dim : (r + 1) * dim] for r in range(first, first + row["num_frames"])]
            if is_quantised:
                frames = [
                    [(code - zero) * scales[first + t] * std[d] + mean[d] for d, code in enumerate(frame)]
                    for t, frame in enumerate(frames)
                ]
            utterances[row["utterance_id"]] = frames
    return utterances


def read_calibration(header: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    array, dim = base64.b64decode(header["calibration"]), header["dim"]
    assert hashlib.sha256(array).hexdigest() == header["calibration_id"]
    return struct.unpack(f"<{dim}f", array[: 4 * dim]), struct.unpack(f"<{dim}f", array[4 * dim :])


@pytest.mark.parametrize("encoding", ["float16", "int8", "int4", "int3", "int7"])
def test_a_reader_written_from_the_page_gets_the_same_numbers(tmp_path: Path, encoding: str) -> None:
    features = make_features([1, 30, 40, 5, 64], dim=3)
    store = sealed(tmp_path / "store", features, dim=3, encoding=encoding)
    theirs = read_store(store.path)
    reader = FeatureReader(store)
    assert theirs.keys() == features.keys()
    for utterance_id, frames in theirs.items():
        ours = reader.get(utterance_id)
        if isinstance(ours, Quantized):
            np.testing.assert_allclose(frames, ours.dequantize(), rtol=1e-6, atol=1e-6)
        else:
            np.testing.assert_array_equal(frames, ours)


def printed_bytes(heading: str) -> bytes:
    """The hexadecimal dump below a heading of the page."""
    section = re.split(r"^##", FORMAT.split(f"### {heading}\n")[1], flags=re.MULTILINE)[0]
    dump = "".join(re.findall(r"^    000000[0-9a-f]{2}: ((?:[0-9a-f]{4} ?)+)$", section, re.MULTILINE))
    return bytes.fromhex(dump.replace(" ", ""))


def test_the_worked_example_is_what_is_written(tmp_path: Path) -> None:
    features = {"a": np.array([[1, 2], [3, 4], [5, 6]], np.float32)}
    store = sealed(tmp_path / "store", features, dim=2, rows_per_shard=4)
    assert store.layout.array("features", 0).read_bytes() == printed_bytes("Worked example")
    assert store.commit(0).arrays["features/c.0.0"].chunk_crc32c in FORMAT


def test_the_worked_example_of_packed_codes_is_what_is_written(tmp_path: Path) -> None:
    frames = [[-7.5, -0.5, 0.5, 7.5], [3.25, 2.25, -1.75, -3.75]]
    assert str(frames) in FORMAT
    calibration = Calibration(mean=np.zeros(4, np.float32), std=np.ones(4, np.float32))
    options = {"dim": 4, "rows_per_shard": 2, "encoding": "int4", "calibration": calibration}
    store = sealed(tmp_path / "store", {"a": np.array(frames, np.float32)}, **options)
    assert store.layout.array("features", 0).read_bytes() == printed_bytes("Worked example of packed codes")
    assert store.layout.array("scales", 0).read_bytes()[:4] == bytes.fromhex("003c0038")
    assert read_store(store.path) == {"a": frames}
    assert zarr.open_group(store.path, mode="r")["features"][...].tolist() == [[0x70, 0xF8], [0xCE, 0x04]]


def test_the_seal_is_the_digest_over_the_records(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", make_features([30] * 6))
    lines = b"".join(path.read_bytes() for path in sorted((store.path / "commits").iterdir()))
    seal = json.loads(store.layout.sealed.read_text())
    assert seal["root"] == hashlib.sha256(lines).hexdigest()
    assert seal["index_sha256"] == hashlib.sha256(store.layout.sealed_index.read_bytes()).hexdigest()
    assert store.layout.sealed_commits.read_bytes() == lines


def test_the_plan_id_can_be_computed_from_the_page(tmp_path: Path) -> None:
    store = create(tmp_path / "store", make_features([30, 70, 5]))
    table, digest = pq.read_table(store.layout.plan), hashlib.sha256()
    for name in sorted(table.column_names):
        digest.update(name.encode() + b"\0")
        values = table[name].to_pylist()
        if isinstance(values[0], str):
            texts = [value.encode() for value in values]
            digest.update(b"".join(struct.pack("<I", len(text)) for text in texts) + b"".join(texts))
        else:
            digest.update(b"".join(struct.pack("<i", value) for value in values))
    assert digest.hexdigest() == store.header.plan_id


def test_every_field_of_header_and_record_is_on_the_page(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", make_features([30]), encoding="int8")
    header = json.loads((store.path / "zarr.json").read_text())["attributes"]["feature_store"]
    record = json.loads(store.layout.commit(0).read_text())
    columns = FeatureReader(FeatureStore.open(store.path)).index.column_names
    for name in [*header, *record, *columns, *store.plan().column_names]:
        assert f"`{name}`" in FORMAT, name
