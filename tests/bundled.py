"""The demo's bundled corpus and encoder, for tests that measure on synthetic speech."""

from pathlib import Path

import pyarrow.parquet

from tinyaudio.model.audio import Samples, load_audio

DEMO = Path(__file__).parent.parent / "pipelines/demo"


def utterances(split: str, count: int | None = None) -> list[tuple[str, str, Samples]]:
    """The first utterances of a split, or all: id, transcript, and samples at 16 kHz."""
    (path,) = (DEMO / "corpus").glob(f"{split}-0*.parquet")
    rows = pyarrow.parquet.read_table(path).slice(0, count).to_pylist()
    return [(row["ID"], row["text"], load_audio(row["wav"]["bytes"])) for row in rows]
