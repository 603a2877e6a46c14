"""What stage one will do, decided from metadata alone: which utterances, how many frames, how many bytes.

Also the fingerprint: everything that decides what a stored row holds.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cache import make_plan
from pipelines.corpora import Corpus
from pipelines.errors import CorpusError
from pipelines.recipes import Recipe
from pipelines.transcripts import prepare_transcript
from tinyaudio.audio import HOP_LENGTH, RESAMPLER, SAMPLING_RATE, WINDOW_LENGTH, num_frames

FRAME_BYTES = {"float16": 2, "int8": 1}  # per feature; int8 adds a float16 scale per frame


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work of one extraction.

    Args:
        table: what `cache.make_plan` gives, with transcript, speaker, sex, source and duration_s kept beside it.
        splits: in store order.
    """

    table: pa.Table
    splits: tuple[str, ...]
    rows_per_shard: int

    @property
    def num_shards(self) -> int:
        return int(self.table["shard"].to_numpy().max(initial=-1)) + 1

    @property
    def accepted(self) -> pa.Table:
        return self.table.filter(pa.array(self.table["shard"].to_numpy() >= 0))

    def rejected(self) -> dict[str, int]:
        """Count planned-out utterances by reason."""
        shards = self.table["shard"].to_numpy()
        reasons = np.array(self.table["reason"].to_pylist(), dtype=object)[shards < 0]
        return dict(Counter(reasons.tolist()).most_common())


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """What `--plan` says; bytes are of whole shards, as they will lie on the disk."""

    splits: list[str]
    utterances: int
    rejected: dict[str, int]
    hours: float
    frames: int
    shards: int
    bytes: dict[str, int]
    free_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        size = ", ".join(f"{count / 1e9:.2f} GB as {encoding}" for encoding, count in self.bytes.items())
        rejected = ", ".join(f"{count} {reason}" for reason, count in self.rejected.items()) or "none"
        return (
            f"splits      {', '.join(self.splits)}\n"
            f"utterances  {self.utterances:,} ({self.hours:,.2f} h, {self.frames:,} frames)\n"
            f"left out    {rejected}\n"
            f"store       {self.shards:,} shards: {size}\n"
            f"free disk   {self.free_bytes / 1e9:.2f} GB"
        )


def plan_corpus(recipe: Recipe, corpus: Corpus, splits: Sequence[str]) -> Plan:
    """Scan a corpus and give every utterance a shard or a reason.

    Raises:
        CorpusError: a split that is not there, or one with nothing to store in it.
    """
    tables = []
    for split in splits:
        table = _with_reasons(recipe, corpus.scan(split), split)
        if not (table["reason"].to_numpy() == "").any():
            reasons = dict(Counter(table["reason"].to_pylist()))
            raise CorpusError(f"split {split!r} has nothing to store ({reasons or 'no rows'}); check the recipe's filters")
        tables.append(table)
    rows = recipe.store.rows_per_shard
    return Plan(table=make_plan(pa.concat_tables(tables), rows_per_shard=rows), splits=tuple(splits), rows_per_shard=rows)


def _with_reasons(recipe: Recipe, scanned: pa.Table, split: str) -> pa.Table:
    """Add split, num_frames, the prepared transcript and, for what is left out, the reason."""
    section = recipe.corpus
    durations = [-1.0 if d is None or not np.isfinite(d) else float(d) for d in scanned["duration_s"].to_pylist()]
    texts = [prepare_transcript(text, section) for text in scanned["transcript"].to_pylist()]
    reasons = [_reason(d, text, recipe) for d, text in zip(durations, texts, strict=True)]
    frames = [num_frames(round(max(d, 0.0) * SAMPLING_RATE)) for d in durations]
    ids = [i or f"{split}/{s}" for i, s in zip(*(scanned[c].to_pylist() for c in ("utterance_id", "source_id")), strict=True)]
    kept = scanned.select(["source_id", "speaker", "sex", "source"])
    added = {
        "utterance_id": pa.array(ids, pa.string()),
        "split": pa.array([split] * len(ids), pa.string()),
        "num_frames": pa.array(frames, pa.int32()),
        "transcript": pa.array(texts, pa.string()),
        "reason": pa.array(reasons, pa.string()),
    }
    for name, column in added.items():
        kept = kept.append_column(name, column)
    return kept


def _reason(duration_s: float, transcript: str, recipe: Recipe) -> str:
    section = recipe.corpus
    if duration_s < 0:
        return ""  # unreadable header: stage one tries to decode it, and says why it cannot
    if duration_s < section.min_duration_s:
        return "too_short"
    if duration_s > section.max_duration_s:
        return "too_long"
    return "" if transcript else "no_text"


def summarize(plan: Plan, dim: int, store: Path) -> PlanSummary:
    """Add up a plan for features of `dim` values, stored at `store`."""
    accepted = plan.accepted
    frames = int(np.sum(accepted["num_frames"].to_numpy(), dtype=np.int64))
    rows = plan.num_shards * plan.rows_per_shard
    parent = next(folder for folder in [store, *store.absolute().parents] if folder.exists())
    return PlanSummary(
        splits=list(plan.splits),
        utterances=len(accepted),
        rejected=plan.rejected(),
        hours=(frames * HOP_LENGTH + len(accepted) * (WINDOW_LENGTH - HOP_LENGTH)) / SAMPLING_RATE / 3600,
        frames=frames,
        shards=plan.num_shards,
        bytes={name: rows * (dim * size + (2 if name == "int8" else 0)) for name, size in FRAME_BYTES.items()},
        free_bytes=shutil.disk_usage(parent).free,
    )


def audio_fingerprint() -> dict[str, Any]:
    """Describe what happens to samples before the encoder."""
    return {
        "sampling_rate": SAMPLING_RATE,
        "resampler": RESAMPLER,
        "channels": "mean",
        "frames": f"(samples - {WINDOW_LENGTH}) // {HOP_LENGTH} + 1",
        "short": f"zero-padded to {WINDOW_LENGTH} samples",
        "batching": "zero-padded with attention mask, frames behind the end dropped",
    }


def corpus_fingerprint(recipe: Recipe, corpus: Corpus, splits: Sequence[str]) -> dict[str, Any]:
    """Describe which data this is and what the recipe's filters and text policy make of it."""
    section = recipe.corpus
    policy = section.model_dump(include={"min_duration_s", "max_duration_s", "text_case", "text_punctuation"})
    return {"splits": {split: corpus.provenance(split) for split in splits}, **policy}
