"""Corpora in Parquet files with LoquaciousSet's columns (or others, by name), in a local folder or on the hub.

Planning reads the footer and the metadata columns of each row group and nothing else; where a corpus states no
durations, they come from the headers of the recordings, which means reading the audio once. Audio is read page by page,
so memory does not follow the size of a row group. A source_id is "split:file:row group:row".
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipelines.corpora.corpus import SCAN_SCHEMA, digest_files, duration_of
from pipelines.corpora.hub import HubFile, fetch_whole, is_commit, resolve_dataset
from pipelines.errors import CorpusError, FetchError, SourceError
from pipelines.recipes.recipe import Columns, CorpusSection

READ_BYTES = 8 << 20  # of a column at once
READ_ROWS = 32
SCAN_THREADS = 8  # files of a remote corpus whose metadata is fetched side by side

_HUB_PATH = re.compile(r"^hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)$")


class ParquetCorpus:
    """Splits of Parquet files, wherever they lie."""

    scan_threads = 1

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._audio_sizes: dict[str, int] = {}  # bytes by file, of those whose footer was read

    def files(self, split: str) -> list[str]:
        """List the files of a split, in order. Raises CorpusError for a split that is not there."""
        raise NotImplementedError

    def require(self, split: str) -> None:
        self.files(split)

    def open(self, file: str, *, whole: bool = False) -> BinaryIO:
        """Open a file; `whole` says that its audio is going to be read and not only its metadata."""
        raise NotImplementedError

    def provenance(self, split: str) -> dict[str, Any]:
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------- metadata

    def scan(self, split: str) -> pa.Table:
        files = self.files(split)
        with ThreadPoolExecutor(self.scan_threads) as threads:
            scanned = threads.map(lambda item: self._scan_file(split, *item), enumerate(files))
            parts = list(tqdm(scanned, f"listing {split}", len(files), unit="file", delay=2.0, disable=None))
        return pa.concat_tables(parts) if parts else SCAN_SCHEMA.empty_table()

    def audio_bytes(self, split: str) -> int | None:
        with ThreadPoolExecutor(self.scan_threads) as threads:
            return sum(threads.map(self._audio_bytes_of, self.files(split)))

    def _audio_bytes_of(self, file: str) -> int:
        if file not in self._audio_sizes:
            with self._parquet(file) as parquet:
                self._audio_sizes[file] = self._audio_size(parquet.metadata)
        return self._audio_sizes[file]

    def _audio_size(self, footer: pq.FileMetaData) -> int:
        return sum(
            footer.row_group(group).column(column).total_compressed_size
            for group in range(footer.num_row_groups)
            for column in range(footer.num_columns)
            if footer.row_group(group).column(column).path_in_schema == f"{self.columns.audio}.bytes"
        )

    def _parquet(self, file: str, *, whole: bool = False) -> pq.ParquetFile:
        stream = self.open(file, whole=whole)
        try:
            footer = read_footer(stream)
            stream.seek(0)
            options: dict[str, Any] = {"buffer_size": READ_BYTES} if whole else {"pre_buffer": True}
            return pq.ParquetFile(stream, metadata=footer, **options)
        except (pa.ArrowException, ValueError) as error:
            stream.close()
            raise SourceError(
                f"{file!r} is not readable as Parquet ({_line(error)}); fetch or make it again"
            ) from error

    def _scan_file(self, split: str, number: int, file: str) -> pa.Table:
        with self._parquet(file) as parquet:
            self._check_columns(file, parquet.schema_arrow)
            self._audio_sizes[file] = self._audio_size(parquet.metadata)
            if self.columns.duration in parquet.schema_arrow.names:
                return self._scan_groups(parquet, f"{split}:{number}", file)
        with self._parquet(file, whole=True) as parquet:  # durations are in the recordings
            return self._scan_groups(parquet, f"{split}:{number}", file)

    def _scan_groups(self, parquet: pq.ParquetFile, place: str, file: str) -> pa.Table:
        try:
            groups = range(parquet.num_row_groups)
            parts = [self._scan_group(parquet, f"{place}:{group}", group) for group in groups]
        except FetchError:  # an OSError too, but of the network and not of the file
            raise
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"{file!r}: its metadata columns are damaged ({_line(error)})") from error
        return pa.concat_tables(parts) if parts else SCAN_SCHEMA.empty_table()

    def _check_columns(self, file: str, schema: pa.Schema) -> None:
        wanted = [self.columns.id, self.columns.audio, self.columns.text]
        missing = [name for name in wanted if name not in schema.names]
        if missing:
            raise CorpusError(
                f"{file!r} has columns {', '.join(schema.names)}; expected also {', '.join(missing)} "
                "(corpus.columns in the recipe says what they are called)"
            )

    def _scan_group(self, parquet: pq.ParquetFile, place: str, group: int) -> pa.Table:
        names, present = self.columns, set(parquet.schema_arrow.names)
        roles = {"utterance_id": names.id, "transcript": names.text, "duration_s": names.duration}
        roles |= {"speaker": names.speaker, "sex": names.sex, "source": names.source}
        found = {role: name for role, name in roles.items() if name in present}
        rows = parquet.read_row_group(group, columns=list(found.values()))
        arrays = {role: _by_name(rows[name].combine_chunks(), name, rows.schema) for role, name in found.items()}
        arrays["source_id"] = pa.array([f"{place}:{row}" for row in range(rows.num_rows)], pa.string())
        if "duration_s" not in arrays:
            durations = [duration_of(audio) for audio in self._iter_group(parquet, group)]
            arrays["duration_s"] = pa.array(durations, pa.float64())
        columns = [
            arrays[field.name].cast(field.type) if field.name in arrays else pa.nulls(rows.num_rows, field.type)
            for field in SCAN_SCHEMA
        ]
        return pa.table(columns, schema=SCAN_SCHEMA)

    # ------------------------------------------------------------------------------------------- audio

    def _iter_group(self, parquet: pq.ParquetFile, group: int) -> Iterator[bytes]:
        """Yield the audio of a row group, row by row."""
        for batch in parquet.iter_batches(
            READ_ROWS, row_groups=[group], columns=[self.columns.audio], use_threads=False
        ):
            for cell in batch.column(0):
                row = cell.as_py() if cell.is_valid else {}
                yield row.get("bytes") or b""

    def pieces(self, source_ids: Iterable[str]) -> list[list[str]]:
        by_group: dict[tuple[str, int, int], list[str]] = {}
        for split, number, group, row in sorted(map(_place, source_ids)):
            by_group.setdefault((split, number, group), []).append(f"{split}:{number}:{group}:{row}")
        return list(by_group.values())

    def read_audio(self, source_ids: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for piece in self.pieces(source_ids):
            split, number, group, _ = _place(piece[0])
            wanted = {_place(source_id)[3]: source_id for source_id in piece}
            file, last = self.files(split)[number], max(wanted)
            try:
                with self._parquet(file, whole=True) as parquet:
                    for row, audio in enumerate(self._iter_group(parquet, group)):
                        if row in wanted:
                            yield wanted[row], audio
                        if row == last:
                            break
            except FetchError:
                raise
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{file!r}, row group {group}: {_line(error)}") from error


def _by_name(array: pa.Array, column: str | None, schema: pa.Schema) -> pa.Array:
    """Write out what `datasets` keeps as a number with a list of names in the file's metadata (a ClassLabel)."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = about.get("info", {}).get("features", {}).get(column, {}).get("names")
    if not names or not pa.types.is_integer(array.type):
        return array
    # -1 stands for a label that is missing
    return pa.array([None if i in (None, -1) else names[i] for i in array.to_pylist()], pa.string())


