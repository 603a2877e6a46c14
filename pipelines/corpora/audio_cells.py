"""The forms of an audio cell in Parquet files, as `datasets` and others write them. Each becomes an encoded recording.

binary                                  an encoded file
string                                  a path: absolute, or relative to the Parquet file or to the corpus
list of floats or int16                 samples at 16 kHz, one channel (or a list of channels)
struct {bytes, path}                    the bytes; the path, read as above, if they are null
struct {array, sampling_rate[, path]}   samples at their own rate
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tinyaudio.model.audio import MAX_SOURCE_RATE, SAMPLING_RATE

MAX_CHANNELS = 64
EXPECTED = "binary, a path, a list of float or int16 samples, {bytes, path} or {array, sampling_rate}"


def is_audio(kind: pa.DataType) -> bool:
    """Check whether a column of this type can hold audio."""
    if pa.types.is_struct(kind):
        fields = {field.name: field.type for field in kind}
        if "array" in fields:
            return "sampling_rate" in fields and _is_samples(fields["array"])
        return _is_binary(fields.get("bytes")) or _is_path(fields.get("path"))
    return _is_binary(kind) or _is_path(kind) or _is_samples(kind)


def encoded_audio(cell: pa.Scalar, folders: Sequence[Path]) -> bytes:
    """Return the recording of a cell as the bytes of an audio file; empty if there is none.

    Args:
        folders: where relative paths may begin; none on the hub, where paths cannot be read.
    """
    if not cell.is_valid:
        return b""
    if pa.types.is_struct(cell.type):
        parts = {field.name: cell[field.name] for field in cell.type}
        if "array" in parts:
            rate = parts["sampling_rate"].as_py()
            return _wav(parts["array"], int(rate)) if parts["array"].is_valid and rate else b""
        encoded = parts["bytes"].as_py() if "bytes" in parts else None
        if encoded:
            return bytes(encoded)
        return encoded_audio(parts["path"], folders) if "path" in parts else b""
    if _is_path(cell.type):
        paths = [folder / cell.as_py() for folder in folders]  # an absolute path stays as it is
        found = next((path for path in paths if path.is_file()), None)
        return b"" if found is None else found.read_bytes()
    return bytes(cell.as_py()) if _is_binary(cell.type) else _wav(cell, SAMPLING_RATE)


def _is_binary(kind: pa.DataType | None) -> bool:
    return kind is not None and (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _is_path(kind: pa.DataType | None) -> bool:
    return kind is not None and (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_samples(kind: pa.DataType) -> bool:
    """Check for lists of numbers with a known full scale; of int32 and int64, it is unknown."""
    if not _is_list(kind):
        return False
    value = kind.value_type.value_type if _is_list(kind.value_type) else kind.value_type
    return bool(pa.types.is_floating(value) or pa.types.is_int16(value))


def _wav(cell: Any, rate: int) -> bytes:
    """Write samples as a WAV file, 16-bit or float32 as they are; empty if they are no recording."""
    import soundfile

    has_channels = _is_list(cell.type.value_type)
    lists = [one.values for one in cell.values if one.is_valid] if has_channels else [cell.values]
    rows = [one.to_numpy(zero_copy_only=False) for one in lists]
    if len({len(row) for row in rows}) != 1 or not 0 < rate <= MAX_SOURCE_RATE:
        return b""
    samples = np.stack(rows)
    samples = samples.T if len(samples) <= samples.shape[1] else samples  # (samples, channels)
    if not samples.size or samples.shape[1] > MAX_CHANNELS:
        return b""
    buffer, is_int = io.BytesIO(), samples.dtype == np.int16
    samples = samples if is_int else samples.astype(np.float32)
    soundfile.write(buffer, samples, rate, "PCM_16" if is_int else "FLOAT", format="WAV")
    return buffer.getvalue()
