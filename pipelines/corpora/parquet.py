"""Corpora in Parquet files with LoquaciousSet's columns (or others, by name), in a local folder or on the hub.

Planning reads the footer and the metadata columns of each row group. Only if a corpus has no column of durations are
the recordings read, since their headers then give them. Audio is read page by page, so memory does not depend on the
size of a row group. Where two shards divide a row group on the hub, its reading stops and is continued for the second
one; what the first one passed over is kept, and so are footers. So nothing is fetched twice by one process.

A source_id is "split:file:row group:row", the last three being numbers.
"""

import contextlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipelines.corpora.audio_cells import EXPECTED as AUDIO_CELLS
from pipelines.corpora.audio_cells import encoded_audio, is_audio
from pipelines.corpora.corpus import SCAN_SCHEMA, digest_files, duration_of
from pipelines.corpora.hub import HubFile, fetch_whole, is_commit, resolve_dataset
from pipelines.errors import CorpusError, FetchError, SourceError, one_line
from pipelines.recipes.recipe import Columns, CorpusSection

READ_BYTES = 8 << 20  # of a column at once
READ_ROWS = 32
SCAN_THREADS = 16  # files on the hub whose metadata is read at the same time

FOOTERS_KEPT = 64  # of files; about 100 kB each
GROUPS_KEPT = 8  # row groups that were not read to their end; at most READ_BYTES and READ_ROWS recordings each
PASSED_KEPT = 8  # recordings of a row group; a plan leaves one in two thousand to the next shard

_HUB_PATH = re.compile(r"^hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)$")


