"""Fetch and decode recordings while others are encoded, in threads or in processes.

One worker fetches and decodes a piece (a row group, a few files). Processes are spawned, never forked: a fork of a
process with threads of torch and Arrow can hang. They end with their parent, even if it is killed, and leave Ctrl-C
to it. Knows nothing of torch, so that a worker starts in a second and takes little memory.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Self

import numpy as np

from pipelines.corpora.corpus import Corpus
from pipelines.corpora.no_speech import is_no_speech, no_speech_samples
from pipelines.errors import PipelineError, SourceError
from tinyaudio.model.audio import SAMPLING_RATE, Samples, iter_audio
from tinyaudio.model.errors import AudioError
from tinyaudio.model.guard import CODES

HUB_PROCESSES = 16  # at most, for a corpus on the hub: they wait for the network too
THREADS = 4  # libsndfile and soxr release the interpreter lock
MAX_PROCESSES = 8
GROUPS_REMEMBERED = 1024  # more than the shards that are decoded ahead have

Decoded = tuple[str, Samples | str]  # source_id, and samples or "reason: detail"


@dataclass(frozen=True)
class Piece:
    """Recordings decoded by one worker, and the seconds that it took."""

    decoded: list[Decoded]
    seconds: float


def default_workers(is_gpu: bool, is_hub: bool = False) -> int:
    """Choose the number of decoding processes; 0 (threads) if the encoder itself runs on the CPU."""
    limit = HUB_PROCESSES if is_hub else MAX_PROCESSES
    return min(limit, max(1, len(os.sched_getaffinity(0)) - 1)) if is_gpu else 0


class Decoder:
    """A pool of workers over one corpus; a context manager."""

    def __init__(self, corpus: Corpus, num_processes: int, limit_s: float, *, is_hub: bool = False) -> None:
        """Open the pool.

        Args:
            num_processes: 0 decodes in threads.
            limit_s: seconds after which decoding of a recording stops.
            is_hub: let one worker read all pieces of a row group, in the order of the shards, since it continues where
                the shard before stopped.
        """
        self._corpus, self._num_processes, self._limit_s = corpus, num_processes, limit_s
        self._is_hub, context = is_hub, multiprocessing.get_context("spawn")
        # A pool for each process: its own thread receives its samples, at 15,000 times real time. One thread for all
        # would be slower than everything else here.
        self._pools: list[Executor] = [
            ProcessPoolExecutor(1, context, _start_worker, (corpus, limit_s)) for _ in range(num_processes)
        ]
        if not num_processes:
            sizes = [1] * THREADS if is_hub else [THREADS]
            self._pools = [ThreadPoolExecutor(size, thread_name_prefix="decode") for size in sizes]
        self._unfinished: list[set[Future[Piece]]] = [set() for _ in self._pools]
        self._pool_of: dict[str, int] = {}  # the last row groups, and which pool read them

    def warm_up(self) -> None:
        """Start every worker and wait until all of them have started."""
        for ready in [pool.submit(time.sleep, 0.0) for pool in self._pools[: self._num_processes]]:
            ready.result()

    def submit(self, source_ids: Sequence[str]) -> list[Future[Piece]]:
        """Start to fetch and decode utterances."""
        silent = [source_id for source_id in source_ids if is_no_speech(source_id)]
        pieces = self._corpus.pieces(source_id for source_id in source_ids if not is_no_speech(source_id))
        return [self._submit(piece) for piece in (*pieces, silent) if piece]

    def _submit(self, piece: list[str]) -> Future[Piece]:
        """Give a piece to the least busy pool; one of the hub to the pool that has read its row group before."""
        self._unfinished = [{future for future in futures if not future.done()} for futures in self._unfinished]
        number = min(range(len(self._pools)), key=lambda number: len(self._unfinished[number]))
        if self._is_hub:
            row_group = piece[0].rpartition(":")[0]
            number = self._pool_of.pop(row_group, number)
            self._pool_of[row_group] = number
            if len(self._pool_of) > GROUPS_REMEMBERED:
                del self._pool_of[next(iter(self._pool_of))]
        pool = self._pools[number]
        if self._num_processes:
            future = pool.submit(_decode_in_worker, piece)
        else:
            future = pool.submit(decode_piece, self._corpus, piece, self._limit_s)
        self._unfinished[number].add(future)
        return future

    def collect(self, futures: Sequence[Future[Piece]]) -> tuple[list[Decoded], float]:
        """Wait for pieces; return every recording or reason, and the seconds of work.

        Raises:
            FetchError: the network failed for as long as the recipe waits.
            PipelineError: a decoding process died.
        """
        try:
            pieces = [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise PipelineError(
                "a decoding process died (out of memory, or a recording crashed the decoder). Run the same command "
                "again, with --set extract.decode_workers=0 if it happens twice"
            ) from error
        return [one for piece in pieces for one in piece.decoded], sum(piece.seconds for piece in pieces)

    def terminate(self) -> None:
        """End worker processes at once, since they may be waiting for the network for hours."""
        if self._num_processes:
            for worker in multiprocessing.active_children():
                worker.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.terminate()
        for pool in self._pools:
            pool.shutdown(wait=kind is None, cancel_futures=True)


def decode_piece(corpus: Corpus, source_ids: Sequence[str], limit_s: float) -> Piece:
    """Fetch and decode the utterances of one piece; one that cannot be decoded has a reason instead of samples.

    Args:
        limit_s: seconds after which decoding of a recording stops, as "too_long".

    Raises:
        FetchError: the network failed for as long as the recipe waits.
    """
    started = time.monotonic()
    decoded: list[Decoded] = []
    if source_ids and is_no_speech(source_ids[0]):
        decoded = [(source_id, no_speech_samples(source_id)) for source_id in source_ids]
    else:
        why = "the row is missing"
        try:
            decoded.extend((source_id, _decode(audio, limit_s)) for source_id, audio in corpus.read_audio(source_ids))
        except SourceError as error:
            why = str(error)
        done = {source_id for source_id, _ in decoded}
        decoded += [(source_id, f"unreadable: {why}") for source_id in source_ids if source_id not in done]
    return Piece(decoded, time.monotonic() - started)


def _decode(audio: bytes, limit_s: float) -> Samples | str:
    """Decode one recording block by block, since a wrong header may promise days and memory is for one shard.

    A recording that is not decoded whole is refused: its transcript would say more than its features.
    """
    if not audio:
        return "no_audio: missing file or empty cell"
    blocks: list[Samples] = []
    codes: list[str] = []
    length = 0
    try:
        for block in iter_audio(audio, on_warning=codes.append):
            blocks.append(block)
            length += len(block)
            if length > limit_s * SAMPLING_RATE:
                return f"too_long: more than {limit_s:g} s when decoded"
    except AudioError as error:
        return f"undecodable: {error}"
    if missing := [code for code in codes if code in ("input_truncated", "input_damaged")]:
        return f"incomplete: {CODES[missing[0]]}; {length / SAMPLING_RATE:.2f} s can be decoded"
    if not blocks:
        return "undecodable: it has no samples"
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


_worker: tuple[Corpus, float] | None = None  # in a worker process


def _start_worker(corpus: Corpus, limit_s: float) -> None:
    global _worker
    _worker = corpus, limit_s
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all processes; the parent ends this one
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent has ended; a worker of the pool would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _decode_in_worker(source_ids: list[str]) -> Piece:
    assert _worker is not None
    corpus, limit_s = _worker
    return decode_piece(corpus, source_ids, limit_s)