def _place(source_id: str) -> tuple[str, int, int, int]:
    split, number, group, row = source_id.rsplit(":", 3)
    return split, int(number), int(group), int(row)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def read_footer(stream: BinaryIO) -> pq.FileMetaData:
    """Read a Parquet footer and not a byte more; Arrow by itself fetches the last 64 KiB, whatever they hold.

    Raises:
        ValueError: no Parquet file.
    """
    end = stream.seek(0, 2)
    if end < 12:
        raise ValueError(f"it has {end} bytes")
    stream.seek(end - 8)
    tail = stream.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or not 0 < length <= end - 12:
        raise ValueError("it does not end like a Parquet file; it may be cut short")
    stream.seek(end - 8 - length)
    footer = stream.read(length)
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer + tail))


class LocalParquetCorpus(ParquetCorpus):
    """Parquet files in a folder: `<split>-*.parquet`, `<split>/*.parquet`, or one level deeper under the config."""

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

    def open(self, file: str, *, whole: bool = False) -> BinaryIO:
        return Path(file).open("rb")

    def provenance(self, split: str) -> dict[str, Any]:
        return {"kind": "parquet", "split": split, "files_digest": digest_files(map(Path, self.files(split)))}


class HubCorpus(ParquetCorpus):
    """A data set of the hub at one commit; `datasets` resolves config and split to files, which are read by ranges."""

    scan_threads = SCAN_THREADS

    def __init__(self, section: CorpusSection) -> None:
        super().__init__(section.columns)
        assert section.name is not None
        self.name, self.config, self.revision = section.name, section.config, section.revision
        self.fetch, self.patience_s = section.fetch, section.fetch_patience_s

    @cached_property
    def _data_files(self) -> Mapping[str, list[str]]:
        return resolve_dataset(self.name, self.config, self.revision, self.patience_s)

    def files(self, split: str) -> list[str]:
        if split not in self._data_files:
            raise CorpusError(f"no split {split!r} in {self.name!r}; found {', '.join(self._data_files)}")
        files = self._data_files[split]
        if not all(file.endswith(".parquet") for file in files):
            raise CorpusError(f"{self.name!r} split {split!r} is not Parquet: {files[0]!r}; expected Parquet files")
        return files

    def open(self, file: str, *, whole: bool = False) -> BinaryIO:
        match = _HUB_PATH.match(file)
        if match is None:
            raise CorpusError(f"{file!r} lies outside the hub; expected hf://datasets/<name>@<commit>/<file>")
        place = match.group("repo"), match.group("path"), match.group("revision")
        if whole and self.fetch == "files":
            return fetch_whole(*place, timeout_s=self.patience_s).open("rb")
        return HubFile(*place, timeout_s=self.patience_s)  # type: ignore[return-value]  # RawIOBase is what Arrow needs

    def provenance(self, split: str) -> dict[str, Any]:
        place = {"kind": "hub", "name": self.name, "config": self.config, "split": split}
        return {**place, "revision": self.revision if is_commit(self.revision) else self.commit}

    @property
    def commit(self) -> str | None:
        """The commit that the revision means; asks the hub."""
        files = [file for files in self._data_files.values() for file in files]
        revisions = {match.group("revision") for match in map(_HUB_PATH.match, files) if match}
        return revisions.pop() if len(revisions) == 1 else self.revision
