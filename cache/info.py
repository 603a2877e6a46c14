"""Describing a store, and comparing two. Returns values; printing is left to the caller."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from cache.create import compare_fields
from cache.errors import CorruptShardError
from cache.index import decode_quarantine, read_committed
from cache.owners import Owner
from cache.reader import FeatureReader
from cache.store import FeatureStore

DURATION_EDGES_S = (0, 1, 2, 5, 10, 15, 20, 30, 60)  # the last class is open
Paths = str | os.PathLike[str]


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What a store holds, who wrote it, and how complete it is."""

    path: str
    format: int
    encoding: str
    dim: int
    fingerprint_id: str
    fingerprint: dict[str, Any]
    plan_id: str
    calibration_id: str | None
    num_shards: int
    num_committed: int
    is_sealed: bool
    num_planned: int
    num_utterances: int
    num_frames: int
    num_clamped: int
    hours: float
    size_bytes: int
    splits: dict[str, dict[str, float]]  # split -> utterances, hours, shards
    quarantine: dict[str, int]  # reason -> utterances
    durations: dict[str, int]  # "2-5 s" -> utterances
    writers: dict[str, int]  # host -> shards
    first_commit: str | None  # UTC, ISO 8601
    last_commit: str | None

    def to_table(self) -> str:
        """Format the description as text."""
        lines = [
            f"store        {self.path}",
            f"holds        {self.num_utterances:,} utterances, {self.hours:,.2f} h, {self.num_frames:,} frames of "
            f"{self.dim} x {self.encoding}, {self.size_bytes / 1e9:,.3f} GB",
            f"complete     {self.num_committed:,} of {self.num_shards:,} shards"
            + (", sealed" if self.is_sealed else ", not sealed"),
            f"fingerprint  {self.fingerprint_id[:12]}    plan {self.plan_id[:12]}"
            + (f"    calibration {self.calibration_id[:12]}" if self.calibration_id else ""),
        ]
        lines += [
            f"split        {name:<12} {int(part['utterances']):>10,} utterances {part['hours']:>10,.2f} h"
            for name, part in self.splits.items()
        ]
        lines += [f"duration     {name:<12} {count:>10,} utterances" for name, count in self.durations.items() if count]
        lines += [f"quarantine   {reason:<22} {count:>10,}" for reason, count in self.quarantine.items()]
        lines += [f"written by   {host:<22} {count:>10,} shards" for host, count in self.writers.items()]
        if self.num_clamped:
            lines.append(f"clamped      {self.num_clamped:,} values to the range of float16")
        if self.last_commit:
            lines.append(f"written      {self.first_commit} to {self.last_commit}")
        return "\n".join(lines)


def store_info(path: Paths) -> StoreInfo:
    """Describe a store from its records and indexes, without reading features; errors as `FeatureReader`."""
    reader = FeatureReader(path)
    store, commits = reader.store, reader.commits.values()
    splits: dict[str, dict[str, float]] = {}
    writers: Counter[str] = Counter()
    for commit in commits:
        part = splits.setdefault(commit.split, {"utterances": 0, "hours": 0.0, "shards": 0})
        part["utterances"] += commit.num_utterances
        part["hours"] += commit.duration_s / 3600
        part["shards"] += 1
        owner = Owner.parse(commit.writer)
        writers[commit.writer if owner is None else owner.machine] += 1
    try:
        quarantined = decode_quarantine(store.layout.rejected.read_bytes())
    except (OSError, ValueError) as error:
        found = f"quarantine/{store.layout.rejected.name} cannot be read ({error})"
        raise CorruptShardError(store.path, None, found) from error
    for commit in commits:
        if commit.num_quarantined:
            quarantined += decode_quarantine(read_committed(store.path, commit, "quarantine"))
    finished = sorted(commit.finished_at for commit in commits)
    counts, _ = np.histogram(np.asarray(reader.index["duration_s"]), [*DURATION_EDGES_S, np.inf])
    classes = [*(f"{low}-{high} s" for low, high in pairwise(DURATION_EDGES_S)), f"{DURATION_EDGES_S[-1]} s or more"]
    return StoreInfo(
        path=str(store.path),
        format=store.header.format,
        encoding=store.encoding,
        dim=store.dim,
        fingerprint_id=store.fingerprint_id,
        fingerprint=store.fingerprint,
        plan_id=store.header.plan_id,
        calibration_id=store.header.calibration_id,
        num_shards=store.num_shards,
        num_committed=len(commits),
        is_sealed=store.is_sealed,
        num_planned=store.header.num_planned,
        num_utterances=sum(commit.num_utterances for commit in commits),
        num_frames=sum(commit.num_frames for commit in commits),
        num_clamped=sum(commit.num_clamped for commit in commits),
        hours=sum(commit.duration_s for commit in commits) / 3600,
        size_bytes=sum(commit.size_bytes for commit in commits),
        splits=splits,
        quarantine=dict(Counter(line["reason"] for line in quarantined).most_common()),
        durations=dict(zip(classes, counts.tolist(), strict=True)),
        writers=dict(writers),
        first_commit=finished[0] if finished else None,
        last_commit=finished[-1] if finished else None,
    )


def store_diff(path: Paths, other: Paths) -> dict[str, tuple[Any, Any]]:
    """Compare two stores: field -> (value in the first, in the second) where they differ; none: the same extraction."""
    return compare_fields(FeatureStore.open(path).header.identity(), FeatureStore.open(other).header.identity())
