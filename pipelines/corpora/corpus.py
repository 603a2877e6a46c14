"""What every corpus gives: a table of utterances from metadata alone, and encoded audio on demand.

`scan` says for every utterance where it lies; `read_audio` fetches encoded bytes. Audio stays encoded here; nothing is
decoded by `datasets`, so neither torchcodec nor torchaudio is needed. A corpus can be pickled: decoding processes carry
one each.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from tinyaudio.model.audio import SAMPLING_RATE, iter_audio
from tinyaudio.model.errors import AudioError

SCAN_SCHEMA = pa.schema(
    [
        ("utterance_id", pa.string()),
        ("source_id", pa.string()),  # where the row lies; only this corpus can read it
        ("duration_s", pa.float64()),  # as the corpus states it, or as the header says; null: unreadable
        ("transcript", pa.string()),  # as the corpus has it
        ("speaker", pa.string()),
        ("sex", pa.string()),
        ("source", pa.string()),
    ]
)
_FOOTER_BYTES = 65_536  # of a file's end: covers a Parquet footer, or tells two files apart


class Corpus(Protocol):
    """Utterances of named splits."""

    def require(self, split: str) -> None:
        """Make sure that a split is there. Raises CorpusError if not, naming those that are."""

    def provenance(self, split: str) -> dict[str, Any]:
        """Describe exactly which data this is, for a store's fingerprint."""

    def scan(self, split: str) -> pa.Table:
        """List a split as `SCAN_SCHEMA`, in file order. Raises CorpusError for a split that is not there."""

    def audio_bytes(self, split: str) -> int | None:
        """Add up the encoded audio of a split, from metadata; None where only the audio itself would tell."""

    def pieces(self, source_ids: Iterable[str]) -> list[list[str]]:
        """Group utterances by what is read together (a row group, a few files), in file order."""

    def read_audio(self, source_ids: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Yield (source_id, encoded audio), in file order; empty bytes where the row has none.

        Raises:
            FetchError: the network stayed away for as long as the corpus was told to wait.
            SourceError: a local file that is damaged.
        """


def duration_of(source: Path | bytes) -> float | None:
    """Read a recording's duration in seconds from its header, or by decoding it where the header does not say.

    Returns:
        None for a recording that cannot be read; decoding it later names the reason.
    """
    import soundfile

    try:
        info = soundfile.info(io.BytesIO(source) if isinstance(source, bytes) else str(source))
        return float(info.frames / info.samplerate)
    except (soundfile.LibsndfileError, ZeroDivisionError):
        pass
    try:
        return sum(len(block) for block in iter_audio(source)) / SAMPLING_RATE
    except AudioError:
        return None


def digest_files(paths: Iterable[Path]) -> str:
    """Identify files by name and size, and Parquet files by their footers: enough to notice another corpus."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(max(0, size - _FOOTER_BYTES))
            digest.update(f"{path.name} {size}\n".encode() + stream.read())
    return digest.hexdigest()


def chunked(values: Sequence[str], size: int) -> list[list[str]]:
    """Cut a sequence into lists of at most `size`."""
    return [list(values[start : start + size]) for start in range(0, len(values), size)]
