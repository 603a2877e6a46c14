"""Evaluation sets whose clips are features from a store: no audio is read and no encoder runs.

Only for a model that was made for this store's encoder. What the plan left out or extraction put into quarantine
belongs to the set all the same: it counts as failed, with the reason.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cache import FeatureReader, FeatureStore
from cache.quantize import Quantized
from pipelines.corpora.sources import source_of
from pipelines.errors import EvaluationError
from pipelines.evaluate.eval_sets import EvalSet, Utterance, Window, choose, unique_names, windows
from pipelines.evaluate.providers.base import Clip
from pipelines.recipes.recipe import CorpusSection
from tinyaudio.model.errors import AudioError

_PLANNED = ["utterance_id", "duration_s", "transcript", "speaker", "sex", "source", "reason"]


@dataclass(frozen=True, kw_only=True)
class StoredEvalSet(EvalSet):
    """A split of a store, or a random part of it."""

    reader: FeatureReader
    reasons: dict[str, str]  # why an utterance of the split is not in the store

    def identity(self) -> dict[str, Any]:
        return self._identity({"store_fingerprint": self.reader.store.fingerprint_id})

    def environment(self) -> dict[str, Any]:
        """Return nothing: no recording is decoded."""
        return {}

    @property
    def encoder_weights(self) -> str:
        """Digest of the encoder that made the features."""
        return str(self.reader.store.fingerprint["encoder"]["weights"])

    def load(self, wanted: Iterable[str]) -> Iterator[Window]:
        chosen = set(wanted)
        for window in windows([one for one in self.utterances if one.utterance_id in chosen]):
            kept = [one for one in window if one.utterance_id not in self.reasons]
            loaded: Window = [
                (one, AudioError(f"not in the store: {self.reasons[one.utterance_id]}"))
                for one in window
                if one.utterance_id in self.reasons
            ]
            rows = self.reader.read([int(one.source_id) for one in kept])
            yield loaded + [(one, _clip(one, features)) for one, features in zip(kept, rows, strict=True)]


def _clip(utterance: Utterance, stored: Any) -> Clip:
    features = stored.dequantize() if isinstance(stored, Quantized) else np.asarray(stored)
    return Clip(
        utterance_id=utterance.utterance_id,
        samples=np.zeros(0, np.float32),
        features=features.astype(np.float32),
        stored_duration_s=utterance.duration_s,
    )


def open_stored_set(
    store_path: Path, section: CorpusSection, *, split: str, max_samples: int | None, seed: int, source: str | None
) -> StoredEvalSet:
    """List what a store was to hold of a split.

    Raises:
        StoreNotFoundError: there is no store.
        EvaluationError: it holds nothing of the split.
    """
    try:
        reader = FeatureReader(FeatureStore.open(store_path), split=split)
    except ValueError as error:
        raise EvaluationError(f"{error}; run `tinyaudio extract --split {split} --store {store_path}`") from error
    corpus = section.name or str(section.path)
    stored = [_stored(position, row, corpus) for position, row in enumerate(reader.index.to_pylist())]
    absent = _absent(reader.store, split, {one.utterance_id for one in stored}, corpus)
    names, num_renamed = unique_names([one.utterance_id for one in stored] + [one.utterance_id for one, _ in absent])
    everything = [replace(one, utterance_id=name) for one, name in zip(stored, names, strict=False)]
    missing = {name: (one, reason) for name, (one, reason) in zip(names[len(stored) :], absent, strict=True)}
    everything += [replace(one, utterance_id=name) for name, (one, _) in missing.items()]
    return StoredEvalSet(
        section=section,
        split=split,
        max_samples=max_samples,
        seed=seed,
        source=source,
        corpus=None,
        utterances=choose(everything, split, max_samples, seed, source),
        split_size=len(everything),
        num_renamed=num_renamed,
        reader=reader,
        reasons={name: reason for name, (_, reason) in missing.items()},
    )


def _stored(position: int, row: dict[str, Any], corpus: str) -> Utterance:
    sex = json.loads(row["extra"] or "{}").get("sex")
    return _utterance({**row, "source_id": str(position), "sex": sex}, corpus)


def _absent(store: FeatureStore, split: str, stored: set[str], corpus: str) -> list[tuple[Utterance, str]]:
    """List what the split has and the store has not, with the reason: planned out, or quarantined."""
    plan = pq.read_table(Path(store.path) / "plan.parquet", columns=_PLANNED, filters=[("split", "==", split)])
    quarantined = {line["utterance_id"]: line["reason"] for line in _quarantine(store) if line["split"] == split}
    found = []
    for row in plan.to_pylist():
        reason = row["reason"] or quarantined.get(row["utterance_id"], "not extracted yet")
        if row["reason"] or row["utterance_id"] not in stored:
            found.append((_utterance({**row, "source_id": ""}, corpus), reason))
    return found


def _utterance(row: dict[str, Any], corpus: str) -> Utterance:
    return Utterance(
        utterance_id=row["utterance_id"],
        source_id=row["source_id"],
        duration_s=row["duration_s"],
        transcript=row["transcript"],
        speaker=row["speaker"],
        sex=row["sex"],
        source=row["source"] or source_of(corpus, row["utterance_id"]),
    )


def _quarantine(store: FeatureStore) -> Iterator[dict[str, Any]]:
    for path in sorted((Path(store.path) / "quarantine").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            yield json.loads(line)
