"""Fetching and decoding recordings beside the encoder, in threads or in processes.

A piece (a row group, a few files) is fetched and decoded by one worker. Processes are spawned, never forked: forking
beside torch's and Arrow's threads can hang. They end with their parent, even if that is killed, and leave Ctrl-C to it.
Knows nothing of torch, so that a worker starts in a second and takes little memory.
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
from types import TracebackType
from typing import Self

import numpy as np

from pipelines.corpora.corpus import Corpus
from pipelines.corpora.no_speech import is_no_speech, no_speech_samples
from pipelines.errors import PipelineError, SourceError
from tinyaudio.model.audio import SAMPLING_RATE, Samples, iter_audio
from tinyaudio.model.errors import AudioError

THREADS = 4  # libsndfile and soxr release the interpreter lock
MAX_PROCESSES = 8
WARM_UP_S = 0.2  # each worker is busy so long, so that the pool starts all of them

Decoded = tuple[str, Samples | str]  # source_id, and samples or "reason: detail"


@dataclass(frozen=True)
class Piece:
    """What one worker brought, and the seconds it took."""

    decoded: list[Decoded]
    seconds: float


def default_workers(is_gpu: bool) -> int:
    """Choose how many decoding processes: none beside an encoder that needs the CPU itself."""
    return min(MAX_PROCESSES, max(1, len(os.sched_getaffinity(0)) - 1)) if is_gpu else 0


class Decoder:
    """A pool of workers over one corpus; a context manager."""

    def __init__(self, corpus: Corpus, num_processes: int, limit_s: float) -> None:
        """Start the workers; of a recording longer than `limit_s` seconds no more than that is ever decoded."""
        self._corpus, self._num_processes, self._limit_s = corpus, num_processes, limit_s
        self._pool: Executor = self._open_pool()

    def _open_pool(self) -> Executor:
        if not self._num_processes:
            return ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(
            self._num_processes,
            mp_context=context,
            initializer=_start_worker,
            initargs=(self._corpus, self._limit_s),
        )

    def warm_up(self) -> None:
        """Start every worker and wait until all of them have started."""
        for ready in [self._pool.submit(time.sleep, WARM_UP_S) for _ in range(self._num_processes)]:
            ready.result()

    def submit(self, source_ids: Sequence[str]) -> list[Future[Piece]]:
        """Begin to fetch and decode utterances."""
        silent = [source_id for source_id in source_ids if is_no_speech(source_id)]
        pieces = self._corpus.pieces(source_id for source_id in source_ids if not is_no_speech(source_id))
        pieces += [silent] if silent else []
        if self._num_processes:
            return [self._pool.submit(_decode_in_worker, piece) for piece in pieces]
        return [self._pool.submit(decode_piece, self._corpus, piece, self._limit_s) for piece in pieces]

    def collect(self, futures: Sequence[Future[Piece]]) -> tuple[list[Decoded], float]:
        """Wait for pieces.

        Returns:
            All that was decoded, and the seconds of work.

        Raises:
            FetchError: the network stayed away.
            PipelineError: a decoding process died.
        """
        try:
            pieces = [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise PipelineError(
                "a decoding process died (out of memory, or a recording that crashes its decoder); type the same "
                "again, with --set extract.decode_workers=0 if it happens twice"
            ) from error
        return [one for piece in pieces for one in piece.decoded], sum(piece.seconds for piece in pieces)

    def terminate(self) -> None:
        """End worker processes at once; they may be waiting for the network, for as long as the recipe says."""
        if self._num_processes:
            for worker in multiprocessing.active_children():
                worker.terminate()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.terminate()
        self._pool.shutdown(wait=kind is None, cancel_futures=True)


def decode_piece(corpus: Corpus, source_ids: Sequence[str], limit_s: float) -> Piece:
    """Fetch and decode the utterances of one piece; what cannot be decoded comes with its reason instead of samples.

    Args:
        limit_s: seconds after which decoding a recording is given up, as "too_long".

    Raises:
        FetchError: the network stayed away.
    """
    begun = time.monotonic()
    if source_ids and is_no_speech(source_ids[0]):
        return Piece([(source_id, no_speech_samples(source_id)) for source_id in source_ids], time.monotonic() - begun)
    decoded: list[Decoded] = []
    why = "the row is not there"
    try:
        decoded.extend((source_id, _decode(audio, limit_s)) for source_id, audio in corpus.read_audio(source_ids))
    except SourceError as error:
        why = str(error)
    done = {source_id for source_id, _ in decoded}
    decoded += [(source_id, f"unreadable: {why}") for source_id in source_ids if source_id not in done]
    return Piece(decoded, time.monotonic() - begun)


def _decode(audio: bytes, limit_s: float) -> Samples | str:
    """Decode one recording, block by block: a header or a mistake may promise days, and memory is for one shard."""
    if not audio:
        return "no_audio: missing file or empty cell"
    blocks: list[Samples] = []
    length = 0
    try:
        for block in iter_audio(audio):
            blocks.append(block)
            length += len(block)
            if length > limit_s * SAMPLING_RATE:
                return f"too_long: more than {limit_s:g} s when decoded"
    except AudioError as error:
        return f"undecodable: {error}"
    return np.concatenate(blocks) if blocks else "undecodable: it holds no samples"


# ------------------------------------------------------------------------------------------- in a worker process

_worker: tuple[Corpus, float] | None = None


def _start_worker(corpus: Corpus, limit_s: float) -> None:
    global _worker
    _worker = corpus, limit_s
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent ends us
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the parent is gone: a pool's worker would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _decode_in_worker(source_ids: list[str]) -> Piece:
    assert _worker is not None
    corpus, limit_s = _worker
    return decode_piece(corpus, source_ids, limit_s)
