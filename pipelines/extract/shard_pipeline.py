"""The pipeline that shards pass through: claim, fetch and decode, encode, quantise, commit; all stages at once.

    decode (workers) -> prepare (a thread) -> encode (GPU, or a thread a core) -> store (a thread) -> commit (a thread)

Every stage runs a bounded distance ahead of the next: one shard is decoded ahead (three with a GPU), two batches wait
on either side of the encoder, and one finished shard is written while the next is filled. So the size of a shard bounds
the memory, not the size of the corpus (`memory_bound`). A batch never crosses shards. The longest recordings come
first, so that all lanes are busy until a shard ends.
"""

import json
import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants

from cache import FeatureStore, ShardWriter
from cache.blocks import Rows
from cache.claims import is_free
from cache.errors import DiskFullError, LostClaimError, is_disk_full
from pipelines.corpora.corpus import Corpus
from pipelines.corpora.no_speech import is_no_speech
from pipelines.encoders import LoadedEncoder
from pipelines.extract.batching import cut_batches
from pipelines.extract.decode import Decoder, Piece, default_workers
from pipelines.extract.encode import Encoded, EncodedBatch, Inputs, open_batch_encoder
from pipelines.extract.report import ExtractReport
from pipelines.recipes import Recipe
from pipelines.retry import give_up, pause, resume
from tinyaudio.model.audio import HOP_LENGTH, SAMPLING_RATE, Samples
from tinyaudio.model.encoder import give_back_free_memory

AHEAD_SHARDS, AHEAD_SHARDS_GPU = 1, 3  # decoded while one is encoded
AHEAD_BATCHES = 2
STATED_SLACK_S, STATED_SLACK = 0.5, 0.05  # tolerated difference between a recording and its stated duration
POLL_S = 60.0  # between checks of a full disk

Value = TypeVar("Value")
Result = TypeVar("Result")
Row = dict[str, Any]
Progress = Callable[[float, dict[str, Any]], None]  # of each encoder batch: seconds of audio, state of the extraction
_log = logging.getLogger("tinyaudio")


@dataclass
class Shard:
    """One shard in the pipeline: its writer, its rows of the plan by source_id, and its recordings being decoded."""

    writer: ShardWriter
    rows: dict[str, Row]
    pieces: list[Future[Piece]]


