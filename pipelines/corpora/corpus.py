"""The interface of all corpora: a table of utterances from metadata alone, and encoded audio on demand.

`scan` gives the place of every utterance; `read_audio` fetches encoded bytes from there. Audio stays encoded here and
`datasets` decodes nothing, so neither torchcodec nor torchaudio is needed. A corpus can be pickled: every decoding
process has a copy.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from tinyaudio.model.audio import SAMPLING_RATE, iter_audio, probe_duration_s
from tinyaudio.model.errors import AudioError

SCAN_SCHEMA = pa.schema(
    [
        ("utterance_id", pa.string()),
        ("source_id", pa.string()),  # the place of the row; only this corpus can read it
        ("duration_s", pa.float64()),  # as the corpus or the recording's header states it; null: unreadable
        ("transcript", pa.string()),  # unchanged
        ("speaker", pa.string()),
        ("sex", pa.string()),
        ("source", pa.string()),
    ]
)
_FOOTER_BYTES = 65_536  # of a file's end: contains a Parquet footer, or enough to tell two files apart


class Corpus(Protocol):
    """Utterances in named splits."""

    def require(self, split: str) -> None:
        """Check that a split exists. Raises CorpusError if not, with the names of those that do."""

    def provenance(self, split: str) -> dict[str, Any]:
        """Identify the data of a split, for a store's fingerprint."""

    def scan(self, split: str) -> pa.Table:
        """List a split as `SCAN_SCHEMA`, in file order. Raises CorpusError if there is no such split."""

    def audio_bytes(self, split: str) -> int | None:
        """Add up the size of the encoded audio of a split, from metadata; None if metadata do not give it."""

    def pieces(self, source_ids: Iterable[str]) -> list[list[str]]:
        """Group utterances that are read together (a row group, a few files), in file order."""

    def read_audio(self, source_ids: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Yield (source_id, encoded audio), in file order; empty bytes where a row has none.

        Raises:
            FetchError: the network failed for as long as the corpus is allowed to wait.
            SourceError: a file is damaged.
        """


def duration_of(source: Path | bytes) -> float | None:
    """Read a recording's duration in seconds from its header, or decode it if the header has none to rely on.

    Returns:
        None for a recording that cannot be read; decoding it later gives the reason.
    """
    stated_s = probe_duration_s(source)
    if stated_s is not None:
        return stated_s
    try:
        return sum(len(block) for block in iter_audio(source)) / SAMPLING_RATE
    except AudioError:
        return None


def digest_files(paths: Iterable[Path]) -> str:
    """Compute a SHA-256 over names, sizes and last 64 KiB of files: a Parquet file is identified by its footer."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(max(0, size - _FOOTER_BYTES))
            digest.update(f"{path.name} {size}\n".encode() + stream.read())
    return digest.hexdigest()


def chunked(values: Sequence[str], size: int) -> Iterator[list[str]]:
    """Cut a sequence into lists of at most `size` values."""
    for start in range(0, len(values), size):
        yield list(values[start : start + size])
