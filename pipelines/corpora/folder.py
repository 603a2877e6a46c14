"""A corpus in the `audiofolder` convention: `<split>/metadata.csv` or `.jsonl` with `file_name` and `text`.

Optional columns: `id`, `speaker`, `sex`, `source`, `duration` (seconds). A source_id is a path relative to the root, or
an absolute path outside it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.corpora.corpus import SCAN_SCHEMA, chunked, digest_files, duration_of
from pipelines.corpora.metadata import read_metadata
from pipelines.errors import CorpusError

PIECE_FILES = 64  # recordings that one decoding worker reads together


class FolderCorpus:
    """A folder of recordings with one metadata file per split."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _metadata(self, split: str) -> Path:
        folders = [self.root / split, *([self.root] if split == "train" else [])]
        for folder in folders:
            paths = [folder / name for name in ("metadata.csv", "metadata.jsonl") if (folder / name).exists()]
            if len(paths) == 2:
                raise CorpusError(f"{str(folder)!r}: expected metadata.csv or metadata.jsonl, found both. Remove one")
            if paths and not paths[0].is_file():
                raise CorpusError(f"{str(paths[0])!r}: expected a file, found a directory. Remove or rename it")
            if paths:
                return paths[0]
        found = sorted(path.parent.name for path in self.root.glob("*/metadata.*"))
        raise CorpusError(f"no split {split!r} in {str(self.root)!r}; found {', '.join(found) or 'none'}")

    def require(self, split: str) -> None:
        self._metadata(split)

    def provenance(self, split: str) -> dict[str, Any]:
        return {"kind": "folder", "split": split, "files_digest": digest_files([self._metadata(split)])}

    def scan(self, split: str) -> pa.Table:
        metadata, utterances = self._metadata(split), []
        for row in read_metadata(metadata):
            path = metadata.parent / row.file_name
            source_id = str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)
            utterances.append(
                {
                    "utterance_id": row.others.get("id") or source_id,
                    "source_id": source_id,
                    "duration_s": row.duration_s or duration_of(path),
                    "transcript": row.text,
                    **{name: row.others.get(name) for name in ("speaker", "sex", "source")},
                }
            )
        return pa.Table.from_pylist(utterances, schema=SCAN_SCHEMA)

    def audio_bytes(self, split: str) -> int | None:
        metadata = self._metadata(split)
        paths = [metadata.parent / row.file_name for row in read_metadata(metadata)]
        return sum(path.stat().st_size for path in paths if path.is_file())

    def pieces(self, source_ids: Iterable[str]) -> list[list[str]]:
        return list(chunked(sorted(source_ids), PIECE_FILES))

    def read_audio(self, source_ids: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for source_id in sorted(source_ids):
            path = self.root / source_id
            yield source_id, path.read_bytes() if path.is_file() else b""
