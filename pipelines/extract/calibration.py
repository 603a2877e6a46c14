"""The calibration of an int8 store: each feature's mean and standard deviation, measured before the first shard."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cache import Calibration, FeatureStore, Moments
from cache.errors import CacheError, StoreNotFoundError
from pipelines.corpora import Corpus
from pipelines.encoders import LoadedEncoder
from pipelines.errors import CorpusError, RunError
from pipelines.extract.decode import Decoder
from pipelines.extract.encode import EncoderLine, cut_batches
from pipelines.extract.plan import Plan
from pipelines.recipes import Recipe
from tinyaudio.model.audio import Samples

ROUND_UTTERANCES = 2_000  # spread evenly over the plan; more rounds follow until it is enough
DECODED_UTTERANCES = 64  # decoded at once


def calibrate(recipe: Recipe, corpus: Corpus, plan: Plan, encoder: LoadedEncoder) -> Calibration:
    """Measure on utterances spread evenly over the plan, until `Moments.is_enough` or there are no more.

    Raises:
        CorpusError: not one of them could be encoded.
    """
    source_ids = plan.accepted["source_id"].to_pylist()
    num_rounds = -(-len(source_ids) // ROUND_UTTERANCES)
    moments, line = Moments(encoder.model.config.hidden_size), EncoderLine(encoder)
    with Decoder(corpus, 0, recipe.corpus.max_duration_s) as decoder:
        for first in range(num_rounds):
            for chosen in _batches(source_ids[first::num_rounds]):
                decoded, _ = decoder.collect(decoder.submit(chosen))
                samples = {source_id: outcome for source_id, outcome in decoded if not isinstance(outcome, str)}
                _add_moments(line, samples, recipe.extract.batch_s, moments)
            if moments.is_enough:
                break
    if not moments.num_frames:
        raise CorpusError(
            f"no utterance of {len(source_ids)} could be encoded, so int8 has nothing to be calibrated on; "
            "look at the corpus, or extract as float16 to see why in the quarantine"
        )
    return moments.calibration()


def _batches(source_ids: list[str]) -> list[list[str]]:
    return [source_ids[start : start + DECODED_UTTERANCES] for start in range(0, len(source_ids), DECODED_UTTERANCES)]


def _add_moments(line: EncoderLine, samples: Mapping[str, Samples], batch_s: float, moments: Moments) -> None:
    for batch in cut_batches({key: len(recording) for key, recording in samples.items()}, line.batch_s(batch_s)):
        features, _ = line.encode(line.prepare([samples[source_id] for source_id in batch])).read()
        for one in features:
            if isinstance(one, np.ndarray) and np.isfinite(one).all():
                moments.update(one)


def calibration_id(recipe: Recipe) -> str | None:
    """Name the calibration that the recipe takes from another store."""
    calibration = given_calibration(recipe)
    return None if calibration is None else calibration.id


def given_calibration(recipe: Recipe) -> Calibration | None:
    """Read the calibration that the recipe takes from another store; None if it is to be measured.

    Raises:
        StoreNotFoundError: no store there. RunError: one that has no calibration.
    """
    if recipe.store.calibration is None:
        return None
    calibration = FeatureStore.open(recipe.store.calibration).calibration
    if calibration is None:
        raise RunError(
            f"store {recipe.store.calibration!r} is float16 and has no calibration; set store.calibration to an int8 "
            "store, or leave it away to measure one"
        )
    return calibration


def recorded_calibration(path: Path) -> Calibration | None:
    """Read the calibration of a store; None if there is none, or a damaged one, which is then measured again."""
    try:
        return FeatureStore.open(path).calibration
    except (StoreNotFoundError, CacheError):
        return None
