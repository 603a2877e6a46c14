"""Stage one: corpus -> frozen encoder -> feature store, shard by shard, continuing where it stopped.

Here it is decided what is to be done: the plan, the encoder, the store, which shards. `shard_line` does it. Every
utterance ends up stored or in quarantine with a reason. Knows nothing of projectors or text models.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache import Calibration, FeatureStore, Moments, store_repair
from cache.durable import exclusive
from cache.errors import CacheError, StoreNotFoundError
from pipelines.corpora import Corpus, open_corpus
from pipelines.decoding import Decoder
from pipelines.encoding import EncoderLine, cut_batches
from pipelines.errors import TooManyBadError
from pipelines.extract_report import ExtractReport, listed, quarantined_so_far
from pipelines.extraction_request import finished, pinned, recorded_plan, request_of, save_request, wanted_splits
from pipelines.identity import LoadedEncoder, open_encoder, pick_device
from pipelines.planning import Plan, audio_fingerprint, corpus_fingerprint, plan_corpus
from pipelines.recipes import Recipe
from pipelines.shard_line import Progress, ShardLine
from tinyaudio.audio import Samples

__all__ = [
    "ExtractReport",
    "Extraction",
    "Progress",
    "cut_batches",
    "extract",
    "prepare",
    "read_report",
    "wanted_splits",
]

TOLERATED_BAD = 10  # utterances; below that a share of a small corpus says nothing
CALIBRATION_UTTERANCES = 2_000
CALIBRATION_BATCH = 64  # utterances decoded at once


@dataclass
class Extraction:
    """Stage one, ready to work on any of its shards."""

    recipe: Recipe
    corpus: Corpus
    encoder: LoadedEncoder
    store: FeatureStore
    report: ExtractReport
    max_bad: float | None  # given explicitly; None: the recipe's, tolerantly

    def run(self, shards: Sequence[int], on_progress: Progress | None = None) -> None:
        """Work through shards; errors as `extract`."""
        line = ShardLine(
            self.recipe,
            self.corpus,
            self.encoder,
            self.store,
            self.report,
            on_progress=on_progress,
            check=self._check_bad,
        )
        line.run(shards)

    def _check_bad(self) -> None:
        bad, share = sum(self.report.quarantined.values()), self.max_bad
        limit = self.recipe.extract.max_bad if share is None else share
        planned = self.store.header.num_planned - sum(self.report.planned_out.values())
        if bad > max(limit * planned, TOLERATED_BAD if share is None else 0):
            reasons = dict(self.report.quarantined.most_common(5))
            raise TooManyBadError(
                f"{bad} of {planned} utterances could not be stored so far{listed(reasons)}; expected at most "
                f"{100 * limit:g} %; look at {self.report.store}/quarantine, or give a larger --max-bad to go on"
            )


def extract(
    recipe: Recipe,
    store_path: Path,
    *,
    splits: Sequence[str],
    part: tuple[int, int] = (0, 1),
    help_others: bool = False,
    max_bad: float | None = None,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> ExtractReport:
    """Run stage one, or go on with it, or see that it is finished.

    Args:
        store_path: made if absent; continued if it is the same extraction; repaired where it is damaged.
        part: (i, N): write only every N-th shard from the i-th on.
        help_others: after that, write what nobody else is writing.
        max_bad: share of the planned utterances that may fail, to the utterance; None takes the recipe's
            `extract.max_bad` and never minds the first ten.
        on_progress: called after every encoder batch.

    Raises:
        CorpusError, MissingModelError: something the recipe names is not there.
        StoreMismatchError: a store of another recipe lies there.
        TooManyBadError: more than the tolerated share of the utterances could not be stored.
        DiskError: the disk is nearly full. FetchError: the network stayed away.
    """
    started = time.monotonic()
    done = finished(recipe, store_path, splits[0] if len(splits) == 1 else None) if part == (0, 1) else None
    if done is not None:
        return done
    extraction = prepare(recipe, store_path, splits=splits, max_bad=max_bad, device=device)
    store, report = extraction.store, extraction.report
    shards = store.pending_shards(part)
    extraction.run(shards, on_progress)
    if help_others:
        extraction.run([shard for shard in store.pending_shards() if shard not in shards], on_progress)
    if not store.pending_shards():
        store.seal()
    report.seconds = time.monotonic() - started
    return read_report(report)


def read_report(report: ExtractReport) -> ExtractReport:
    """Bring a report up to what the store holds by now, whoever wrote it."""
    report.read_totals(FeatureStore.open(report.store))
    return report


def prepare(
    recipe: Recipe, store_path: Path, *, splits: Sequence[str], max_bad: float | None = None, device: str = "auto"
) -> Extraction:
    """Plan, load the encoder, make or open the store, and take back what is damaged of it; errors as `extract`.

    Several processes may do this at once: the first does the work, the others then find it done.
    """
    store_path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with exclusive(store_path.absolute().parent / f".{store_path.name}.preparing"):
        fixed = pinned(recipe, store_path)
        corpus = open_corpus(fixed.corpus)
        for split in splits:
            corpus.require(split)
        request = request_of(fixed, corpus, splits)
        plan = recorded_plan(store_path, request, splits, fixed.store.rows_per_shard)
        plan = plan or plan_corpus(fixed, corpus, splits)
        encoder = open_encoder(fixed.encoder, pick_device(device))
        store = _open_store(fixed, store_path, corpus, plan, encoder)
        save_request(store_path, recipe, fixed, splits, request)
        report = ExtractReport(store=str(store_path), shards_total=store.num_shards, planned_out=plan.rejected())
        report.shards_repaired = len({fault.shard for fault in store_repair(store) if fault.shard is not None})
        report.quarantined = quarantined_so_far(store)
    return Extraction(fixed, corpus, encoder, store, report, max_bad)


def _open_store(recipe: Recipe, path: Path, corpus: Corpus, plan: Plan, encoder: LoadedEncoder) -> FeatureStore:
    fingerprint = {
        "encoder": encoder.fingerprint,
        "audio": audio_fingerprint(),
        "corpus": corpus_fingerprint(recipe, corpus, plan.splits),
    }
    calibration = None
    if recipe.store.encoding == "int8":
        calibration = _recorded_calibration(path) or _calibrate(recipe, corpus, plan, encoder)
    return FeatureStore.create(
        path,
        plan=plan.table,
        dim=encoder.model.config.hidden_size,
        fingerprint=fingerprint,
        encoding=recipe.store.encoding,
        rows_per_shard=recipe.store.rows_per_shard,
        calibration=calibration,
    )


def _recorded_calibration(path: Path) -> Calibration | None:
    """Read the calibration of a store; None if there is none, or a damaged one, which is then measured again."""
    try:
        return FeatureStore.open(path).calibration
    except (StoreNotFoundError, CacheError):
        return None


def _calibrate(recipe: Recipe, corpus: Corpus, plan: Plan, encoder: LoadedEncoder) -> Calibration:
    """Measure each feature's mean and standard deviation on utterances spread evenly over the plan."""
    accepted = plan.accepted
    chosen = np.unique(np.linspace(0, len(accepted) - 1, CALIBRATION_UTTERANCES).astype(int))
    source_ids = accepted["source_id"].take(chosen).to_pylist()
    moments, line = Moments(encoder.model.config.hidden_size), EncoderLine(encoder)
    with Decoder(corpus, 0) as decoder:
        for start in range(0, len(source_ids), CALIBRATION_BATCH):
            decoded, _ = decoder.collect(decoder.submit(source_ids[start : start + CALIBRATION_BATCH]))
            samples = {source_id: outcome for source_id, outcome in decoded if not isinstance(outcome, str)}
            _add_moments(line, samples, recipe.extract.batch_s, moments)
    return moments.calibration()


def _add_moments(line: EncoderLine, samples: dict[str, Samples], batch_s: float, moments: Moments) -> None:
    for batch in cut_batches({key: len(recording) for key, recording in samples.items()}, line.batch_s(batch_s)):
        features, _ = line.encode(line.prepare([samples[source_id] for source_id in batch])).read()
        for one in features:
            if np.isfinite(one).all():
                moments.update(one)
