"""What stage one will do, decided from metadata alone: which utterances, where in the store, how many frames.

Also the parts of a store's fingerprint that describe data and audio, and the scans kept for the next plan.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache import make_plan
from pipelines.corpora.corpus import SCAN_SCHEMA, Corpus
from pipelines.corpora.no_speech import is_no_speech, no_speech_rows
from pipelines.corpora.transcripts import prepare_transcript
from pipelines.errors import CorpusError
from pipelines.recipes import Recipe
from pipelines.recipes.recipe import Columns, CorpusSection
from tinyaudio.model.audio import RESAMPLER, SAMPLING_RATE

if TYPE_CHECKING:
    from tinyaudio.model.families import Family

SCAN_ROWS = 100_000  # utterances whose texts are Python strings at the same time
TEXT_GRACE_S = 1.0  # very short recordings may be dense: "twenty-five percent" in 0.6 s
KEEP_LOCAL_FROM_S = 10.0  # a local scan that took less is not kept
POLICY = set("min_duration_s max_duration_s max_chars_per_s text_case text_punctuation text_tags no_speech".split())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work of one extraction."""

    table: pa.Table  # from `cache.make_plan`, with the columns transcript, speaker, sex, source and duration_s
    splits: tuple[str, ...]  # in store order
    rows_per_shard: int

    @property
    def num_shards(self) -> int:
        return int(self.table["shard"].to_numpy().max(initial=-1)) + 1

    @property
    def accepted(self) -> pa.Table:
        return self.table.filter(pa.array(self.table["shard"].to_numpy() >= 0))

    def rejected(self) -> dict[str, int]:
        """Count rejected utterances by reason, the most frequent first."""
        return dict(Counter(self._rejected["reason"].to_pylist()).most_common())

    def rejected_hours(self) -> dict[str, float]:
        """Add up the hours of rejected utterances by reason."""
        hours: dict[str, float] = {}
        for row in self._rejected.select(["reason", "duration_s"]).to_pylist():
            hours[row["reason"]] = hours.get(row["reason"], 0.0) + (row["duration_s"] or 0.0) / 3600
        return hours

    @property
    def _rejected(self) -> pa.Table:
        return self.table.filter(pa.array(self.table["shard"].to_numpy() < 0))


