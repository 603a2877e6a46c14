"""Stage one: corpus -> frozen encoder -> feature store, shard by shard, continuing where it stopped.

A shard is planned, claimed, decoded, encoded and committed as one; while one is encoded the next is decoded. Batches are
made of one shard's utterances in order of length, so a stored row never depends on who computed it or when. Every
utterance ends up stored or in quarantine with a reason. Knows nothing of projectors or text models.
"""

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cache import Calibration, FeatureStore, Moments
from cache.errors import StoreNotFoundError
from cache.writer import ShardWriter
from pipelines.corpora import Corpus, open_corpus
from pipelines.errors import CorpusError, PipelineError, TooManyBadError
from pipelines.identity import LoadedEncoder, open_encoder, pick_device
from pipelines.planning import Plan, audio_fingerprint, corpus_fingerprint, plan_corpus
from pipelines.recipes import Recipe
from tinyaudio.audio import HOP_LENGTH, SAMPLING_RATE, Samples, load_audio
from tinyaudio.encoder import encode, encoder_inputs
from tinyaudio.errors import AudioError

DECODE_THREADS = 4  # libsndfile and soxr release the interpreter lock
TOLERATED_BAD = 10  # utterances; below that a share of a small corpus says nothing
CALIBRATION_UTTERANCES = 2_000
SECONDS_PER_HOUR = 3600


class Progress(Protocol):
    """What extraction reports to: seconds of audio done and a word on the state."""

    def __call__(self, audio_s: float, state: dict[str, Any]) -> None: ...


@dataclass
class ExtractReport:
    """The closing table of stage one."""

    store: str
    shards_written: int = 0
    shards_total: int = 0
    utterances: int = 0
    hours: float = 0.0
    quarantined: Counter[str] = field(default_factory=Counter)
    planned_out: dict[str, int] = field(default_factory=dict)
    store_bytes: int = 0
    seconds: float = 0.0
    is_complete: bool = False
    padding: float = 0.0  # share of the encoder's input that was padding

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "quarantined": dict(self.quarantined)}

    def __str__(self) -> str:
        lines = [
            f"store        {self.store} ({self.store_bytes / 1e6:,.1f} MB)",
            f"shards       {self.shards_written} written now, {self.shards_total} in all"
            + ("" if self.is_complete else "; not complete yet, the same command goes on"),
            f"stored       {self.utterances:,} utterances, {self.hours:,.2f} h",
            f"quarantined  {sum(self.quarantined.values()):,}" + _listed(self.quarantined),
            f"left out     {sum(self.planned_out.values()):,} by the recipe's filters" + _listed(self.planned_out),
        ]
        if self.shards_written:
            rate = self.hours * SECONDS_PER_HOUR / max(self.seconds, 1e-9)
            lines.append(f"time         {self.seconds:,.1f} s ({rate:,.0f}x real time, padding {100 * self.padding:.1f} %)")
        return "\n".join(lines)


def _listed(counts: dict[str, int] | Counter[str]) -> str:
    return ": " + ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) if counts else ""


def wanted_splits(recipe: Recipe, corpus: Corpus, split: str | None = None) -> tuple[list[str], list[str]]:
    """Decide which splits to extract: the one asked for, or train and dev.

    Returns:
        The splits, and warnings: a corpus without the dev split still trains, only unmeasured.

    Raises:
        CorpusError: a split that is not there.
    """
    if split is not None:
        corpus.provenance(split)
        return [split], []
    splits, warnings = [recipe.corpus.train_split], []
    corpus.provenance(splits[0])
    if recipe.corpus.dev_split is not None:
        try:
            corpus.provenance(recipe.corpus.dev_split)
            splits.append(recipe.corpus.dev_split)
        except CorpusError as error:
            warnings.append(f"{error}; stage two will train without dev WER (corpus.dev_split names another one)")
    return splits, warnings


def extract(
    recipe: Recipe,
    store_path: Path,
    *,
    splits: Sequence[str],
    part: tuple[int, int] = (0, 1),
    device: str = "auto",
    on_progress: Progress | None = None,
) -> ExtractReport:
    """Run stage one, or go on with it.

    Args:
        store_path: made if absent; continued if it is the same extraction; repaired where it is damaged.
        part: (i, N): write only every N-th shard from the i-th on.
        on_progress: called after every encoder batch.

    Raises:
        CorpusError, MissingModelError: something the recipe names is not there.
        StoreMismatchError: a store of another recipe lies there.
        TooManyBadError: more than `extract.max_bad` of the utterances could not be stored.
        PipelineError: the disk is nearly full.
    """
    started = time.monotonic()
    corpus = open_corpus(recipe.corpus)
    plan = plan_corpus(recipe, corpus, splits)
    encoder = open_encoder(recipe.encoder, pick_device(device))
    store = _open_store(recipe, store_path, corpus, plan, encoder)
    report = ExtractReport(store=str(store_path), shards_total=store.num_shards, planned_out=plan.rejected())
    stage = _Stage(recipe, corpus, encoder, store, report, on_progress)
    stage.run(store.pending_shards(part))
    if not store.pending_shards():
        store.seal()
    report.is_complete = store.is_sealed
    report.store_bytes = sum(path.stat().st_size for path in store_path.rglob("*") if path.is_file())
    report.seconds = time.monotonic() - started
    return report