class ShardPipeline:
    """Shards of one store through one encoder; a context manager, whose decoding workers serve several `run` calls."""

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
        self.encoder = open_batch_encoder(encoder, store.header.encoding, store.calibration)
        self.on_progress, self.check = on_progress, check
        self._is_gpu = self.encoder.device.type == "cuda"
        self._open: dict[int, ShardWriter] = {}  # claimed and not committed
        self._total_s = 0.0
        self._samples_used = self._samples_padded = self._written_frames = self._num_bad = 0

    def __enter__(self) -> Self:
        workers = self.recipe.extract.decode_workers
        is_hub = self.recipe.corpus.name is not None
        workers = default_workers(self._is_gpu, is_hub) if workers is None else workers
        self._decoder = Decoder(self.corpus, workers, self.recipe.corpus.max_duration_s, is_hub=is_hub)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._decoder.__exit__(kind)

    def warm_up(self) -> None:
        """Start the decoding workers before the first shard."""
        self._decoder.warm_up()

    def run(self, shards: Sequence[int]) -> None:
        """Make shards, except those that another running writer has claimed.

        While the disk is full, wait for as long as `extract.disk_patience_s` says and try again.

        Raises:
            DiskFullError: the disk was full for as long as the recipe waits.
            FetchError, PipelineError: as `Decoder.collect`.
        """
        plan = pq.read_table(self.store.layout.plan, columns=["shard", "num_frames"])
        planned_frames = plan["num_frames"].to_numpy()[np.isin(plan["shard"].to_numpy(), shards)].sum()
        self._total_s = float(planned_frames) * HOP_LENGTH / SAMPLING_RATE
        left, full_since = list(shards), math.inf
        while left:
            self._num_bad = sum(self.report.quarantined.values())
            resume()
            try:
                self._run_pools(left)
                return
            except OSError as error:
                if not is_disk_full(error):
                    raise
                before, now, pending = len(left), time.monotonic(), set(self.store.pending_shards())
                left = [shard for shard in left if shard in pending]
                full_since = now if len(left) < before else min(full_since, now)
                left_s = self.recipe.extract.disk_patience_s - (now - full_since)
                if left_s <= 0:
                    raise
                _log.warning("%s Waiting for disk space for up to %.1f h more.", error, left_s / 3600)
                time.sleep(min(POLL_S, left_s))
                self._decoder.__exit__(type(error))
                self.__enter__()

    def _run_pools(self, shards: Sequence[int]) -> None:
        """Start the threads, make shards, and return the claims of unfinished ones after an error."""
        started = time.monotonic()
        try:
            with (
                ThreadPoolExecutor(1, "prepare") as preparing,
                ThreadPoolExecutor(1, "store") as storing,
                ThreadPoolExecutor(1, "commit") as committing,
                self.encoder.lanes(),
            ):
                try:
                    self._run(shards, preparing, storing, committing)
                except BaseException:
                    give_up()
                    self._decoder.terminate()
                    for pool in (preparing, storing, committing):
                        pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            for writer in self._open.values():
                writer.__exit__(RuntimeError, RuntimeError("interrupted"), None)
            self._open.clear()
            self.report.line_s += time.monotonic() - started
            self.report.encoder_busy = self.report.encode_s / self.encoder.num_lanes / max(self.report.line_s, 1e-9)

    def _run(
        self,
        shards: Sequence[int],
        preparing: ThreadPoolExecutor,
        storing: ThreadPoolExecutor,
        committing: ThreadPoolExecutor,
    ) -> None:
        waiting, decoding = deque(shards), deque[Shard]()
        stored, commits = deque[Future[None]](), deque[Future[None]]()
        num_ahead = AHEAD_SHARDS_GPU if self._is_gpu else AHEAD_SHARDS
        while True:
            # 1. Wait for the recordings of one shard, and start to decode the next ones.
            self._claim(waiting, decoding, 1, is_idle=True)
            if not decoding:
                break
            shard = decoding.popleft()
            samples = self._collect(shard)
            self._claim(waiting, decoding, num_ahead, is_idle=False)
            lengths = {source_id: len(recording) for source_id, recording in samples.items()}
            batches = cut_batches(lengths, self.encoder.batch_s(self.recipe.extract.batch_s))[::-1]
            # 2. Prepare, encode and store its batches.
            recordings = ([samples.pop(source_id) for source_id in batch] for batch in batches)
            prepared = run_ahead(preparing, self.encoder.prepare, recordings, AHEAD_BATCHES)
            for batch, inputs in zip(batches, prepared, strict=True):
                encoded = self.encoder.encode(inputs)
                rows_here = [shard.rows[source_id] for source_id in batch]
                sizes = [lengths[source_id] for source_id in batch]
                stored.append(storing.submit(self._store, shard.writer, rows_here, sizes, inputs, encoded))
                while len(stored) > AHEAD_BATCHES + self.encoder.num_lanes - 1:
                    stored.popleft().result()
            # 3. Commit it when its last batch is stored.
            while len(commits) > 1:
                commits.popleft().result()
            commits.append(committing.submit(self._commit, shard.writer, stored[-1] if stored else None))
        for future in (*stored, *commits):
            future.result()

    def _claim(self, waiting: deque[int], decoding: deque[Shard], count: int, *, is_idle: bool) -> None:
        """Claim shards and start to decode them until `count` are being decoded, as far as the disk has space."""
        while waiting and len(decoding) < count and self._has_space(is_idle=is_idle and not decoding):
            shard = waiting.popleft()
            writer = self.store.write_shard(shard)
            if writer is None:
                waiting.rotate(-begin_elsewhere(self.store, waiting))
            else:
                self._open[writer.shard] = writer
                rows = {row["source_id"]: row for row in writer.plan.to_pylist()}
                decoding.append(Shard(writer, rows, self._decoder.submit(list(rows))))

    def _has_space(self, *, is_idle: bool) -> bool:
        """Check for disk space for another shard; if nothing else is left to do, wait for the open ones.

        Raises:
            DiskFullError: there is no space, and every shard that was begun is committed.
        """
        while lack := lack_of_space(self.recipe, self.store, self._open.keys()):
            if not is_idle:
                return False
            if not self._open:
                raise DiskFullError(lack)
            if pause(0.1):  # the open shards may need less than was reserved for them
                return False
        return True

    def _collect(self, shard: Shard) -> dict[str, Samples]:
        """Wait for a shard's recordings, and quarantine those that will not be encoded."""
        decoded, seconds = self._decoder.collect(shard.pieces)
        shard.pieces = []
        self.report.decode_s += seconds
        limits, max_samples = self.recipe.corpus, self.encoder.family.max_samples
        samples: dict[str, Samples] = {}
        for source_id, outcome in decoded:
            row, reason = shard.rows[source_id], ""
            if isinstance(outcome, str):
                reason = outcome
            else:
                duration_s, stated_s = len(outcome) / SAMPLING_RATE, row["duration_s"]
                if duration_s < limits.min_duration_s:
                    reason = f"too_short: {duration_s:.3f} s when decoded"
                elif stated_s is not None and abs(duration_s - stated_s) > max(STATED_SLACK_S, STATED_SLACK * stated_s):
                    reason = f"other_duration: {duration_s:.2f} s when decoded, {stated_s:.2f} s stated"
                elif max_samples is not None and len(outcome) > max_samples:
                    takes_s = max_samples / SAMPLING_RATE
                    reason = f"beyond_encoder: {duration_s:.2f} s when decoded, the encoder takes {takes_s:g} s"
                elif not row["transcript"] and not is_no_speech(source_id):
                    reason = "no_text: the transcript is empty"
                else:
                    samples[source_id] = outcome
            if reason:
                kind, _, detail = reason.partition(": ")
                shard.writer.quarantine(row["utterance_id"], kind, detail)
                self._num_bad += 1
        return samples

    def _store(
        self,
        writer: ShardWriter,
        rows: Sequence[Row],
        lengths: Sequence[int],
        inputs: Inputs,
        encoded: Callable[[], EncodedBatch],
    ) -> None:
        """Wait for a batch and append it to its shard."""
        batch, audio_s = encoded(), inputs.num_samples / SAMPLING_RATE
        for row, length, recording in zip(rows, lengths, batch.recordings, strict=True):
            is_stored = append(writer, row, length, recording)
            self._written_frames += self.encoder.family.num_frames(length) if is_stored else 0
            self._num_bad += not is_stored
        self._samples_used += inputs.num_samples
        self._samples_padded += inputs.values.numel()
        self.report.encode_s += batch.seconds
        self.report.padding = 1 - self._samples_used / self._samples_padded
        self.report.hours_now += audio_s / 3600
        if self.on_progress is not None:
            written = self._written_frames * self.store.header.bytes_per_row
            state = {"shard": writer.shard, "total_s": self._total_s, "bad": self._num_bad, "written_bytes": written}
            self.on_progress(audio_s, state)

    def _commit(self, writer: ShardWriter, last_stored: Future[None] | None) -> None:
        """Commit a shard when its last batch is stored."""
        if last_stored is not None:
            last_stored.result()
        started = time.monotonic()
        try:
            writer.__exit__(None, None, None)
        except LostClaimError:  # another writer took the shard for abandoned, and finished it
            return
        except BaseException:
            give_up()  # ends waits for space and for the network; `run` raises this error
            raise
        finally:
            self._open.pop(writer.shard, None)
            self.report.write_s += time.monotonic() - started
            give_back_free_memory()
            pa.default_memory_pool().release_unused()  # Arrow's, from the row groups that were read
        self.report.shards_written += 1
        self.check()


