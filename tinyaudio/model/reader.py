"""Reading ahead: a thread that decodes inputs and cuts them into pieces while the model works on earlier ones.

What one bad input raises ends that input only. Memory is bounded by the queue. Travels with the checkpoint.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .audio import SAMPLING_RATE, AudioSource, Samples, describe, iter_audio
from .errors import AudioError
from .segments import Piece, cut

Input = AudioSource | np.ndarray | tuple[np.ndarray, int]  # a tuple is samples and their sampling rate in Hz

PATIENCE_S = 1.0  # how long a group waits for company, so that a slow input holds up nothing that is done
WAIT_S = 0.1  # how often a blocked thread looks whether it should stop


@dataclass(frozen=True, kw_only=True)
class End:
    """The last event of an input.

    Args:
        input, name: which one.
        duration_s: seconds that could be read.
        error: one line, if reading broke off.
        warnings: of the input as a whole, codes of `guard.CODES`.
    """

    input: int
    name: str
    duration_s: float
    error: str | None = None
    warnings: tuple[str, ...] = ()


Event = Piece | End


class PieceReader:
    """Reads `sources` in order, in a thread of its own, while its `with` block lasts.

    Args:
        sources: consumed in the thread, one at a time; may be a generator.
        window_s: the longest piece, seconds.
        max_pieces: pieces to read ahead; also the most that `groups` hands out at once.
    """

    def __init__(self, sources: Iterable[Input], window_s: float, max_pieces: int) -> None:
        self.read_s = 0.0
        self._sources, self._window_s, self._max_pieces = sources, window_s, max_pieces
        self._queue: queue.Queue[Event | BaseException | None] = queue.Queue(maxsize=max_pieces)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tinyaudio-reader", daemon=True)

    def __enter__(self) -> "PieceReader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def groups(self) -> Iterator[list[Event]]:
        """Hand out events in order, as many as hold `max_pieces` pieces at a time; fewer where reading is slow."""
        group: list[Event] = []
        num_pieces = 0
        while True:
            try:
                event = self._queue.get(timeout=PATIENCE_S if group else None)
            except queue.Empty:
                yield group
                group, num_pieces = [], 0
                continue
            if event is None:
                break
            if isinstance(event, BaseException):
                raise event
            group.append(event)
            num_pieces += isinstance(event, Piece)
            if num_pieces == self._max_pieces:
                yield group
                group, num_pieces = [], 0
        if group:
            yield group

    def _run(self) -> None:
        try:
            for number, source in enumerate(self._sources):
                for event in self._read(number, source):
                    if not self._put(event):
                        return
            self._put(None)
        except BaseException as error:  # carried over to the thread that can raise it
            self._put(error)

    def _put(self, event: Event | BaseException | None) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(event, timeout=WAIT_S)
                return True
        return False

    def _read(self, number: int, source: Input) -> Iterator[Event]:
        audio, rate = source if isinstance(source, tuple) else (source, None)
        name = os.fspath(audio) if isinstance(audio, (str, os.PathLike)) else describe(audio)
        clock, error = _Clock(), None
        warnings: list[str] = []
        try:
            blocks = iter_audio(audio, rate, on_truncated=lambda: warnings.append("input_truncated"))
            for index, piece in enumerate(cut(clock.watch(blocks, self), self._window_s)):
                yield replace(piece, input=number, index=index, name=name)
            if not clock.num_samples:
                error = f"{describe(audio)} holds no samples; expected at least one"
        except AudioError as problem:
            error = str(problem)
        duration_s = clock.num_samples / SAMPLING_RATE
        yield End(input=number, name=name, duration_s=duration_s, error=error, warnings=tuple(warnings))


class _Clock:
    """Counts the samples that pass."""

    def __init__(self) -> None:
        self.num_samples = 0

    def watch(self, blocks: Iterable[Samples], reader: Any) -> Iterator[Samples]:
        for block in blocks:
            self.num_samples += len(block)
            reader.read_s += len(block) / SAMPLING_RATE
            yield block