def _open_store(recipe: Recipe, path: Path, corpus: Corpus, plan: Plan, encoder: LoadedEncoder) -> FeatureStore:
    fingerprint = {
        "encoder": encoder.fingerprint,
        "audio": audio_fingerprint(),
        "corpus": corpus_fingerprint(recipe, corpus, plan.splits),
    }
    calibration = None
    if recipe.store.encoding == "int8":
        try:
            calibration = FeatureStore.open(path).calibration
        except StoreNotFoundError:
            calibration = _calibrate(recipe, corpus, plan, encoder)
    return FeatureStore.create(
        path,
        plan=plan.table,
        dim=encoder.model.config.hidden_size,
        fingerprint=fingerprint,
        encoding=recipe.store.encoding,
        rows_per_shard=recipe.store.rows_per_shard,
        calibration=calibration,
    )


def _calibrate(recipe: Recipe, corpus: Corpus, plan: Plan, encoder: LoadedEncoder) -> Calibration:
    """Measure each feature's mean and standard deviation on utterances spread evenly over the plan."""
    accepted = plan.accepted
    chosen = np.unique(np.linspace(0, len(accepted) - 1, CALIBRATION_UTTERANCES).astype(int))
    moments = Moments(encoder.model.config.hidden_size)
    decoded = [d for d in _decode(corpus, accepted["source_id"].take(chosen).to_pylist()) if not isinstance(d[1], str)]
    for batch in cut_batches({source_id: len(samples) for source_id, samples in decoded}, recipe.extract.batch_s):
        samples = dict(decoded)
        for features in _encode(encoder, [samples[source_id] for source_id in batch]):
            if np.isfinite(features).all():
                moments.update(features)
    return moments.calibration()


