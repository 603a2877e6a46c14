"""The line that shards go through: claimed, fetched and decoded, encoded, quantised, committed; all of it side by side.

    decoding workers -> prepare (1 thread) -> encode (GPU, or a thread a core) -> store (1 thread) -> commit (1 thread)

Queues between them are bounded: at most `AHEAD_SHARDS` shards are decoded ahead, two batches wait on either side of
the encoder, and one finished shard is being written while the next is filled. Memory is therefore bounded by the shard
size, whatever the size of the corpus: with the default shards and HuBERT-large about (AHEAD_SHARDS + 2) x (168 MB of
samples + 256 MB of features), plus activations (on a CPU, of one batch a core). Batches never cross a shard.
"""

import contextlib
import itertools
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow.parquet as pq

from cache import FeatureStore, ShardWriter
from cache.errors import LostClaimError
from pipelines.corpora_schema import Corpus
from pipelines.decoding import Decoder, Piece, default_workers
from pipelines.encoding import Encoded, EncoderLine, Inputs, cut_batches
from pipelines.errors import DiskError
from pipelines.extract_report import ExtractReport, quarantine_reasons
from pipelines.hub_files import give_up, resume
from pipelines.identity import LoadedEncoder
from pipelines.no_speech import is_no_speech
from pipelines.recipes import Recipe
from tinyaudio.audio import HOP_LENGTH, SAMPLING_RATE, Samples
from tinyaudio.encoder import give_back_free_memory

AHEAD_SHARDS = 1
AHEAD_BATCHES = 2
STATED_SLACK_S, STATED_SLACK = 0.5, 0.05  # a recording may be so much longer or shorter than its corpus says

Item = TypeVar("Item")
Row = dict[str, Any]


class Progress(Protocol):
    """What extraction reports to: seconds of audio done and a word on the state."""

    def __call__(self, audio_s: float, state: dict[str, Any]) -> None: ...


@dataclass
class Job:
    """One shard under way."""

    writer: ShardWriter
    rows: dict[str, Row]  # by source_id
    pieces: list[Future[Piece]]


@dataclass(frozen=True)
class Work:
    """One batch on its way to the encoder; without inputs, the end of its shard."""

    job: Job
    rows: list[Row]
    lengths: list[int]
    inputs: Inputs | None


def ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """Run an iterator in a thread of its own, at most `depth` items ahead; its exceptions arrive here."""
    waiting: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(entry, timeout=0.1)
                return

    def run() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=run, name="prepare", daemon=True)
    thread.start()
    try:
        while (entry := waiting.get())[0]:
            yield entry[1]
        if entry[1] is not None:
            raise entry[1]
    finally:
        stopped.set()
        thread.join()


