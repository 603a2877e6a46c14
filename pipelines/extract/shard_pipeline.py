"""The line that shards go through: claimed, fetched and decoded, encoded, quantised, committed; all of it side by side.

    decoding workers -> prepare (1 thread) -> encode (GPU, or a thread a core) -> store (1 thread) -> commit (1 thread)

Queues between them are bounded: a shard is decoded ahead (three of them beside a GPU), two batches wait on either side
of the encoder, and one finished shard is being written while the next is filled. Memory is therefore bounded by the
size of a shard, whatever the size of the corpus (`memory_bound`). Batches never cross a shard; the longest come first:
a shard ends with the lanes full.
"""

import contextlib
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cache import FeatureStore, ShardWriter
from cache.blocks import Rows
from cache.errors import LostClaimError
from pipelines.corpora.corpus import Corpus
from pipelines.corpora.no_speech import is_no_speech
from pipelines.encoders import LoadedEncoder
from pipelines.errors import DiskError
from pipelines.extract.decode import Decoder, Piece, default_workers
from pipelines.extract.disk import DiskRoom, wait_for_room
from pipelines.extract.encode import Encoded, EncoderLine, Inputs, Stored, cut_batches
from pipelines.extract.report import ExtractReport
from pipelines.recipes import Recipe
from pipelines.retry import give_up, pause, resume
from tinyaudio.model.audio import HOP_LENGTH, SAMPLING_RATE, Samples, num_frames
from tinyaudio.model.encoder import give_back_free_memory

AHEAD_SHARDS, AHEAD_SHARDS_GPU = 1, 3  # submitted to decoding while one is encoded
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


def memory_bound(rows_per_shard: int, bytes_per_row: int, is_gpu: bool) -> int:
    """Bound the bytes of samples and features that the line holds, whatever the size of the corpus.

    Not in it: the encoder, the activations of its batches, and the few row groups of encoded audio being read.
    """
    ahead_shards = AHEAD_SHARDS_GPU if is_gpu else AHEAD_SHARDS
    samples = rows_per_shard * HOP_LENGTH * np.dtype(np.float32).itemsize
    return (ahead_shards + 1) * samples + (ahead_shards + 3) * rows_per_shard * bytes_per_row