class _Stage:
    """Stage one under way: what is claimed, decoded, encoded, counted."""

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        encoder: LoadedEncoder,
        store: FeatureStore,
        report: ExtractReport,
        on_progress: Progress | None,
    ) -> None:
        self.recipe, self.corpus, self.encoder, self.store, self.report = recipe, corpus, encoder, store, report
        self.on_progress = on_progress
        self.num_seen = 0
        self.samples_used = self.samples_padded = 0
        self.total_s = 0.0

    def run(self, shards: Sequence[int]) -> None:
        """Work through shards, decoding one ahead."""
        frames = sum(int(np.sum(self.store.plan(shard)["num_frames"].to_numpy())) for shard in shards)
        self.total_s = frames * HOP_LENGTH / SAMPLING_RATE
        writers = self._claim(shards)
        with ThreadPoolExecutor(1) as ahead:
            current = self._begin(ahead, writers)
            while current is not None:
                following = None
                try:
                    following = self._begin(ahead, writers)
                    self._finish(*current)
                except BaseException as error:
                    if following is not None:  # give its claim back
                        following[1].cancel()
                        following[0].__exit__(type(error), error, None)
                    raise
                current = following

    def _claim(self, shards: Sequence[int]) -> Iterator[ShardWriter]:
        for shard in shards:
            self._check_disk()
            writer = self.store.write_shard(shard)
            if writer is not None:
                yield writer

    def _begin(
        self, ahead: ThreadPoolExecutor, writers: Iterator[ShardWriter]
    ) -> tuple[ShardWriter, Future[list[tuple[str, Samples | str]]]] | None:
        writer = next(writers, None)
        if writer is None:
            return None
        return writer, ahead.submit(_decode, self.corpus, writer.plan["source_id"].to_pylist())

    def _finish(self, writer: ShardWriter, decoded: Future[list[tuple[str, Samples | str]]]) -> None:
        rows = {row["source_id"]: row for row in writer.plan.to_pylist()}
        with writer:
            samples: dict[str, Samples] = {}
            for source_id, outcome in decoded.result():
                reason = outcome if isinstance(outcome, str) else self._unfit(rows[source_id], outcome)
                if reason:
                    self._quarantine(writer, rows[source_id], reason)
                elif not isinstance(outcome, str):
                    samples[source_id] = outcome
            lengths = {source_id: len(recording) for source_id, recording in samples.items()}
            for batch in cut_batches(lengths, self.recipe.extract.batch_s):
                self._store(writer, [(rows[source_id], samples.pop(source_id)) for source_id in batch])
        self.report.shards_written += 1
        self._check_bad()

    def _unfit(self, row: dict[str, Any], samples: Samples) -> str:
        """Say why a decoded recording is not stored: metadata may have lied, or have been silent."""
        duration_s, limits = len(samples) / SAMPLING_RATE, self.recipe.corpus
        if duration_s < limits.min_duration_s:
            return f"too_short: {duration_s:.3f} s when decoded"
        if duration_s > limits.max_duration_s:
            return f"too_long: {duration_s:.1f} s when decoded"
        return "" if row["transcript"] else "no_text: the transcript is empty"

    def _store(self, writer: ShardWriter, batch: Sequence[tuple[dict[str, Any], Samples]]) -> None:
        recordings = [samples for _, samples in batch]
        longest = max(len(samples) for samples in recordings)
        self.samples_padded += longest * len(batch)
        self.samples_used += sum(len(samples) for samples in recordings)
        for (row, samples), features in zip(batch, _encode(self.encoder, recordings), strict=True):
            duration_s = len(samples) / SAMPLING_RATE
            is_stored = writer.append(
                row["utterance_id"],
                features,
                num_samples=len(samples),
                duration_s=duration_s,
                transcript=row["transcript"],
                speaker=row["speaker"],
                source=row["source"],
                extra={"sex": row["sex"]} if row["sex"] else None,
            )
            self.num_seen += 1
            if is_stored:
                self.report.utterances += 1
                self.report.hours += duration_s / SECONDS_PER_HOUR
            else:
                self.report.quarantined["not_storable"] += 1
        self.report.padding = 1 - self.samples_used / self.samples_padded
        self._report_progress(sum(len(samples) for samples in recordings) / SAMPLING_RATE, writer.shard)

    def _quarantine(self, writer: ShardWriter, row: dict[str, Any], reason: str) -> None:
        kind, _, detail = reason.partition(": ")
        writer.quarantine(row["utterance_id"], kind, detail)
        self.num_seen += 1
        self.report.quarantined[kind] += 1

    def _report_progress(self, audio_s: float, shard: int) -> None:
        if self.on_progress is not None:
            rows = self.report.hours * SECONDS_PER_HOUR * SAMPLING_RATE / HOP_LENGTH
            state = {"shard": shard, "total_s": self.total_s, "bad": sum(self.report.quarantined.values())}
            self.on_progress(audio_s, {**state, "written_bytes": rows * self.store.header.bytes_per_row})

    def _check_bad(self) -> None:
        bad, limit = sum(self.report.quarantined.values()), self.recipe.extract.max_bad
        if bad > max(TOLERATED_BAD, limit * self.num_seen):
            raise TooManyBadError(
                f"{bad} of {self.num_seen} utterances could not be stored{_listed(self.report.quarantined)}; expected at most "
                f"{100 * limit:g} %; look at {self.report.store}/quarantine, or raise extract.max_bad to go on"
            )

    def _check_disk(self) -> None:
        free = shutil.disk_usage(self.store.path).free
        needed = self.store.rows_per_shard * self.store.header.bytes_per_row
        margin = self.recipe.extract.disk_margin_gb * 1e9
        if free < needed + margin:
            raise PipelineError(
                f"{free / 1e9:.2f} GB free at {str(self.store.path)!r}; the next shard needs {needed / 1e9:.2f} GB and the "
                f"recipe keeps {margin / 1e9:g} GB clear (extract.disk_margin_gb); make room and type the same again"
            )


def cut_batches(lengths: dict[str, int], batch_s: float) -> Iterator[list[str]]:
    """Group recordings of like length.

    Args:
        lengths: samples by id.
        batch_s: seconds of audio in one batch, padding included; a longer recording makes a batch of its own.

    Yields:
        Ids, longest last; the grouping depends on the lengths and ids only.
    """
    batch: list[str] = []
    for source_id, length in sorted(lengths.items(), key=lambda item: (item[1], item[0])):
        if batch and length * (len(batch) + 1) > batch_s * SAMPLING_RATE:
            yield batch
            batch = []
        batch.append(source_id)
    if batch:
        yield batch


def _decode(corpus: Corpus, source_ids: Sequence[str]) -> list[tuple[str, Samples | str]]:
    """Fetch and decode recordings: samples, or "reason: detail" for what cannot be."""
    with ThreadPoolExecutor(DECODE_THREADS) as threads:
        pairs = list(corpus.read_audio(source_ids))
        return list(zip([s for s, _ in pairs], threads.map(lambda pair: _decode_one(pair[1]), pairs), strict=True))


def _decode_one(audio: bytes) -> Samples | str:
    if not audio:
        return "no_audio: missing file or empty cell"
    try:
        return load_audio(audio)
    except AudioError as error:
        return f"undecodable: {error}"


def _encode(encoder: LoadedEncoder, recordings: Sequence[Samples]) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
    """Yield each recording's features, (T_i, D) float32."""
    values, mask = encoder_inputs(encoder.feature_extractor, recordings)
    device = encoder.model.device
    features, frames = encode(encoder.model, values.to(device), mask.to(device), encoder.precision)
    host = features.to("cpu", torch.float32).numpy()
    for row, count in zip(host, frames.tolist(), strict=True):
        yield row[:count]


