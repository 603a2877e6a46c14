"""The closing table of stage one: what is in the store, what is not and why, and where the time went.

Stored and quarantined utterances are counted from the commit records of the store, so those of all processes count.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow.parquet as pq

from cache import FeatureStore
from pipelines.corpora.no_speech import SOURCE

SECONDS_PER_HOUR = 3600
# Reasons that the recipe asks for, with its limits or its encoder; all others are faults of the data.
FILTERS = ("too_short", "too_long", "beyond_encoder")


@dataclass
class ExtractReport:
    """One execution of stage one, and the store after it."""

    store: str
    shards_written: int = 0
    shards_total: int = 0
    shards_repaired: int = 0  # damaged and made again, or about to be
    utterances: int = 0
    hours: float = 0.0
    no_speech: int = 0  # of the utterances
    quarantined: Counter[str] = field(default_factory=Counter)
    planned_out: dict[str, int] = field(default_factory=dict)
    store_bytes: int = 0
    seconds: float = 0.0
    is_complete: bool = False
    hours_now: float = 0.0  # encoded by this execution
    padding: float = 0.0  # fraction of the encoder's input that was padding
    line_s: float = 0.0  # seconds of all runs of the pipeline
    encoder_busy: float = 0.0  # fraction of line_s in which the encoder computed
    decode_s: float = 0.0  # seconds of all decoding workers, which work while the encoder does
    encode_s: float = 0.0
    write_s: float = 0.0  # seconds of writing and flushing shards, while the encoder works

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "quarantined": dict(self.quarantined)}

    def __str__(self) -> str:
        lines = [
            f"store        {self.store} ({self.store_bytes / 1e6:,.1f} MB)",
            f"shards       {self.shards_written} written now, {self.shards_total} in all" + self._state(),
            f"stored       {self.utterances:,} utterances, {self.hours:,.2f} h"
            + (f" ({self.no_speech:,} of them without speech)" if self.no_speech else ""),
            f"quarantined  {sum(self.quarantined.values()):,}" + listed(self.quarantined),
            f"left out     {sum(self.planned_out.values()):,} by the recipe's filters" + listed(self.planned_out),
        ]
        if self.shards_written:
            rate = self.hours_now * SECONDS_PER_HOUR / max(self.seconds, 1e-9)
            lines.append(
                f"time         {self.seconds:,.1f} s ({rate:,.1f}x real time; encoder busy "
                f"{100 * self.encoder_busy:.0f} %, padding {100 * self.padding:.1f} %)"
            )
        return "\n".join(lines)

    def _state(self) -> str:
        repaired = f"; {self.shards_repaired} found damaged" if self.shards_repaired else ""
        if not self.is_complete:
            return repaired + "; incomplete, run the same command again to resume"
        return repaired + ("" if self.shards_written else "; complete, nothing to do")

    def read_totals(self, store: FeatureStore) -> None:
        """Count what the commit records of the store list."""
        commits = [store.commit(shard) for shard in store.committed_shards()]
        self.shards_total, self.is_complete = store.num_shards, store.is_sealed
        self.utterances = sum(commit.num_utterances for commit in commits)
        self.hours = sum(commit.duration_s for commit in commits) / SECONDS_PER_HOUR
        self.quarantined = Quarantine(store).count()
        sources = pq.read_table(store.layout.plan, columns=["source", "shard"]).to_pydict()
        self.no_speech = sum(s == SOURCE and shard >= 0 for s, shard in zip(*sources.values(), strict=True))
        self.planned_out = planned_out(store)
        self.store_bytes = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())


class Quarantine:
    """Counts of the utterances that all writers of a store have quarantined; a new count reads only new shards."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._by_shard: dict[int, Counter[str]] = {}

    def count(self) -> Counter[str]:
        """Count the quarantined utterances of the committed shards, by reason."""
        committed = self._store.committed_shards()
        self._by_shard = {shard: self._by_shard.get(shard) or self._read(shard) for shard in committed}
        return sum(self._by_shard.values(), Counter[str]())

    def _read(self, shard: int) -> Counter[str]:
        if not self._store.commit(shard).num_quarantined:
            return Counter()
        lines = self._store.layout.quarantine(shard).read_text().splitlines()
        return Counter(json.loads(line)["reason"] for line in lines)


def planned_out(store: FeatureStore) -> dict[str, int]:
    """Count the utterances that the plan of a store rejected, by reason, the most frequent first."""
    rejected = store.layout.rejected
    lines = rejected.read_text().splitlines() if rejected.exists() else []
    return dict(Counter(json.loads(line)["reason"] for line in lines).most_common())


def faults_of_plan(rejected: Mapping[str, int]) -> Counter[str]:
    """Select the bad rows among those that a plan rejected: those that no filter of the recipe asked for."""
    return Counter({reason: count for reason, count in rejected.items() if reason not in FILTERS})


def listed(counts: Mapping[str, int]) -> str:
    """Format counts by reason: ": 3 undecodable, 1 too_long"; "" for none."""
    return ": " + ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) if counts else ""