class ShardLine:
    """Shards of one store through one encoder; a context manager, which keeps its decoding workers from run to run."""

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
        self.line = EncoderLine(encoder, store.calibration)
        self.on_progress, self.check = on_progress, check
        self.total_s = 0.0
        self._is_gpu = self.line.device.type == "cuda"
        self._room = DiskRoom(recipe, store)
        self._open: dict[int, ShardWriter] = {}
        self._samples_used = self._samples_padded = 0
        self._written_frames = self._num_bad = 0
        self._disk_error: DiskError | None = None

    def __enter__(self) -> Self:
        workers = self.recipe.extract.decode_workers
        workers = default_workers(self._is_gpu) if workers is None else workers
        self._decoder = Decoder(self.corpus, workers, self.recipe.corpus.max_duration_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._decoder.__exit__(kind, error, trace)

    def warm_up(self) -> None:
        """Start the decoding workers now and not with the first shard."""
        self._decoder.warm_up()

    def run(self, shards: Sequence[int]) -> None:
        """Work through shards; those that another living writer holds are left to it.

        Raises:
            DiskError: too little room for the next shard, for as long as the recipe waits; those begun are finished.
            FetchError, PipelineError: as `Decoder.collect`.
        """
        self.total_s, self._num_bad = self._planned_s(shards), sum(self.report.quarantined.values())
        begun = time.monotonic()
        resume()
        try:
            with (
                ThreadPoolExecutor(1, thread_name_prefix="store") as storing,
                ThreadPoolExecutor(1, thread_name_prefix="commit") as committing,
                self.line.side_by_side(),
            ):
                self._encode_all(ahead(self._works(shards), AHEAD_BATCHES), storing, committing)
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

    def _works(self, shards: Sequence[int]) -> Iterator[Work]:
        """Yield every batch of every shard, in order of the shards; decoding runs ahead."""
        waiting, begun = deque(shards), deque[Job]()
        ahead_shards = AHEAD_SHARDS_GPU if self._is_gpu else AHEAD_SHARDS
        while True:
            self._begin(waiting, begun, 1, is_idle=True)
            if not begun:
                return
            job = begun.popleft()
            samples = self._collect(job)
            self._begin(waiting, begun, ahead_shards, is_idle=False)
            lengths = {source_id: len(recording) for source_id, recording in samples.items()}
            for batch in reversed(cut_batches(lengths, self.line.batch_s(self.recipe.extract.batch_s))):
                recordings = [samples.pop(source_id) for source_id in batch]
                rows = [job.rows[source_id] for source_id in batch]
                yield Work(job, rows, [len(recording) for recording in recordings], self.line.prepare(recordings))
            yield Work(job, [], [], None)

    def _begin(self, waiting: deque[int], begun: deque[Job], count: int, *, is_idle: bool) -> None:
        """Claim shards and submit them to decoding until `count` are under way, as far as there is room."""
        while waiting and len(begun) < count and self._has_room(is_idle and not begun):
            shard = waiting.popleft()
            writer = self.store.write_shard(shard)
            if writer is not None:
                self._open[shard] = writer
                rows = {row["source_id"]: row for row in writer.plan.to_pylist()}
                begun.append(Job(writer, rows, self._decoder.submit(list(rows))))

    def _has_room(self, is_idle: bool) -> bool:
        """Look whether the disk takes another shard; with nothing else to do, wait for somebody to make room."""
        begun, patience_s = time.monotonic(), self.recipe.extract.disk_patience_s
        gave_up = False
        while not gave_up and (lack := self._room.lack(self._open.keys())):
            left_s = patience_s - (time.monotonic() - begun)
            if not is_idle:
                return False
            if self._open:  # what is being written may need less than was kept for it
                gave_up = pause(0.1)
            elif left_s > 0:
                gave_up = wait_for_room(lack, left_s)
            else:
                self._disk_error = DiskError(f"{lack}; make room and type the same again")
                return False
        return not gave_up

    def _collect(self, job: Job) -> dict[str, Samples]:
        """Wait for a shard's recordings and quarantine those that cannot be encoded."""
        decoded, seconds = self._decoder.collect(job.pieces)
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
            self._decoder.terminate()
            for future in (*stored, *commits):
                future.cancel()
            raise
        finally:
            works.close()  # type: ignore[attr-defined]  # a generator: stop its thread before claims are given back

    def _store(self, work: Work, encoded: Encoded) -> None:
        """Hand a batch to its shard's writer, which narrows or quantises it."""
        assert work.inputs is not None
        features, seconds = encoded.read_stored()
        self.report.encode_s += seconds
        self._samples_used += work.inputs.num_samples
        self._samples_padded += work.inputs.values.numel()
        writer = work.job.writer
        for row, length, frames in zip(work.rows, work.lengths, features, strict=True):
            is_stored = _append(writer, row, length, frames)
            self._written_frames += num_frames(length) if is_stored else 0
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
        except BaseException:
            give_up()  # nobody waits for room or the network now; the error is raised when the line has stopped
            raise
        finally:
            self._open.pop(job.writer.shard, None)
            self.report.write_s += time.monotonic() - begun
            give_back_free_memory()
            pa.default_memory_pool().release_unused()  # Arrow's own, of the row groups that were read
        self.report.shards_written += 1
        self.check()

    def _report_progress(self, audio_s: float, shard: int) -> None:
        if self.on_progress is not None:
            written = self._written_frames * self.store.header.bytes_per_row
            state = {"shard": shard, "total_s": self.total_s, "bad": self._num_bad, "written_bytes": written}
            self.on_progress(audio_s, state)


def _append(writer: ShardWriter, row: Row, num_samples: int, frames: Stored) -> bool:
    """Hand one utterance to its shard; whether it was stored and not quarantined."""
    about = {
        "num_samples": num_samples,
        "duration_s": num_samples / SAMPLING_RATE,
        "transcript": row["transcript"],
        "speaker": row["speaker"],
        "source": row["source"],
    }
    extra = {"sex": row["sex"]} if row["sex"] else None
    if frames is None:
        return writer.quarantine(row["utterance_id"], "non_finite", "the features hold NaN or infinity")
    if isinstance(frames, Rows):
        entry = {"utterance_id": row["utterance_id"], **about, "extra": extra and json.dumps(extra, sort_keys=True)}
        return writer.append_rows(frames, entry)
    return writer.append(row["utterance_id"], frames, **about, extra=extra)