@dataclass(eq=False)
class _Reading:
    """A row group that is being read, or whose reading stopped behind the last row that a shard needed."""

    rows: Iterator[bytes] | None = None  # None: it has to begin again
    next_row: int = 0
    num_rows: int = 0
    passed: dict[int, bytes] = field(default_factory=dict)  # read and not needed: a plan may leave it to the next shard
    lock: threading.Lock = field(default_factory=threading.Lock)  # the next shard waits for the one before it

    @property
    def is_used_up(self) -> bool:
        return self.next_row == self.num_rows and not self.passed

    def can_give(self, rows: Sequence[int]) -> bool:
        return self.rows is not None and all(row >= self.next_row or row in self.passed for row in rows)

    def take(self, rows: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yield the audio of some rows, in ascending order; rows behind the end of the group are missing."""
        assert self.rows is not None
        kept_from = self.next_row or rows[0]  # rows before the first that was needed here are another process's
        for row in rows:
            if row in self.passed:
                yield row, self.passed.pop(row)
                continue
            for audio in self.rows:
                here, self.next_row = self.next_row, self.next_row + 1
                if here == row:
                    yield row, audio
                    break
                if here >= kept_from:
                    self.passed[here] = audio
                    if len(self.passed) > PASSED_KEPT:
                        del self.passed[min(self.passed)]


class _Kept:
    """What a process keeps of the files that it reads, for as long as it is among the last that were needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()
        self._readings: OrderedDict[tuple[str, int], _Reading] = OrderedDict()

    def footer(self, file: str, stream: BinaryIO) -> pq.FileMetaData:
        """Return the footer of a file, read now if it is not kept; errors as `read_footer`."""
        with self._lock:
            footer = self._footers.get(file)
        footer = read_footer(stream) if footer is None else footer
        with self._lock:
            self._footers[file] = footer
            self._footers.move_to_end(file)
            if len(self._footers) > FOOTERS_KEPT:
                self._footers.popitem(last=False)
        return footer

    @contextlib.contextmanager
    def reading(self, file: str, group: int) -> Iterator[_Reading]:
        """Give one thread a row group to read on; it is kept unless the body fails or nothing of it is left."""
        with self._lock:
            reading = self._readings.setdefault((file, group), _Reading())
            self._readings.move_to_end((file, group))
            if len(self._readings) > GROUPS_KEPT:
                self._readings.popitem(last=False)  # a thread that is reading it has its own reference
        with reading.lock:
            try:
                yield reading
            except BaseException:
                reading.rows = None
                raise
            if reading.is_used_up:
                reading.rows = None
                with self._lock:
                    self._readings.pop((file, group), None)


class ParquetCorpus:
    """Splits of Parquet files, in any place that a subclass can open."""

    scan_threads = 1
    is_remote = False  # whether what was read is worth keeping

    def __init__(self, columns: Columns) -> None:
        self.columns = columns
        self._kept = _Kept()
        self._audio_sizes: dict[str, int] = {}  # bytes by file, for files whose footer has been read

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._kept = _Kept()

    def files(self, split: str) -> list[str]:
        """List the files of a split, in order. Raises CorpusError if there is no such split."""
        raise NotImplementedError

    def require(self, split: str) -> None:
        self.files(split)

    def open(self, file: str, *, whole: bool = False) -> BinaryIO:
        """Open a file; with `whole`, its audio will be read and not only its metadata."""
        raise NotImplementedError

    def audio_folders(self, file: str) -> list[Path]:
        """List where the relative paths of a file's audio cells may begin; nowhere on the hub."""
        return []

    def provenance(self, split: str) -> dict[str, Any]:
        raise NotImplementedError

    @contextlib.contextmanager
    def _opened(self, file: str, *, whole: bool = False) -> Iterator[pq.ParquetFile]:
        """Open a file as Parquet.

        Raises:
            SourceError: the file is damaged, found now or while the body reads it.
        """
        options: dict[str, Any] = {"buffer_size": READ_BYTES} if whole else {"pre_buffer": True}
        with self.open(file, whole=whole) as stream:
            try:
                footer = self._kept.footer(file, stream) if self.is_remote else read_footer(stream)
                stream.seek(0)
                yield pq.ParquetFile(stream, metadata=footer, **options)
            except (FetchError, CorpusError):  # the network's fault, or one with its own message
                raise
            except (pa.ArrowException, OSError, ValueError) as error:
                raise SourceError(
                    f"{file!r} is not readable as Parquet ({one_line(error)}). Get the file again"
                ) from error

    def scan(self, split: str) -> pa.Table:
        files = self.files(split)
        with ThreadPoolExecutor(self.scan_threads) as threads:
            scanned = threads.map(self._scan_file, [f"{split}:{number}" for number in range(len(files))], files)
            parts = list(tqdm(scanned, f"listing {split}", len(files), unit="file", delay=2.0, disable=None))
        return pa.concat_tables([SCAN_SCHEMA.empty_table(), *parts])

    def _scan_file(self, place: str, file: str) -> pa.Table:
        with self._opened(file) as parquet:
            found, required = parquet.schema_arrow.names, [self.columns.id, self.columns.audio, self.columns.text]
            if missing := [name for name in required if name not in found]:
                raise CorpusError(
                    f"{file!r}: expected columns {', '.join(missing)} too, found {', '.join(found)}. "
                    "Name them in the recipe's corpus.columns"
                )
            kind = parquet.schema_arrow.field(self.columns.audio).type
            if not is_audio(kind):
                raise CorpusError(
                    f"{file!r}: expected {AUDIO_CELLS} in column {self.columns.audio!r}, found {kind}. Name "
                    "another column in the recipe's corpus.columns.audio"
                )
            self._audio_sizes[file] = self._audio_size(parquet.metadata)
            if self.columns.duration in found:
                return self._scan_groups(parquet, place, file)
        with self._opened(file, whole=True) as parquet:  # the recordings' headers give the durations
            return self._scan_groups(parquet, place, file)

    def _scan_groups(self, parquet: pq.ParquetFile, place: str, file: str) -> pa.Table:
        names = self.columns
        roles = {"utterance_id": names.id, "transcript": names.text, "duration_s": names.duration}
        roles |= {"speaker": names.speaker, "sex": names.sex, "source": names.source}
        columns = {role: name for role, name in roles.items() if name in parquet.schema_arrow.names}
        parts = [SCAN_SCHEMA.empty_table()]
        for group in range(parquet.num_row_groups):
            rows = parquet.read_row_group(group, columns=list(columns.values()))
            arrays = {role: _by_name(rows[name].combine_chunks(), name, rows.schema) for role, name in columns.items()}
            arrays["source_id"] = pa.array([f"{place}:{group}:{row}" for row in range(rows.num_rows)], pa.string())
            if "duration_s" not in arrays:
                durations = [duration_of(audio) for audio in self._iter_group(parquet, group, file)]
                arrays["duration_s"] = pa.array(durations, pa.float64())
            try:
                fields = [
                    arrays[field.name].cast(field.type) if field.name in arrays else pa.nulls(rows.num_rows, field.type)
                    for field in SCAN_SCHEMA
                ]
            except pa.ArrowException as error:
                raise CorpusError(
                    f"{file!r} row group {group}: expected columns of text, and durations in seconds, "
                    f"found {one_line(error)}. Correct the file, or set corpus.columns"
                ) from error
            parts.append(pa.table(fields, schema=SCAN_SCHEMA))
        return pa.concat_tables(parts)

    def audio_bytes(self, split: str) -> int | None:
        files = self.files(split)

        def read_size(file: str) -> None:
            with self._opened(file) as parquet:
                self._audio_sizes[file] = self._audio_size(parquet.metadata)

        with ThreadPoolExecutor(self.scan_threads) as threads:
            list(threads.map(read_size, [file for file in files if file not in self._audio_sizes]))
        return sum(self._audio_sizes[file] for file in files)

    def _audio_size(self, footer: pq.FileMetaData) -> int:
        columns = [
            footer.row_group(group).column(column)
            for group in range(footer.num_row_groups)
            for column in range(footer.num_columns)
        ]
        names = self.columns.audio, f"{self.columns.audio}.bytes"
        return sum(c.total_compressed_size for c in columns if c.path_in_schema in names)

    def _iter_group(self, parquet: pq.ParquetFile, group: int, file: str) -> Iterator[bytes]:
        """Yield the audio of a row group, row by row."""
        folders = self.audio_folders(file)
        for batch in parquet.iter_batches(
            READ_ROWS, row_groups=[group], columns=[self.columns.audio], use_threads=False
        ):
            for cell in batch.column(0):
                yield encoded_audio(cell, folders)

    def pieces(self, source_ids: Iterable[str]) -> list[list[str]]:
        by_group: dict[tuple[str, int, int], list[str]] = {}
        for split, number, group, row in sorted(map(_place, source_ids)):
            by_group.setdefault((split, number, group), []).append(f"{split}:{number}:{group}:{row}")
        return list(by_group.values())

    def read_audio(self, source_ids: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for piece in self.pieces(source_ids):
            split, number, group, _ = _place(piece[0])
            wanted = {_place(source_id)[3]: source_id for source_id in piece}
            rows, file = sorted(wanted), self.files(split)[number]
            with self._kept.reading(file, group) if self.is_remote else contextlib.nullcontext(_Reading()) as reading:
                if not reading.can_give(rows):
                    reading.num_rows, reading.rows = self._begin_group(file, group)
                    reading.next_row = 0
                    reading.passed.clear()
                for row, audio in reading.take(rows):
                    yield wanted[row], audio

    def _begin_group(self, file: str, group: int) -> tuple[int, Iterator[bytes]]:
        """Open a file; return the number of rows of one of its row groups, and their audio.

        The rows must not refer to the `_Reading` that keeps them: their buffers would wait for the cycle collector.
        """
        opened = contextlib.ExitStack()
        parquet = opened.enter_context(self._opened(file, whole=True))

        def rows() -> Iterator[bytes]:
            with opened:
                yield from self._iter_group(parquet, group, file)

        return parquet.metadata.row_group(group).num_rows, rows()


def _by_name(array: pa.Array, column: str | None, schema: pa.Schema) -> pa.Array:
    """Replace the numbers of a ClassLabel, a column of `datasets` whose names are in the file's metadata."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(column, {}).get("names")
    if not names or not pa.types.is_integer(array.type):
        return array
    return pa.array([None if i in (None, -1) else names[i] for i in array.to_pylist()], pa.string())  # -1: missing


def _place(source_id: str) -> tuple[str, int, int, int]:
    split, number, group, row = source_id.rsplit(":", 3)
    return split, int(number), int(group), int(row)


def read_footer(stream: BinaryIO) -> pq.FileMetaData:
    """Read a Parquet footer alone. Arrow would read the last 64 KiB, which contain audio.

    Raises:
        ValueError: the file is not Parquet.
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
    return pq.read_metadata(pa.BufferReader(b"PAR1" + stream.read(length) + tail))


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
        known = sorted({path.stem.split("-")[0] for path in self.root.rglob("*.parquet")})
        raise CorpusError(f"no split {split!r} in {str(self.root)!r}; found {', '.join(known)}")

    def open(self, file: str, *, whole: bool = False) -> BinaryIO:
        return Path(file).open("rb")

    def audio_folders(self, file: str) -> list[Path]:
        return [Path(file).parent, self.root]

    def provenance(self, split: str) -> dict[str, Any]:
        return {"kind": "parquet", "split": split, "files_digest": digest_files(map(Path, self.files(split)))}


class HubCorpus(ParquetCorpus):
    """A data set of the hub at one commit. `datasets` resolves config and split to files, read by byte ranges."""

    scan_threads = SCAN_THREADS
    is_remote = True

    def __init__(self, section: CorpusSection) -> None:
        super().__init__(section.columns)
        assert section.name is not None
        self.name, self.config, self.revision = section.name, section.config, section.revision
        self.fetch, self.timeout_s = section.fetch, section.fetch_patience_s

    @cached_property
    def _data_files(self) -> Mapping[str, list[str]]:
        return resolve_dataset(self.name, self.config, self.revision, self.timeout_s)

    def __getstate__(self) -> dict[str, Any]:
        """Resolve the data set before a copy goes to another process, so that decoding workers need not ask the hub."""
        return {**super().__getstate__(), "_data_files": self._data_files}

    def files(self, split: str) -> list[str]:
        if split not in self._data_files:
            raise CorpusError(f"no split {split!r} in {self.name!r}; found {', '.join(self._data_files)}")
        files = self._data_files[split]
        if not all(file.endswith(".parquet") for file in files):
            raise CorpusError(f"{self.name!r} split {split!r}: expected Parquet files, found {files[0]!r}")
        return files

    def open(self, file: str, *, whole: bool = False) -> BinaryIO:
        match = _HUB_PATH.match(file)
        if match is None:
            raise CorpusError(f"expected hf://datasets/<name>@<commit>/<file>, found {file!r} outside the hub")
        place = match.group("repo"), match.group("path"), match.group("revision")
        if whole and self.fetch == "files":
            return fetch_whole(*place, timeout_s=self.timeout_s).open("rb")
        return HubFile(*place, timeout_s=self.timeout_s)  # type: ignore[return-value]  # RawIOBase is what Arrow needs

    def provenance(self, split: str) -> dict[str, Any]:
        """Identify the data by the commit that the revision names; asks the hub unless it is a commit already."""
        revision = self.revision
        if not is_commit(revision):
            files = [file for files in self._data_files.values() for file in files]
            commits = {match.group("revision") for match in map(_HUB_PATH.match, files) if match}
            revision = commits.pop() if len(commits) == 1 else revision
        return {"kind": "hub", "name": self.name, "config": self.config, "split": split, "revision": revision}
