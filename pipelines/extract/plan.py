"""What stage one will do, decided from metadata alone: which utterances, where in the store, how many frames.

Also the fingerprint: everything that decides what a stored row holds.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cache import make_plan
from pipelines.corpora.corpus import Corpus
from pipelines.corpora.no_speech import is_no_speech, no_speech_rows
from pipelines.corpora.transcripts import prepare_transcript
from pipelines.errors import CorpusError
from pipelines.extract.kept_scans import scan_once
from pipelines.recipes import Recipe
from pipelines.recipes.recipe import CorpusSection
from tinyaudio.model.audio import HOP_LENGTH, RESAMPLER, SAMPLING_RATE, WINDOW_LENGTH, num_frames

SCAN_ROWS = 100_000  # utterances whose text is in Python's hands at once
TEXT_GRACE_S = 1.0  # very short clips may be dense: "twenty-five percent" in 0.6 s
POLICY = {
    "min_duration_s",
    "max_duration_s",
    "max_chars_per_s",
    "text_case",
    "text_punctuation",
    "text_tags",
    "no_speech",
}


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
        """Count planned-out utterances by reason, the most frequent first."""
        return dict(Counter(self._rejected["reason"].to_pylist()).most_common())

    def rejected_hours(self) -> dict[str, float]:
        """Add up the hours of planned-out utterances by reason."""
        hours: dict[str, float] = {}
        for reason, duration_s in zip(*(self._rejected[n].to_pylist() for n in ("reason", "duration_s")), strict=True):
            hours[reason] = hours.get(reason, 0.0) + (duration_s or 0.0) / 3600
        return hours

    @property
    def _rejected(self) -> pa.Table:
        return self.table.filter(pa.array(self.table["shard"].to_numpy() < 0))


def plan_corpus(recipe: Recipe, corpus: Corpus, splits: Sequence[str], store: Path | None = None) -> Plan:
    """Scan a corpus and give every utterance a shard or a reason.

    Args:
        store: where it will lie; the scan is kept beside it, for who plans the same again.

    Raises:
        CorpusError: a split that is not there, or one with nothing to store in it.
    """
    tables = []
    for split in splits:
        scanned = corpus.scan(split) if store is None else scan_once(corpus, recipe.corpus.columns, split, store)
        table = _prepared(recipe.corpus, scanned, split)
        if not (table["reason"].to_numpy() == "").any():
            reasons = dict(Counter(table["reason"].to_pylist()))
            raise CorpusError(
                f"split {split!r} has nothing to store ({reasons or 'no rows'}); check the recipe's filters"
            )
        share = recipe.corpus.no_speech if split == recipe.corpus.train_split else 0.0
        tables.append(_with_no_speech(recipe.corpus, table, split, share))
    rows = recipe.store.rows_per_shard
    table = make_plan(pa.concat_tables(tables), rows_per_shard=rows)
    plan = Plan(table=table, splits=tuple(splits), rows_per_shard=rows)
    if not plan.num_shards:
        raise CorpusError(f"nothing to store ({plan.rejected()}); check the recipe's filters and store.rows_per_shard")
    return plan


def _prepared(section: CorpusSection, scanned: pa.Table, split: str) -> pa.Table:
    parts = [
        _with_reasons(section, scanned.slice(start, SCAN_ROWS), split) for start in range(0, len(scanned), SCAN_ROWS)
    ]
    return pa.concat_tables(parts or [_with_reasons(section, scanned, split)])


def _with_reasons(section: CorpusSection, scanned: pa.Table, split: str) -> pa.Table:
    """Add split, num_frames, the prepared transcript and, for what is left out, the reason."""
    durations = [
        None if d is None or not np.isfinite(d) or d < 0 else float(d) for d in scanned["duration_s"].to_pylist()
    ]
    texts = [prepare_transcript(text, section) for text in scanned["transcript"].to_pylist()]
    silent = [is_no_speech(source_id) for source_id in scanned["source_id"].to_pylist()]
    reasons = [_reason(*each, section) for each in zip(durations, texts, silent, strict=True)]
    frames = [num_frames(round((d or 0.0) * SAMPLING_RATE)) for d in durations]
    ids = [
        i or f"{split}/{s}"
        for i, s in zip(*(scanned[c].to_pylist() for c in ("utterance_id", "source_id")), strict=True)
    ]
    kept = scanned.select(["source_id", "speaker", "sex", "source"])
    added = {
        "utterance_id": pa.array(ids, pa.string()),
        "split": pa.array([split] * len(ids), pa.string()),
        "num_frames": pa.array(frames, pa.int32()),
        "duration_s": pa.array(durations, pa.float64()),
        "transcript": pa.array(texts, pa.string()),
        "reason": pa.array(reasons, pa.string()),
    }
    for name, column in added.items():
        kept = kept.append_column(name, column)
    return kept


def _reason(duration_s: float | None, transcript: str, is_silent: bool, section: CorpusSection) -> str:
    if duration_s is None:
        return ""  # unreadable header: stage one tries to decode it, and says why it cannot
    if duration_s < section.min_duration_s:
        return "too_short"
    if duration_s > section.max_duration_s:
        return "too_long"
    if not transcript and not is_silent:
        return "no_text"
    return "text_too_long" if len(transcript) > section.max_chars_per_s * (duration_s + TEXT_GRACE_S) else ""


def _with_no_speech(section: CorpusSection, table: pa.Table, split: str, share: float) -> pa.Table:
    """Strew items without speech evenly among the utterances, as long as they are."""
    accepted = np.flatnonzero(table["reason"].to_numpy() == "")
    count = round(share * len(accepted))
    if not count:
        return table
    after = accepted[_spread(len(accepted), count)]
    durations = [d or 1.0 for d in table["duration_s"].take(after).to_pylist()]
    items = _with_reasons(section, no_speech_rows(durations), split)
    order = np.argsort(np.concatenate([np.arange(len(table)), after + 0.5]), kind="stable")
    return pa.concat_tables([table, items]).take(order)


def _spread(size: int, count: int) -> NDArray[np.int64]:
    """Choose `count` of `size` positions, evenly: the middles of equal stretches."""
    return ((2 * np.arange(count, dtype=np.int64) + 1) * size) // (2 * count)


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
    return {"splits": {split: corpus.provenance(split) for split in splits}, **recipe.corpus.model_dump(include=POLICY)}
