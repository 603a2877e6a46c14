"""Corpora: where utterances come from, read in two passes.

`scan` reads metadata only (never audio, where the corpus states durations) and says for every utterance where it lies;
`read_audio` then fetches the encoded bytes of chosen utterances, in file order. Three layouts, one interface:

- a hub data set (LoquaciousSet and any other with Parquet files), its configs, splits and revision resolved by `datasets`;
- a local folder of Parquet files with the same columns: `<split>-*.parquet`, `<split>/*.parquet`, or one level deeper
  under the config's name;
- a local `audiofolder`: `<split>/metadata.csv` or `.jsonl` with `file_name` and `text` (also `id`, `speaker`, `sex`,
  `source`, `duration`).

Audio stays encoded here; nothing is decoded by `datasets`, so neither torchcodec nor torchaudio is needed.
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import CorpusError
from pipelines.recipes import Columns, CorpusSection
from tinyaudio.audio import SAMPLING_RATE, iter_audio
from tinyaudio.errors import AudioError

SCAN_SCHEMA = pa.schema(
    [
        ("utterance_id", pa.string()),
        ("source_id", pa.string()),  # where the row lies; only this corpus object can read it
        ("duration_s", pa.float64()),  # as the corpus states it, or as the header says; null: unreadable
        ("transcript", pa.string()),  # as the corpus has it
        ("speaker", pa.string()),
        ("sex", pa.string()),
        ("source", pa.string()),
    ]
)


class Corpus(Protocol):
    """Utterances of named splits."""

    def provenance(self, split: str) -> dict[str, Any]:
        """Describe exactly which data this is, for a store's fingerprint."""

    def scan(self, split: str) -> pa.Table:
        """List a split as `SCAN_SCHEMA`, in file order. Raises CorpusError for a split that is not there."""

    def read_audio(self, source_ids: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Yield (source_id, encoded audio), in file order; empty bytes where the row has none."""


def open_corpus(section: CorpusSection) -> Corpus:
    """Open the corpus a recipe names.

    Raises:
        CorpusError: no such folder, no such data set, or a layout that is none of the three.
    """
    if section.name is not None:
        return HubCorpus(section.name, section.config, section.revision, section.columns)
    root = Path(str(section.path)).expanduser()
    if not root.is_dir():
        raise CorpusError(f"corpus folder {str(root)!r} does not exist; set corpus.path, or corpus.name for a hub data set")
    if next(root.rglob("metadata.csv"), None) or next(root.rglob("metadata.jsonl"), None):
        return FolderCorpus(root)
    if next(root.rglob("*.parquet"), None):
        return LocalParquetCorpus(root, section.config, section.columns)
    raise CorpusError(
        f"{str(root)!r} holds neither Parquet files nor <split>/metadata.csv or metadata.jsonl; expected one of them"
    )


class ParquetCorpus:
    """Splits of Parquet files, wherever they lie. A source_id is "file:row group:row"."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._files: list[str] = []  # every file seen by a scan; source_ids count in it

    def files(self, split: str) -> list[str]:
        raise NotImplementedError

    def open(self, file: str) -> BinaryIO:
        raise NotImplementedError

    def provenance(self, split: str) -> dict[str, Any]:
        raise NotImplementedError

    def scan(self, split: str) -> pa.Table:
        parts = [self._scan_file(file) for file in self.files(split)]
        return pa.concat_tables(parts) if parts else SCAN_SCHEMA.empty_table()

    def _scan_file(self, file: str) -> pa.Table:
        if file not in self._files:
            self._files.append(file)
        number = self._files.index(file)
        with self.open(file) as stream:
            parquet = pq.ParquetFile(stream)
            self._check_columns(file, parquet.schema_arrow)
            parts = [self._scan_group(parquet, number, group) for group in range(parquet.num_row_groups)]
        return pa.concat_tables(parts) if parts else SCAN_SCHEMA.empty_table()

    def _check_columns(self, file: str, schema: pa.Schema) -> None:
        wanted = [self.columns.id, self.columns.audio, self.columns.text]
        missing = [name for name in wanted if name not in schema.names]
        if missing:
            raise CorpusError(
                f"{file!r} has columns {', '.join(schema.names)}; expected also {', '.join(missing)} "
                "(corpus.columns in the recipe says what they are called)"
            )

    def _scan_group(self, parquet: pq.ParquetFile, number: int, group: int) -> pa.Table:
        names, present = self.columns, set(parquet.schema_arrow.names)
        roles = {"utterance_id": names.id, "transcript": names.text, "duration_s": names.duration}
        roles |= {"speaker": names.speaker, "sex": names.sex, "source": names.source}
        found = {role: name for role, name in roles.items() if name in present}
        rows = parquet.read_row_group(group, columns=list(found.values()))
        arrays = {role: rows[name].combine_chunks() for role, name in found.items()}
        arrays["source_id"] = pa.array([f"{number}:{group}:{row}" for row in range(rows.num_rows)])
        if "duration_s" not in arrays:
            arrays["duration_s"] = pa.array(self._header_durations(parquet, group), pa.float64())
        columns = [
            arrays[field.name].cast(field.type) if field.name in arrays else pa.nulls(rows.num_rows, field.type)
            for field in SCAN_SCHEMA
        ]
        return pa.table(columns, schema=SCAN_SCHEMA)

    def _header_durations(self, parquet: pq.ParquetFile, group: int) -> list[float | None]:
        return [duration_of(row) for row in self._read_group(parquet, group)]

    def _read_group(self, parquet: pq.ParquetFile, group: int) -> list[bytes]:
        cells = parquet.read_row_group(group, columns=[self.columns.audio])[self.columns.audio].to_pylist()
        return [(cell or {}).get("bytes") or b"" for cell in cells]

    def read_audio(self, source_ids: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        places = sorted(tuple(int(part) for part in source_id.split(":")) for source_id in source_ids)
        by_file: dict[int, dict[int, list[int]]] = {}
        for number, group, row in places:
            by_file.setdefault(number, {}).setdefault(group, []).append(row)
        for number, groups in by_file.items():
            with self.open(self._files[number]) as stream:
                parquet = pq.ParquetFile(stream)
                for group, rows in groups.items():
                    audio = self._read_group(parquet, group)
                    yield from ((f"{number}:{group}:{row}", audio[row]) for row in rows)


class LocalParquetCorpus(ParquetCorpus):
    """Parquet files in a local folder."""

    def __init__(self, root: Path, config: str | None, columns: Columns) -> None:
        super().__init__(columns)
        self.root, self.config = root, config

    def files(self, split: str) -> list[str]:
        folders = [self.root / self.config] if self.config else []
        for folder in [*folders, self.root, self.root / "data"]:
            found = sorted(folder.glob(f"{split}-*.parquet")) + sorted(folder.glob(f"{split}.parquet"))
            found = found or sorted((folder / split).glob("*.parquet"))
            if found:
                return [str(path) for path in found]
        there = sorted({path.stem.split("-")[0] for path in self.root.rglob("*.parquet")})
        raise CorpusError(f"no split {split!r} in {str(self.root)!r}; found {', '.join(there)}")

    def open(self, file: str) -> BinaryIO:
        return Path(file).open("rb")

    def provenance(self, split: str) -> dict[str, Any]:
        return {"kind": "parquet", "split": split, "files_digest": _digest_files(map(Path, self.files(split)))}


class HubCorpus(ParquetCorpus):
    """A data set of the hub; `datasets` resolves config, split and revision to files, which are read by ranges."""

    def __init__(self, name: str, config: str | None, revision: str | None, columns: Columns) -> None:
        super().__init__(columns)
        self.name, self.config, self.revision = name, config, revision
        self._data_files: Mapping[str, list[str]] | None = None

    def _resolve(self) -> Mapping[str, list[str]]:
        if self._data_files is None:
            from datasets import load_dataset_builder

            try:
                builder = load_dataset_builder(self.name, self.config, revision=self.revision)
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise CorpusError(
                    f"data set {self.name!r} (config {self.config!r}, revision {self.revision or 'main'!r}) cannot be "
                    f"opened: {reason}; check the name, the network and HF_TOKEN, or set corpus.path to a local copy"
                ) from error
            self._data_files = {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}
        return self._data_files

    def files(self, split: str) -> list[str]:
        data_files = self._resolve()
        if split not in data_files:
            raise CorpusError(f"no split {split!r} in {self.name!r}; found {', '.join(data_files)}")
        files = data_files[split]
        if not all(file.endswith(".parquet") for file in files):
            raise CorpusError(f"{self.name!r} split {split!r} is not Parquet: {files[0]!r}; expected Parquet files")
        return files

    def open(self, file: str) -> BinaryIO:
        import fsspec

        opened: BinaryIO = fsspec.open(file, "rb").open()
        return opened

    def provenance(self, split: str) -> dict[str, Any]:
        files = self.files(split)
        commits = sorted({file.partition("@")[2].partition("/")[0] for file in files if "@" in file})
        return {
            "kind": "hub",
            "name": self.name,
            "config": self.config,
            "split": split,
            "revision": commits[0] if len(commits) == 1 else self.revision,
        }


class FolderCorpus:
    """The audiofolder convention. A source_id is a path relative to the root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _metadata(self, split: str) -> Path:
        for folder in (self.root / split, self.root):
            for name in ("metadata.csv", "metadata.jsonl"):
                if (folder / name).is_file() and (folder != self.root or split == "train"):
                    return folder / name
        there = sorted(path.parent.name for path in self.root.glob("*/metadata.*"))
        raise CorpusError(f"no split {split!r} in {str(self.root)!r}; found {', '.join(there) or 'none'}")

    def provenance(self, split: str) -> dict[str, Any]:
        return {"kind": "folder", "split": split, "files_digest": _digest_files([self._metadata(split)])}

    def scan(self, split: str) -> pa.Table:
        metadata = self._metadata(split)
        rows = [self._scan_row(metadata, row) for row in _read_metadata(metadata)]
        return pa.Table.from_pylist(rows, schema=SCAN_SCHEMA)

    def _scan_row(self, metadata: Path, row: Mapping[str, Any]) -> dict[str, Any]:
        name = row.get("file_name")
        if not name:
            raise CorpusError(f"{str(metadata)!r}: a row without file_name: {dict(row)!r}; expected file_name and text")
        path = metadata.parent / str(name)
        duration = row.get("duration")
        text = row.get("text", row.get("transcription"))
        return {
            "utterance_id": str(row.get("id") or path.relative_to(self.root)),
            "source_id": str(path.relative_to(self.root)),
            "duration_s": float(duration) if duration else duration_of(path),
            "transcript": None if text is None else str(text),
            "speaker": row.get("speaker"),
            "sex": row.get("sex"),
            "source": row.get("source"),
        }

    def read_audio(self, source_ids: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for source_id in sorted(source_ids):
            path = self.root / source_id
            yield source_id, path.read_bytes() if path.is_file() else b""


def _read_metadata(path: Path) -> list[Mapping[str, Any]]:
    """Read metadata.csv or metadata.jsonl.

    Raises:
        CorpusError: a line that does not parse, named.
    """
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as lines:
            return list(csv.DictReader(lines))
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise CorpusError(f"{str(path)!r} line {number} is not JSON: {error}") from error
    return rows


def duration_of(source: Path | bytes) -> float | None:
    """Read a recording's duration in seconds from its header, or by decoding it where the header does not say.

    Returns:
        None for a recording that cannot be read; decoding it later names the reason.
    """
    import io

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


def _digest_files(paths: Iterable[Path]) -> str:
    """Identify files by name and size, and Parquet files by their footers: enough to notice another corpus."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        with path.open("rb") as stream:
            stream.seek(max(0, size - 65_536))
            digest.update(f"{path.name} {size}\n".encode() + stream.read())
    return digest.hexdigest()


