"""Parquet files as of LoquaciousSet, and what a corpus reads out of them, for the tests of `pipelines.corpora.open`."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from pipelines.corpora import open_corpus
from pipelines.recipes.recipe import CorpusSection

CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def wav(seconds: float, sampling_rate: int = 16_000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, 0.1 * np.sin(np.arange(int(seconds * sampling_rate)) / 9), sampling_rate, format="WAV")
    return buffer.getvalue()


def loquacious(count: int, first: int = 0) -> dict[str, pa.Array]:
    """Columns in LoquaciousSet's schema."""
    numbers = range(first, first + count)
    return {
        "ID": pa.array([f"u{i:03}" for i in numbers]),
        "duration": pa.array([1.0 + i / 10 for i in numbers], pa.float32()),
        "wav": pa.array([{"bytes": wav(1.0 + i / 10), "path": f"{i}.wav"} for i in numbers], CELL),
        "spk_id": pa.array([f"s{i % 3}" for i in numbers]),
        "sex": pa.array([("male", "female", None)[i % 3] for i in numbers]),
        "text": pa.array([f"Word {i}" for i in numbers]),
    }


def write_parquet(path: Path, columns: dict[str, pa.Array], row_group_size: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, compression="none")
    return path


def two_files(root: Path) -> Path:
    """A split `train` of ten rows and five more."""
    write_parquet(root / "train-00000-of-00002.parquet", loquacious(10))
    write_parquet(root / "train-00001-of-00002.parquet", loquacious(5, first=10))
    return root


def opened(root: Path, **settings: object):
    return open_corpus(CorpusSection(path=str(root), **settings))


def audio_of(corpus, split: str) -> dict[str, bytes]:
    table = corpus.scan(split)
    ids = dict(zip(table["source_id"].to_pylist(), table["utterance_id"].to_pylist(), strict=True))
    return {ids[source_id]: audio for source_id, audio in corpus.read_audio(ids)}
