"""Evaluation sets whose clips are features from a store: no audio is read and no encoder runs.

Only for a model that was made for this store's encoder. Utterances that the store holds in quarantine belong to the set
and count as failures, with the reason they were put there for.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache import FeatureReader, FeatureStore
from cache.quantize import Quantized
from pipelines.errors import EvaluationError
from pipelines.eval_sets import EvalSet, Utterance, Window, choose, windows
from pipelines.providers import Clip
from tinyaudio.errors import AudioError


@dataclass(frozen=True, kw_only=True)
class StoredEvalSet(EvalSet):
    """A split of a store, or a random part of it."""

    reader: FeatureReader
    quarantined: dict[str, str]

    def identity(self) -> dict[str, Any]:
        return {
            "corpus": self.corpus_name,
            "config": self.section.config,
            "store_fingerprint": self.reader.store.fingerprint_id,
            "split": self.split,
            "source": self.source,
            "max_samples": self.max_samples,
            "seed": self.seed if self.max_samples is not None else None,
        }

    @property
    def encoder_weights(self) -> str:
        """Digest of the encoder that made the features."""
        return str(self.reader.store.fingerprint["encoder"]["weights"])

    def load(self, wanted: Iterable[str]) -> Iterator[Window]:
        chosen = set(wanted)
        for window in windows([one for one in self.utterances if one.utterance_id in chosen]):
            kept = [one for one in window if one.utterance_id not in self.quarantined]
            loaded: Window = [
                (one, AudioError(f"not in the store: {self.quarantined[one.utterance_id]}"))
                for one in window
                if one.utterance_id in self.quarantined
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
    store_path: Path, section: Any, *, split: str, max_samples: int | None, seed: int, source: str | None
) -> StoredEvalSet:
    """List what a store holds of a split.

    Raises:
        StoreNotFoundError: there is no store.
        EvaluationError: it holds nothing of the split.
    """
    try:
        reader = FeatureReader(FeatureStore.open(store_path), split=split)
    except ValueError as error:
        raise EvaluationError(f"{error}; run `tinyaudio extract --split {split} --store {store_path}`") from error
    quarantined = {line["utterance_id"]: line["reason"] for line in _quarantine(reader.store) if line["split"] == split}
    everything = [_utterance(position, row) for position, row in enumerate(reader.index.to_pylist())]
    everything += [_missing(name) for name in sorted(quarantined)]
    return StoredEvalSet(
        section=section,
        split=split,
        max_samples=max_samples,
        seed=seed,
        source=source,
        corpus=None,
        utterances=choose(everything, split, max_samples, seed, source),
        split_size=len(everything),
        reader=reader,
        quarantined=quarantined,
    )


def _utterance(position: int, row: dict[str, Any]) -> Utterance:
    extra = json.loads(row["extra"] or "{}")
    return Utterance(
        utterance_id=row["utterance_id"],
        source_id=str(position),
        duration_s=row["duration_s"],
        transcript=row["transcript"],
        speaker=row["speaker"],
        sex=extra.get("sex"),
        source=row["source"],
    )


def _missing(utterance_id: str) -> Utterance:
    return Utterance(
        utterance_id=utterance_id,
        source_id="",
        duration_s=None,
        transcript="",
        speaker=None,
        sex=None,
        source=None,
    )


def _quarantine(store: FeatureStore) -> Iterator[dict[str, Any]]:
    for path in sorted((Path(store.path) / "quarantine").glob("*.jsonl")):
        for line in path.read_text().splitlines():
            yield json.loads(line)