class ShardLine:
    """Shards of one store through one encoder."""

    def __init__(
        self,
        recipe: Recipe,
        corpus: Corpus,
        encoder: LoadedEncoder,
        store: FeatureStore,
        report: ExtractReport,
        *,
        on_progress: Progress | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Set up; `check` is called after every committed shard and may raise."""
        self.recipe, self.corpus, self.store, self.report = recipe, corpus, store, report
        self.line = EncoderLine(encoder)
        self.on_progress, self.check = on_progress, check
        self.total_s = 0.0
        self._open: dict[int, ShardWriter] = {}
        self._samples_used = self._samples_padded = 0
        self._written_frames = self._num_bad = 0
        self._disk_error: DiskError | None = None

    def run(self, shards: Sequence[int]) -> None:
        """Work through shards; those that another living writer holds are left to it.

        Raises:
            DiskError: too little room for the next shard; those begun are finished first.
            FetchError, PipelineError: as `Decoder.collect`.
        """
        self.total_s, self._num_bad = self._planned_s(shards), sum(self.report.quarantined.values())
        workers = self.recipe.extract.decode_workers
        workers = default_workers(self.line.device.type == "cuda") if workers is None else workers
        begun = time.monotonic()
        resume()
        try:
            with (
                Decoder(self.corpus, workers) as decoder,
                ThreadPoolExecutor(1, thread_name_prefix="store") as storing,
                ThreadPoolExecutor(1, thread_name_prefix="commit") as committing,
                self.line.side_by_side(),
            ):
                self._encode_all(ahead(self._works(shards, decoder), AHEAD_BATCHES), storing, committing)
        finally:
            self._give_back()
        self.report.line_s += time.monotonic() - begun
        self.report.encoder_busy = self.report.encode_s / self.line.num_lines / max(self.report.line_s, 1e-9)
        if self._disk_error is not None:
            raise self._disk_error

    def _planned_s(self, shards: Sequence[int]) -> float:
        plan = pq.read_table(self.store.layout.plan, columns=["shard", "num_frames"])
        mine = np.isin(plan["shard"].to_numpy(), shards)
        return float(plan["num_frames"].to_numpy()[mine].sum()) * HOP_LENGTH / SAMPLING_RATE

    def _give_back(self) -> None:
        for writer in self._open.values():
            writer.__exit__(RuntimeError, RuntimeError("interrupted"), None)
        self._open.clear()

    # ------------------------------------------------------------------------------------------- before the encoder

    def _works(self, shards: Sequence[int], decoder: Decoder) -> Iterator[Work]:
        """Yield every batch of every shard, in order; decoding runs ahead."""
        jobs = self._jobs(shards, decoder)
        begun = list(itertools.islice(jobs, 1 + AHEAD_SHARDS))
        while begun:
            job = begun.pop(0)
            samples = self._collect(job, decoder)
            lengths = {source_id: len(recording) for source_id, recording in samples.items()}
            for batch in cut_batches(lengths, self.line.batch_s(self.recipe.extract.batch_s)):
                recordings = [samples.pop(source_id) for source_id in batch]
                rows = [job.rows[source_id] for source_id in batch]
                yield Work(job, rows, [len(recording) for recording in recordings], self.line.prepare(recordings))
            yield Work(job, [], [], None)
            begun += itertools.islice(jobs, 1)

    def _jobs(self, shards: Sequence[int], decoder: Decoder) -> Iterator[Job]:
        for shard in shards:
            if not self._has_room():
                return
            writer = self.store.write_shard(shard)
            if writer is not None:
                self._open[shard] = writer
                rows = {row["source_id"]: row for row in writer.plan.to_pylist()}
                yield Job(writer, rows, decoder.submit(list(rows)))

    def _has_room(self) -> bool:
        """Look whether the disk takes this shard, those begun, and the margin."""
        free = shutil.disk_usage(self.store.path).free
        needed = self.store.rows_per_shard * self.store.header.bytes_per_row * (1 + len(self._open))
        margin = self.recipe.extract.disk_margin_gb * 1e9
        if free >= needed + margin:
            return True
        self._disk_error = DiskError(
            f"{free / 1e9:.2f} GB free at {str(self.store.path)!r}; the next shards need {needed / 1e9:.2f} GB and the "
            f"recipe keeps {margin / 1e9:g} GB clear (extract.disk_margin_gb); make room and type the same again"
        )
        return False

    def _collect(self, job: Job, decoder: Decoder) -> dict[str, Samples]:
        """Wait for a shard's recordings and quarantine those that cannot be encoded."""
        decoded, seconds = decoder.collect(job.pieces)
        job.pieces = []
        self.report.decode_s += seconds
        samples: dict[str, Samples] = {}
        for source_id, outcome in decoded:
            reason = outcome if isinstance(outcome, str) else self._unfit(job.rows[source_id], outcome)
            if reason:
                kind, _, detail = reason.partition(": ")
                job.writer.quarantine(job.rows[source_id]["utterance_id"], kind, detail)
                self._num_bad += 1
            elif not isinstance(outcome, str):
                samples[source_id] = outcome
        return samples

    def _unfit(self, row: Row, samples: Samples) -> str:
        """Say why a decoded recording is not stored: metadata may have lied, or have been silent."""
        duration_s, limits, stated_s = len(samples) / SAMPLING_RATE, self.recipe.corpus, row["duration_s"]
        if duration_s < limits.min_duration_s:
            return f"too_short: {duration_s:.3f} s when decoded"
        if duration_s > limits.max_duration_s:
            return f"too_long: {duration_s:.1f} s when decoded"
        if stated_s is not None and abs(duration_s - stated_s) > max(STATED_SLACK_S, STATED_SLACK * stated_s):
            return f"other_duration: {duration_s:.2f} s when decoded, {stated_s:.2f} s stated"
        if is_no_speech(row["source_id"]) or row["transcript"]:
            return ""
        return "no_text: the transcript is empty"

    # ------------------------------------------------------------------------------------------- from the encoder on

    def _encode_all(self, works: Iterator[Work], storing: ThreadPoolExecutor, committing: ThreadPoolExecutor) -> None:
        stored: list[Future[None]] = []
        commits: list[Future[None]] = []
        try:
            for work in works:
                if work.inputs is None:
                    while len(commits) > 1:
                        commits.pop(0).result()
                    done = stored[-1] if stored else None
                    commits.append(committing.submit(self._commit, work.job, done))
                    continue
                encoded = self.line.encode(work.inputs)
                stored.append(storing.submit(self._store, work, encoded))
                while len(stored) > AHEAD_BATCHES + self.line.num_lines - 1:
                    stored.pop(0).result()
            for future in (*stored, *commits):
                future.result()
        except BaseException:
            give_up()
            for future in (*stored, *commits):
                future.cancel()
            raise
        finally:
            works.close()  # type: ignore[attr-defined]  # a generator: stop its thread before claims are given back

    def _store(self, work: Work, encoded: Encoded) -> None:
        """Hand a batch to its shard's writer, which narrows or quantises it."""
        assert work.inputs is not None
        features, seconds = encoded.read()
        self.report.encode_s += seconds
        self._samples_used += work.inputs.num_samples
        self._samples_padded += work.inputs.values.numel()
        writer = work.job.writer
        for row, length, frames in zip(work.rows, work.lengths, features, strict=True):
            is_stored = writer.append(
                row["utterance_id"],
                frames,
                num_samples=length,
                duration_s=length / SAMPLING_RATE,
                transcript=row["transcript"],
                speaker=row["speaker"],
                source=row["source"],
                extra={"sex": row["sex"]} if row["sex"] else None,
            )
            self._written_frames += len(frames) if is_stored else 0
            self._num_bad += not is_stored
        self.report.padding = 1 - self._samples_used / self._samples_padded
        self.report.hours_now += work.inputs.num_samples / SAMPLING_RATE / 3600
        self._report_progress(work.inputs.num_samples / SAMPLING_RATE, writer.shard)

    def _commit(self, job: Job, stored: Future[None] | None) -> None:
        if stored is not None:
            stored.result()
        begun = time.monotonic()
        try:
            job.writer.__exit__(None, None, None)
        except LostClaimError:  # another writer took the shard for abandoned and finished it
            return
        finally:
            self._open.pop(job.writer.shard, None)
            self.report.write_s += time.monotonic() - begun
            give_back_free_memory()
        self.report.shards_written += 1
        if job.writer.num_quarantined:
            self.report.quarantined.update(quarantine_reasons(self.store, job.writer.shard))
        self.check()

    def _report_progress(self, audio_s: float, shard: int) -> None:
        if self.on_progress is not None:
            written = self._written_frames * self.store.header.bytes_per_row
            state = {"shard": shard, "total_s": self.total_s, "bad": self._num_bad, "written_bytes": written}
            self.on_progress(audio_s, state)
