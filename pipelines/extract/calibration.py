"""Measure the calibration of a quantised store: each feature's mean and standard deviation, before the first shard."""

import numpy as np

from cache import Calibration, Moments
from pipelines.corpora import Corpus
from pipelines.corpora.corpus import chunked
from pipelines.encoders import LoadedEncoder
from pipelines.errors import CorpusError
from pipelines.extract.batching import cut_batches
from pipelines.extract.decode import Decoder
from pipelines.extract.encode import open_batch_encoder
from pipelines.extract.plan import Plan
from pipelines.recipes import Recipe

ROUND_UTTERANCES = 2_000  # spread evenly over the plan; further rounds follow until the measurement is sufficient
DECODED_UTTERANCES = 64  # decoded at the same time


def calibrate(recipe: Recipe, corpus: Corpus, plan: Plan, encoder: LoadedEncoder) -> Calibration:
    """Measure on utterances spread evenly over the plan, until `Moments.is_enough` or all have been used.

    Raises:
        CorpusError: no utterance could be encoded.
    """
    source_ids = plan.accepted["source_id"].to_pylist()
    num_rounds = -(-len(source_ids) // ROUND_UTTERANCES)
    moments, batch_encoder = Moments(encoder.model.config.hidden_size), open_batch_encoder(encoder)
    batch_s = batch_encoder.batch_s(recipe.extract.batch_s)
    with Decoder(corpus, 0, recipe.corpus.max_duration_s) as decoder:
        for first in range(num_rounds):
            for chosen in chunked(source_ids[first::num_rounds], DECODED_UTTERANCES):
                decoded, _ = decoder.collect(decoder.submit(chosen))
                samples = {source_id: outcome for source_id, outcome in decoded if not isinstance(outcome, str)}
                for batch in cut_batches({key: len(recording) for key, recording in samples.items()}, batch_s):
                    encoded = batch_encoder.encode(batch_encoder.prepare([samples[key] for key in batch]))()
                    for recording in encoded.recordings:
                        if np.isfinite(recording.features).all():
                            moments.update(recording.features)
            if moments.is_enough:
                break
    if not moments.num_frames:
        raise CorpusError(
            f"no utterance of {len(source_ids)} could be encoded, so there is nothing to calibrate on. Check the "
            "corpus, or extract as float16 to find the reasons in the quarantine"
        )
    return moments.calibration()