def begin_elsewhere(store: FeatureStore, waiting: Sequence[int]) -> int:
    """Choose where to continue when another process is making the next shard: in the middle of the longest free run.

    Processes that share a store so make runs of neighbouring shards, and not every other one: most row groups are
    divided by two shards, and a process fetches both parts at once.

    Returns:
        The position in `waiting`, shards in the order in which they would be made.
    """
    taken = claimed_shards(store).union(store.committed_shards())
    best, length, run, before = 0, 0, 0, -1
    for position, shard in enumerate(waiting):
        run = 0 if shard in taken else run + 1 if shard == before + 1 else 1
        before = shard
        if run > length:
            best, length = position - run + 1, run
    return best + length // 2


def claimed_shards(store: FeatureStore) -> set[int]:
    """List the shards that living processes are making, this one included."""
    claims = store.layout.claim(0).parent.glob("[0-9]*")
    return {int(path.name) for path in claims if path.name.isdigit() and not is_free(path)}


def run_ahead(
    pool: ThreadPoolExecutor, function: Callable[[Value], Result], values: Iterable[Value], depth: int
) -> Iterator[Result]:
    """Call a function on values in a pool, at most `depth` values ahead, and yield the results in order."""
    futures = deque[Future[Result]]()
    for value in values:
        futures.append(pool.submit(function, value))
        if len(futures) > depth:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def append(writer: ShardWriter, row: Row, num_samples: int, encoded: Encoded) -> bool:
    """Append one utterance to its shard; return whether it was stored, and not quarantined."""
    if not encoded.is_finite:
        return writer.quarantine(row["utterance_id"], "non_finite", "the features contain NaN or infinity")
    entry = {
        "utterance_id": row["utterance_id"],
        "num_samples": num_samples,
        "duration_s": num_samples / SAMPLING_RATE,
        "transcript": row["transcript"],
        "speaker": row["speaker"],
        "source": row["source"],
        "extra": json.dumps({"sex": row["sex"]}) if row["sex"] else None,
    }
    return writer.append_rows(Rows(encoded.features, encoded.scales), entry, num_clamped=encoded.num_clamped)


