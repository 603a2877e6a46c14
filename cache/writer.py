"""Writing one shard: its frames are collected in memory, then its files are put in place and committed.

Invariants: nothing of a shard is visible before its commit record, which is placed last; an utterance is stored or
quarantined, never dropped. The plan decides where an utterance goes, so a shard's bytes do not depend on the order in
which its utterances arrive. Knows nothing of where the frames come from.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache.blocks import Rows
from cache.claims import Claim
from cache.commits import ArrayFile, Commit, PlainFile
from cache.errors import IncompleteShardError, LostClaimError, UnplannedUtteranceError
from cache.files import Buffers, exclusive, link_into_place, place, sync, temporary_of, write_temporary
from cache.index import Quarantined, encode_index, encode_quarantine
from cache.layout import Header, Layout
from cache.quantize import Calibration, quantize
from cache.shards import encode_shard, shard_size

FLOAT16_MAX = 65_504.0


class ShardWriter:
    """The writer of one shard; a context manager that commits when it is left without an exception."""

    def __init__(
        self,
        layout: Layout,
        header: Header,
        shard: int,
        plan: pa.Table,
        calibration: Calibration | None,
        claim: Claim,
        spare_arrays: list[dict[str, NDArray[Any]]],
    ) -> None:
        """Begin a shard; see `FeatureStore.write_shard`.

        Args:
            spare_arrays: memory of shards already written, since fresh memory costs half the time of writing the shard.
        """
        self.shard, self.plan = shard, plan
        self._layout, self._header, self._calibration, self._claim = layout, header, calibration, claim
        self.split: str = plan["split"][0].as_py()
        starts = plan["row"].to_pylist()
        self._planned: dict[str, int] = dict(zip(plan["utterance_id"].to_pylist(), starts, strict=True))
        self._lengths: dict[int, int] = dict(zip(starts, plan["num_frames"].to_pylist(), strict=True))
        # Where the space after each planned row ends: at the next planned row, or at the end of its last block.
        rows = sorted(self._lengths)
        ends = [-(-(row + self._lengths[row]) // header.block_rows) * header.block_rows for row in rows]
        self._limits: dict[int, int] = dict(zip(rows, map(min, ends, [*rows[1:], ends[-1]]), strict=True))
        self._spare_arrays = spare_arrays
        self._arrays = (
            spare_arrays.pop()
            if spare_arrays
            else {name: np.empty((header.rows_per_shard, *a.row_shape), a.dtype) for name, a in header.arrays.items()}
        )
        self._stored: dict[str, dict[str, Any]] = {}
        self._quarantined: list[Quarantined] = []
        self._num_clamped = 0

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
        """Store one utterance, or quarantine it if it cannot be stored. The frames are copied.

        Args:
            features: (T, dim) float16 or float32, T >= 1; values beyond float16 are clamped and counted.
            num_samples, duration_s: of the recording that the frames were computed from.
            extra: further values to keep; stored as JSON.

        Returns:
            Whether it was stored. If not, it is quarantined as "no_frames", "non_finite", "longer_than_planned" or
            "duplicate_id".

        Raises:
            UnplannedUtteranceError: the plan gives this utterance to another shard, or to none.
        """
        assert features.shape[1:] == (self._header.dim,), (features.shape, self._header.dim)
        row = self._find_rows(utterance_id, len(features))
        if row is None:
            return False
        if not self._put(row, features):
            return self.quarantine(utterance_id, "non_finite", "the features hold NaN or infinity")
        entry = {
            "utterance_id": utterance_id,
            "num_samples": num_samples,
            "duration_s": duration_s,
            "transcript": transcript,
            "speaker": speaker,
            "source": source,
            "extra": None if extra is None else json.dumps(extra, sort_keys=True),
        }
        return self._add_to_index(row, len(features), entry)

    def append_rows(self, rows: Rows, entry: Mapping[str, Any], *, num_clamped: int = 0) -> bool:
        """Store one utterance whose rows are encoded already: copied from another store, or encoded on a GPU.

        Args:
            rows: finite, in this store's encoding and calibration; copied bit for bit.
            entry: its row of an index; columns beyond those of `append` are ignored.
            num_clamped: values that were beyond float16.
        """
        row = self._find_rows(entry["utterance_id"], len(rows.features))
        if row is None:
            return False
        place = slice(row, row + len(rows.features))
        self._arrays["features"][place] = rows.features
        if rows.scales is not None:
            self._arrays["scales"][place] = rows.scales
        self._num_clamped += num_clamped
        return self._add_to_index(row, len(rows.features), entry)

    def quarantine(self, utterance_id: str, reason: str, detail: str = "") -> bool:
        """Record that an utterance is not stored, and why; errors as `append`.

        Args:
            reason: a short name that can be counted, such as "undecodable".

        Returns:
            False, so that a caller can return it as `append` does.
        """
        self._check_planned(utterance_id)
        self._quarantined.append(
            Quarantined(utterance_id=utterance_id, split=self.split, shard=self.shard, reason=reason, detail=detail)
        )
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._claim.release()
            self._spare_arrays.append(self._arrays)
            del self._arrays  # nothing can be appended any more

    def _check_planned(self, utterance_id: str) -> None:
        if utterance_id not in self._planned:
            raise UnplannedUtteranceError(
                f"utterance {utterance_id!r} is not planned for shard {self.shard} of {str(self._layout.root)!r}. "
                "Append only the utterances that the plan lists for this shard."
            )

    def _find_rows(self, utterance_id: str, length: int) -> int | None:
        """Reserve `length` rows for an utterance; if that is not possible, quarantine it.

        They are the planned rows. If the plan was too short, they come from the end of any space with enough rows left.
        """
        self._check_planned(utterance_id)
        if utterance_id in self._stored:
            self.quarantine(utterance_id, "duplicate_id", "it is stored already; the later copy was omitted")
            return None
        if not length:
            self.quarantine(utterance_id, "no_frames", "the encoder gave no frames")
            return None
        planned = self._planned[utterance_id]
        if planned + length <= self._limits[planned]:
            self._lengths[planned] = length
            return planned
        for row, limit in self._limits.items():
            if limit - length >= row + self._lengths[row]:
                self._limits[row] = limit - length
                return limit - length
        self.quarantine(utterance_id, "longer_than_planned", f"{length} frames do not fit")
        return None

    def _put(self, row: int, features: NDArray[np.floating]) -> bool:
        """Encode frames into their rows; False if a value is not finite."""
        rows = slice(row, row + len(features))
        stored = self._arrays["features"][rows]
        if self._calibration is not None and self._header.bits is not None:
            if not np.isfinite(features).all():
                return False
            stored[...], self._arrays["scales"][rows] = quantize(features, self._calibration, self._header.bits)
            return True
        with np.errstate(over="ignore"):
            stored[...] = features
        if int((stored.view(np.uint16) << 1).max()) < 0xF800:  # exponents: 15 times faster than isfinite on float16
            return True
        if not np.isfinite(features).all():
            return False
        self._num_clamped += int(np.count_nonzero(~np.isfinite(stored)))
        stored[...] = np.clip(features, -FLOAT16_MAX, FLOAT16_MAX)
        return True

    def _add_to_index(self, row: int, length: int, entry: Mapping[str, Any]) -> bool:
        kept = ("utterance_id", "num_samples", "duration_s", "transcript", "speaker", "source", "extra")
        self._stored[entry["utterance_id"]] = {
            **{name: entry[name] for name in kept},
            "split": self.split,
            "shard": self.shard,
            "start": self.shard * self._header.rows_per_shard + row,
            "num_frames": length,
        }
        return True

    def _commit(self) -> None:
        """Write the files of the shard, put them in place, then place the commit record."""
        layout, header, stored = self._layout, self._header, self._stored.values()
        done = self._stored.keys() | {line["utterance_id"] for line in self._quarantined}
        if missing := [utterance_id for utterance_id in self._planned if utterance_id not in done]:
            raise IncompleteShardError(
                f"shard {self.shard} of {str(layout.root)!r} was closed with {len(missing)} of {len(self._planned)} "
                f"planned utterances neither stored nor quarantined, the first being {missing[0]!r}. Append or "
                "quarantine every one; nothing was committed."
            )
        spans = sorted((row["start"] % header.rows_per_shard, row["num_frames"]) for row in stored)
        num_chunks = -(-max((start + length for start, length in spans), default=0) // header.chunk_rows)
        num_rows, chunks_per_shard = num_chunks * header.chunk_rows, header.rows_per_shard // header.chunk_rows
        contents: dict[Path, Buffers] = {}
        checksums: dict[str, NDArray[np.uint32]] = {}
        for name, array in self._arrays.items():
            end = 0
            for start, length in [*spans, (num_rows, 0)]:
                array[end:start] = header.arrays[name].fill_value
                end = start + length
            chunks = array[:num_rows].reshape(num_chunks, header.chunk_rows, *array.shape[1:])
            checksums[name] = np.empty(num_chunks, np.uint32)
            contents[layout.array(name, self.shard)] = encode_shard(chunks, chunks_per_shard, checksums[name])
        plain_files = {
            layout.index(self.shard): encode_index(list(stored)),
            layout.quarantine(self.shard): encode_quarantine(self._quarantined),
        }
        contents |= {path: [content] for path, content in plain_files.items()}
        owner = self._claim.owner
        try:
            with ThreadPoolExecutor(len(contents)) as pool:  # the disk flushes several files as fast as the largest
                list(pool.map(lambda path: write_temporary(path, contents[path], owner), contents))
            arrays = {
                layout.array(name, self.shard): ArrayFile.of(
                    shard_size(num_chunks, chunks_per_shard, header.chunk_bytes(name)), checksums[name]
                )
                for name in self._arrays
            }
            record = Commit(
                format=header.format,
                shard=self.shard,
                split=self.split,
                fingerprint_id=header.fingerprint_id,
                plan_id=header.plan_id,
                num_utterances=len(stored),
                num_frames=sum(row["num_frames"] for row in stored),
                num_quarantined=len(self._quarantined),
                num_clamped=self._num_clamped,
                duration_s=sum(row["duration_s"] for row in stored),
                arrays={path.relative_to(layout.root).as_posix(): file for path, file in arrays.items()},
                files={
                    path.relative_to(layout.root).as_posix(): PlainFile.of(content)
                    for path, content in plain_files.items()
                },
                writer=str(owner),
                finished_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            )
            commit_shard(layout, self._claim, self.shard, contents, record)
        finally:
            for path in contents:
                temporary_of(path, owner).unlink(missing_ok=True)


def claim_shard(layout: Layout, header: Header, shard: int) -> Claim | None:
    """Claim a shard, and remove what a dead writer left of it; None if it is committed, or a living writer holds it."""
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
        LostClaimError: another writer took over the shard; its files are kept.
        DiskFullError: a directory cannot grow.
    """
    paths = list(paths)
    lost = LostClaimError(
        f"another writer took over shard {shard} of {str(layout.root)!r}, since this one did not respond; its files "
        "are kept and this copy was dropped. Continue with the next shard."
    )
    with exclusive(layout.lock):
        try:
            if not _is_uncontested(layout, claim, shard):
                raise lost
            for path in paths:
                link_into_place(temporary_of(path, claim.owner), path)
            with ThreadPoolExecutor(len(paths)) as pool:
                list(pool.map(sync, {path.parent for path in paths}))
            if not _is_uncontested(layout, claim, shard):  # without kernel locks another may have removed these files
                raise lost
            place(layout.commit(shard), [record.encode()], claim.owner)
        except (FileExistsError, FileNotFoundError) as error:  # only without kernel locks
            raise lost from error


def _is_uncontested(layout: Layout, claim: Claim, shard: int) -> bool:
    return claim.is_mine() and not layout.commit(shard).exists()
