"""Write one shard: collect its frames, then place everything at once and commit.

Invariants: nothing of a shard is visible before its commit record; the record is placed last; an utterance is stored or
quarantined, never dropped. Where an utterance goes is the plan's business, so a shard's bytes do not depend on the
order in which its utterances come. Knows nothing of where the frames come from.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache.blocks import Rows
from cache.claims import Claim
from cache.commits import ArrayFile, Commit, PlainFile
from cache.errors import IncompleteShardError, LostClaimError, UnplannedUtteranceError
from cache.files import Buffers, exclusive, link_into_place, place, sync_directory, temporary_of, write_temporary
from cache.index import Quarantined, encode_index, encode_quarantine
from cache.layout import FILL, Header, Layout
from cache.quantize import Calibration, quantize
from cache.shards import encode_shard, num_chunks_used, shard_size

FLOAT16_MAX = 65_504.0

_Encoded = tuple[Buffers, Callable[[], ArrayFile | PlainFile]]  # the second once the first is written


class ShardWriter:
    """One shard on its way into the store; a context manager that commits on leaving without an exception."""

    def __init__(
        self,
        layout: Layout,
        header: Header,
        shard: int,
        plan: pa.Table,
        calibration: Calibration | None,
        claim: Claim,
        spare: list[NDArray[Any]],
    ) -> None:
        """Begin; see `FeatureStore.write_shard`.

        Args:
            spare: memory of shards already written; fresh memory costs as much time as writing half the shard.
        """
        self.shard, self.plan = shard, plan
        self._layout, self._header, self._calibration, self._claim = layout, header, calibration, claim
        self.split: str = plan["split"][0].as_py()
        starts = plan["row"].to_pylist()
        self._planned: dict[str, int] = dict(zip(plan["utterance_id"].to_pylist(), starts, strict=True))
        self._lengths: dict[int, int] = dict(zip(starts, plan["num_frames"].to_pylist(), strict=True))
        self._limits = _limits(self._lengths, header.block_rows)
        rows = header.rows_per_shard
        self._spare = spare
        self._features = spare.pop() if spare else np.empty((rows, header.dim), dtype=header.dtype)
        self._scales = np.empty(rows, dtype="<f2") if header.encoding == "int8" else None
        self._rows: dict[str, dict[str, Any]] = {}
        self._quarantined: list[Quarantined] = []
        self._num_clamped = 0

    @property
    def num_stored(self) -> int:
        return len(self._rows)

    @property
    def num_quarantined(self) -> int:
        return len(self._quarantined)

    def append(
        self,
        utterance_id: str,
        features: NDArray[np.floating],
        *,
        num_samples: int,
        duration_s: float,
        transcript: str,
        speaker: str | None = None,
        source: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> bool:
        """Store one utterance, or quarantine it if that cannot be done. The frames are copied.

        Args:
            features: (T, dim) float16 or float32, T >= 1; values beyond float16 are clamped and counted.
            num_samples, duration_s: of the recording that the frames were computed from.
            extra: anything else worth keeping; stored as JSON.

        Returns:
            Whether it was stored. If not, it is quarantined as "no_frames", "non_finite", "longer_than_planned" or
            "duplicate_id".

        Raises:
            UnplannedUtteranceError: the plan gives this utterance to another shard, or to none.
        """
        assert features.shape[1:] == (self._header.dim,), (features.shape, self._header.dim)
        return self._store(
            utterance_id,
            len(features),
            lambda row: self._put(row, features),
            {
                "num_samples": num_samples,
                "duration_s": duration_s,
                "transcript": transcript,
                "speaker": speaker,
                "source": source,
                "extra": None if extra is None else json.dumps(extra, sort_keys=True),
            },
        )

    def append_rows(self, rows: Rows, entry: Mapping[str, Any]) -> bool:
        """Store one utterance as another store of the same encoding and calibration holds it, bit for bit.

        Args:
            rows: what a reader's `read_rows` gave.
            entry: its row of that reader's index.
        """
        kept = ("num_samples", "duration_s", "transcript", "speaker", "source", "extra")
        return self._store(
            entry["utterance_id"],
            len(rows.features),
            lambda row: self._put_rows(row, rows),
            {name: entry[name] for name in kept},
        )

    def _store(self, utterance_id: str, length: int, put: Callable[[int], bool], entry: Mapping[str, Any]) -> bool:
        self._check_planned(utterance_id)
        if utterance_id in self._rows:
            return self.quarantine(utterance_id, "duplicate_id", "stored once already; the later copy was left out")
        if not length:
            return self.quarantine(utterance_id, "no_frames", "the encoder gave no frames")
        row = self._place(utterance_id, length)
        if row is None:
            return self.quarantine(utterance_id, "longer_than_planned", f"{length} frames do not fit")
        if not put(row):
            return self.quarantine(utterance_id, "non_finite", "the features hold NaN or infinity")
        self._rows[utterance_id] = {
            "utterance_id": utterance_id,
            "split": self.split,
            "shard": self.shard,
            "start": self.shard * self._header.rows_per_shard + row,
            "num_frames": length,
            **entry,
        }
        return True

    def quarantine(self, utterance_id: str, reason: str, detail: str = "") -> bool:
        """Record that an utterance is not stored, and why.

        Args:
            reason: a short name that can be counted, such as "undecodable".

        Returns:
            False, so that a caller can return what `append` would.

        Raises:
            UnplannedUtteranceError: the plan gives this utterance to another shard, or to none.
        """
        self._check_planned(utterance_id)
        self._quarantined.append(
            Quarantined(utterance_id=utterance_id, split=self.split, shard=self.shard, reason=reason, detail=detail)
        )
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._claim.release()
            self._spare.append(self._features)
            del self._features  # nothing can be appended any more

    def _check_planned(self, utterance_id: str) -> None:
        if utterance_id not in self._planned:
            raise UnplannedUtteranceError(
                f"utterance {utterance_id!r} is not planned for shard {self.shard} of {str(self._layout.root)!r}. "
                "Append only what the plan of this shard names."
            )

    def _place(self, utterance_id: str, length: int) -> int | None:
        """Find rows: those planned, or, if the plan was too short, the end of a room that has enough left."""
        planned = self._planned[utterance_id]
        if planned + length <= self._limits[planned]:
            self._lengths[planned] = length
            return planned
        for row, limit in self._limits.items():
            if limit - length >= row + self._lengths[row]:
                self._limits[row] = limit - length
                return limit - length
        return None

    def _put(self, row: int, features: NDArray[np.floating]) -> bool:
        """Encode frames into their rows; False if a value is not finite."""
        rows = slice(row, row + len(features))
        if self._scales is not None:
            assert self._calibration is not None
            if not np.isfinite(features).all():
                return False
            self._features[rows], self._scales[rows] = quantize(features, self._calibration)
            return True
        stored = self._features[rows]
        with np.errstate(over="ignore"):
            stored[...] = features
        if _is_finite(stored):
            return True
        if not np.isfinite(features).all():
            return False
        self._num_clamped += int(np.count_nonzero(~np.isfinite(stored)))
        stored[...] = np.clip(features, -FLOAT16_MAX, FLOAT16_MAX)
        return True

    def _put_rows(self, row: int, rows: Rows) -> bool:
        place = slice(row, row + len(rows.features))
        self._features[place] = rows.features
        if self._scales is not None:
            self._scales[place] = rows.scales
        return True

    def _commit(self) -> None:
        """Place the files of the shard, then its record."""
        self._check_complete()
        layout = self._layout
        encoded = self._encode_arrays() | self._encode_files()
        owner = self._claim.owner
        try:
            with ThreadPoolExecutor(len(encoded)) as pool:  # the disk flushes several files as fast as the largest
                list(pool.map(lambda path: write_temporary(path, encoded[path][0], owner), encoded))
            commit_shard(layout, self._claim, self.shard, encoded, self._record(encoded))
        finally:
            for path in encoded:
                temporary_of(path, owner).unlink(missing_ok=True)

    def _check_complete(self) -> None:
        done = self._rows.keys() | {line["utterance_id"] for line in self._quarantined}
        missing = [utterance_id for utterance_id in self._planned if utterance_id not in done]
        if missing:
            raise IncompleteShardError(
                f"shard {self.shard} of {str(self._layout.root)!r} was closed with {len(missing)} of "
                f"{len(self._planned)} planned utterances neither stored nor quarantined, the first being "
                f"{missing[0]!r}. Append or quarantine every one; nothing was committed."
            )

    def _encode_arrays(self) -> dict[Path, _Encoded]:
        header = self._header
        rows = sorted((row["start"] % header.rows_per_shard, row["num_frames"]) for row in self._rows.values())
        used = num_chunks_used(max((start + length for start, length in rows), default=0), header.chunk_rows)
        chunks_per_shard = header.rows_per_shard // header.chunk_rows
        encoded: dict[Path, _Encoded] = {}
        arrays = ("features", self._features, FILL[header.encoding]), ("scales", self._scales, np.nan)
        for name, array, fill in arrays:
            if array is not None:
                _fill_gaps(array[: used * header.chunk_rows], rows, fill)
                chunks = array[: used * header.chunk_rows].reshape(used, header.chunk_rows, *array.shape[1:])
                checksums = np.empty(used, np.uint32)
                size = shard_size(used, chunks_per_shard, chunks.nbytes // max(used, 1))
                encoded[self._layout.array(name, self.shard)] = (
                    encode_shard(chunks, chunks_per_shard, checksums),
                    partial(ArrayFile.of, size, checksums),
                )
        return encoded

    def _encode_files(self) -> dict[Path, _Encoded]:
        files = {
            self._layout.index(self.shard): encode_index(list(self._rows.values())),
            self._layout.quarantine(self.shard): encode_quarantine(self._quarantined),
        }
        return {path: ([content], partial(PlainFile.of, content)) for path, content in files.items()}

    def _record(self, encoded: Mapping[Path, _Encoded]) -> Commit:
        rows, header = self._rows.values(), self._header
        named = {path.relative_to(self._layout.root).as_posix(): describe() for path, (_, describe) in encoded.items()}
        return Commit(
            format=header.format,
            shard=self.shard,
            split=self.split,
            fingerprint_id=header.fingerprint_id,
            plan_id=header.plan_id,
            num_utterances=len(rows),
            num_frames=sum(row["num_frames"] for row in rows),
            num_quarantined=len(self._quarantined),
            num_clamped=self._num_clamped,
            duration_s=sum(row["duration_s"] for row in rows),
            arrays={name: file for name, file in named.items() if isinstance(file, ArrayFile)},
            files={name: file for name, file in named.items() if isinstance(file, PlainFile)},
            writer=str(self._claim.owner),
            finished_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


# ------------------------------------------------------------------------------------------- the protocol


def claim_shard(layout: Layout, header: Header, shard: int) -> Claim | None:
    """Claim a shard that is not committed, and clear away what a writer left of it that died before its commit.

    Returns:
        The claim; None if the shard is committed or a living writer is at it.
    """
    if layout.commit(shard).exists() or (claim := Claim.take(layout, shard)) is None:
        return None
    with exclusive(layout.lock):
        if claim.is_mine() and not layout.commit(shard).exists():
            for path in layout.files_of(shard, header).values():
                path.unlink(missing_ok=True)
            return claim
    claim.release()
    return None


def commit_shard(layout: Layout, claim: Claim, shard: int, paths: Iterable[Path], record: Commit) -> None:
    """Link the finished temporary files of a shard to their names, then its record. Nothing is ever replaced.

    Raises:
        LostClaimError: another writer took the shard over; what it placed stands.
        DiskFullError: a directory cannot grow.
    """
    paths = list(paths)
    with exclusive(layout.lock):
        try:
            _check_uncontested(layout, claim, shard)
            for path in paths:
                link_into_place(temporary_of(path, claim.owner), path)
            with ThreadPoolExecutor(len(paths)) as pool:
                list(pool.map(sync_directory, {path.parent for path in paths}))
            _check_uncontested(layout, claim, shard)  # again: without kernel locks another may have cleared these names
            place(layout.commit(shard), [record.encode()], claim.owner)
        except (FileExistsError, FileNotFoundError) as error:  # only without kernel locks
            raise _lost(layout, shard) from error


def _check_uncontested(layout: Layout, claim: Claim, shard: int) -> None:
    if not claim.is_mine() or layout.commit(shard).exists():
        raise _lost(layout, shard)


def _lost(layout: Layout, shard: int) -> LostClaimError:
    return LostClaimError(
        f"another writer took over shard {shard} of {str(layout.root)!r} while this one seemed dead; its work stands "
        "and this copy was dropped. Continue with the next shard."
    )


# ------------------------------------------------------------------------------------------- rows


def _limits(lengths: Mapping[int, int], block_rows: int) -> dict[int, int]:
    """Give the row at which each planned row's room ends: the next planned row, or the end of its last block."""
    ordered = sorted(lengths)
    ends = [-(-(row + lengths[row]) // block_rows) * block_rows for row in ordered]
    return dict(zip(ordered, map(min, ends, [*ordered[1:], ends[-1]]), strict=True))


def _fill_gaps(array: NDArray[Any], rows: list[tuple[int, int]], fill: float) -> None:
    end = 0
    for start, length in rows:
        array[end:start] = fill
        end = start + length
    array[end:] = fill


def _is_finite(values: NDArray[np.float16]) -> bool:
    """Test the exponents themselves: several times faster than `isfinite` on half precision."""
    return not len(values) or int((values.view(np.uint16) << 1).max()) < 0xF800