def memory_bound(rows_per_shard: int, bytes_per_row: int, is_gpu: bool) -> int:
    """Bound the bytes of samples and features that the pipeline holds, whatever the size of the corpus.

    Not included: the encoder, the activations of its batches, and the few row groups of encoded audio being read.
    """
    num_ahead = AHEAD_SHARDS_GPU if is_gpu else AHEAD_SHARDS
    samples = rows_per_shard * HOP_LENGTH * np.dtype(np.float32).itemsize
    return (num_ahead + 1) * samples + (num_ahead + 3) * rows_per_shard * bytes_per_row


def lack_of_space(recipe: Recipe, store: FeatureStore, mine: Collection[int]) -> str:
    """Describe what the disk lacks for one more shard; "" if it has the space.

    Counted are the shards that are claimed, here or elsewhere, one more, and the recipe's margin. A corpus whose files
    are fetched whole needs the margin on the disk of the hub client's cache too.

    Args:
        mine: shards that this process has claimed.
    """
    margin = int(recipe.extract.disk_margin_gb * 1e9)
    num_others = len(claimed_shards(store).difference(mine))
    needed = store.rows_per_shard * store.header.bytes_per_row * (1 + len(mine) + num_others)
    places = [(store.path, needed)]
    if recipe.corpus.name is not None and recipe.corpus.fetch == "files":
        cache = Path(constants.HF_HUB_CACHE)
        places.append((next(path for path in (cache, *cache.parents) if path.exists()), 0))
    for place, need in places:
        free = shutil.disk_usage(place).free
        if free < need + margin:
            others = f", with {num_others} claimed by other processes," if num_others else ""
            return (
                f"{free / 1e9:.2f} GB free at {str(place)!r}: the next shards{others} need {need / 1e9:.2f} GB, and "
                f"extract.disk_margin_gb keeps {margin / 1e9:g} GB free"
            )
    return ""