def plan_corpus(recipe: Recipe, corpus: Corpus, splits: Sequence[str], store: Path | None = None) -> Plan:
    """Scan a corpus and give every utterance a shard, or a reason why not.

    Args:
        store: path of the future store; the scan is kept beside it for the next plan.

    Raises:
        CorpusError: a split does not exist, or contains nothing to store.
        MissingModelError, ModelError, FetchError: as `family_in`.
    """
    from pipelines.encoders import family_in  # a finished store answers without torch, and needs this module too

    section, rows_per_shard = recipe.corpus, recipe.store.rows_per_shard
    family = family_in(recipe.encoder)
    tables: list[pa.Table] = []
    for split in splits:
        scanned = corpus.scan(split) if store is None else scan_once(corpus, section.columns, split, store)
        starts = range(0, max(1, len(scanned)), SCAN_ROWS)
        table = pa.concat_tables([_judge(section, family, scanned.slice(start, SCAN_ROWS), split) for start in starts])
        accepted = np.flatnonzero(table["reason"].to_numpy() == "")
        if not len(accepted):
            reasons = dict(Counter(table["reason"].to_pylist()))
            raise CorpusError(f"split {split!r} has nothing to store ({reasons or 'no rows'}). Check the filters")
        count = round(section.no_speech * len(accepted)) if split == section.train_split else 0
        if count:  # items without speech go between utterances at equal distances, and have their durations
            after = accepted[((2 * np.arange(count, dtype=np.int64) + 1) * len(accepted)) // (2 * count)]
            durations = [d or 1.0 for d in table["duration_s"].take(after).to_pylist()]
            items = _judge(section, family, no_speech_rows(durations), split)
            order = np.argsort(np.concatenate([np.arange(len(table)), after + 0.5]), kind="stable")
            table = pa.concat_tables([table, items]).take(order)
        tables.append(_tell_apart(table, split, tables))
    table = make_plan(pa.concat_tables(tables), rows_per_shard=rows_per_shard)
    plan = Plan(table=table, splits=tuple(splits), rows_per_shard=rows_per_shard)
    if not plan.num_shards:
        raise CorpusError(f"nothing to store ({plan.rejected()}). Check the recipe's filters and store.rows_per_shard")
    return plan


def _tell_apart(table: pa.Table, split: str, earlier: Sequence[pa.Table]) -> pa.Table:
    """Put the split's name before ids that are plain numbers and that an earlier split has too.

    Row numbers begin at 0 in every split. Any other repeated id is one recording in two splits, and stays a duplicate.
    """
    if not earlier:
        return table
    ids = table["utterance_id"]
    others = pa.concat_arrays([chunk for other in earlier for chunk in other["utterance_id"].chunks])
    is_repeated = pc.and_(pc.utf8_is_digit(ids), pc.is_in(ids, value_set=others))
    named = pc.binary_join_element_wise(pa.scalar(split), ids, "/")
    return table.set_column(
        table.column_names.index("utterance_id"), "utterance_id", pc.if_else(is_repeated, named, ids)
    )


def _judge(section: CorpusSection, family: "Family", scanned: pa.Table, split: str) -> pa.Table:
    """Add split, num_frames, the prepared transcript and, for rejected utterances, the reason."""
    ids, durations, frames, texts, reasons = [], [], [], [], []
    for row in scanned.select(["utterance_id", "source_id", "duration_s", "transcript"]).to_pylist():
        duration_s, text = row["duration_s"], prepare_transcript(row["transcript"], section)
        if duration_s is None or not np.isfinite(duration_s) or duration_s <= 0:
            duration_s, reason = None, ""  # not known: decoding gives the length, or the reason
        elif duration_s < section.min_duration_s:
            reason = "too_short"
        elif duration_s > section.max_duration_s:
            reason = "too_long"
        elif family.max_samples is not None and round(duration_s * SAMPLING_RATE) > family.max_samples:
            reason = "beyond_encoder"
        elif not text and not is_no_speech(row["source_id"]):
            reason = "no_text"
        else:
            reason = "text_too_long" if len(text) > section.max_chars_per_s * (duration_s + TEXT_GRACE_S) else ""
        ids.append(row["utterance_id"] or f"{split}/{row['source_id']}")
        durations.append(duration_s)
        frames.append(family.num_frames(round((duration_s or 0.0) * SAMPLING_RATE)))
        texts.append(text)
        reasons.append(reason)
    table = scanned.select(["source_id", "speaker", "sex", "source"])
    for name, column in {
        "utterance_id": pa.array(ids, pa.string()),
        "split": pa.array([split] * len(ids), pa.string()),
        "num_frames": pa.array(frames, pa.int32()),
        "duration_s": pa.array(durations, pa.float64()),
        "transcript": pa.array(texts, pa.string()),
        "reason": pa.array(reasons, pa.string()),
    }.items():
        table = table.append_column(name, column)
    return table


def audio_fingerprint(family: "Family") -> dict[str, Any]:
    """Describe what happens to samples before the encoder."""
    return {
        "sampling_rate": SAMPLING_RATE,
        "resampler": RESAMPLER,
        "channels": "mean",
        "frames": family.formula,
        "short": f"zero-padded to {family.min_samples} samples",
        "batching": "zero-padded with attention mask, frames behind the end dropped",
    }


def corpus_fingerprint(recipe: Recipe, corpus: Corpus, splits: Sequence[str]) -> dict[str, Any]:
    """Describe the data, and the recipe's filters and text policy."""
    return {"splits": {split: corpus.provenance(split) for split in splits}, **recipe.corpus.model_dump(include=POLICY)}


def scan_once(corpus: Corpus, columns: Columns, split: str, store: Path) -> pa.Table:
    """Scan a split, or read what an earlier scan of the same data found; errors as `Corpus.scan`.

    A scan of 25,000 hours makes requests for 10,000 files. It is kept until the store has a plan, so that `--plan` and
    the extraction scan once. A fast local scan is not kept, nor one of a folder of recordings, whose lengths may change
    while its metadata file does not.
    """
    provenance = corpus.provenance(split)
    if provenance["kind"] == "folder":
        return corpus.scan(split)
    document = json.dumps([provenance, columns.model_dump()], sort_keys=True)
    path = _kept_scan(store, hashlib.sha256(document.encode()).hexdigest()[:16])
    try:
        kept = pq.read_table(path)
        if kept.schema.equals(SCAN_SCHEMA):
            return kept
    except (OSError, pa.ArrowException):
        pass
    started = time.monotonic()
    table = corpus.scan(split)
    if provenance["kind"] != "parquet" or time.monotonic() - started >= KEEP_LOCAL_FROM_S:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        pq.write_table(table, temporary)
        temporary.replace(path)
    return table


def forget_scans(store: Path) -> None:
    """Remove the scans kept for a store."""
    pattern = _kept_scan(store, "*")
    for path in pattern.parent.glob(f"{pattern.name}*"):
        path.unlink(missing_ok=True)


def _kept_scan(store: Path, name: str) -> Path:
    return store.absolute().parent / f".{store.name}.scan-{name}.parquet"
