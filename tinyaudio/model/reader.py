"""Reading ahead: a thread that decodes inputs and cuts them into pieces while the model works on earlier ones.

An input that cannot be read ends with an error of its own and does not affect the others. The queue bounds memory.
Travels with the checkpoint.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from .audio import SAMPLING_RATE, Samples, iter_audio
from .errors import AudioError
from .inputs import as_input
from .segments import Piece, cut_steps
from .source import AudioSource, describe

Input = AudioSource | np.ndarray | tuple[np.ndarray, int]  # a tuple is samples and their sampling rate in Hz

GROUP_WAIT_S = 1.0  # how long a group waits to be filled, so that a slow input does not delay finished ones
STOP_CHECK_S = 0.1  # how often a blocked thread checks whether it should stop


@dataclass(frozen=True, kw_only=True)
class End:
    """The last event of an input.

    Args:
        input, name: number and name of the input.
        duration_s: seconds that could be read.
        error: one line, if the input could not be read to its end.
        warnings: of the input as a whole, codes of `guard.CODES`.
    """

    input: int
    name: str
    duration_s: float
    error: str | None = None
    warnings: tuple[str, ...] = ()


Event = Piece | End


class PieceReader:
    """Reads `sources` in order, in its own thread, inside a `with` block.

    Args:
        sources: consumed in the thread, one at a time; may be a generator.
        window_s: the longest piece, seconds.
        max_pieces: pieces to read ahead; also the most pieces in one group.
        track: number of a file's audio track, from 1; None is its default track.
    """

    def __init__(self, sources: Iterable[Input], window_s: float, max_pieces: int, track: int | None = None) -> None:
        self.read_s = 0.0
        self._track = track
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
        """Yield events in order, in groups of `max_pieces` pieces; in smaller ones where reading is slow."""
        group: list[Event] = []
        num_pieces = 0
        while True:
            try:
                event = self._queue.get(timeout=GROUP_WAIT_S if group else None)
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
                for event in read_events(number, source, self._window_s, self._count, self._track):
                    if event is not None and not self._put(event):
                        return
            self._put(None)
        except BaseException as error:  # `groups` raises it in the caller's thread
            self._put(error)

    def _count(self, num_samples: int) -> None:
        self.read_s += num_samples / SAMPLING_RATE

    def _put(self, event: Event | BaseException | None) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(event, timeout=STOP_CHECK_S)
                return True
        return False


def read_events(
    number: int, source: Input, window_s: float, on_read: Callable[[int], None], track: int | None = None
) -> Generator[Event | None]:
    """Read one input: its pieces, then its end; None after each block of samples, where a reader of several may switch.

    Args:
        number: of the input.
        window_s: the longest piece, seconds.
        on_read: called with the number of samples of each block; an AudioError that it raises ends the input.
        track: number of a file's audio track, from 1; None is its default track.
    """
    shown = source[0] if isinstance(source, tuple) and source else source
    name = os.fspath(shown) if isinstance(shown, (str, os.PathLike)) else describe(shown)
    num_samples, num_pieces, error = 0, 0, None
    warnings: list[str] = []

    def counted(blocks: Iterable[Samples]) -> Iterator[Samples]:
        nonlocal num_samples
        for block in blocks:
            num_samples += len(block)
            on_read(len(block))
            yield block

    try:
        given = as_input(source)
        audio, rate = given if isinstance(given, tuple) else (given, None)
        blocks = iter_audio(audio, rate, on_warning=warnings.append, track=track)
        for piece in cut_steps(counted(blocks), window_s):
            yield piece and replace(piece, input=number, index=num_pieces, name=name)
            num_pieces += piece is not None
        if not num_samples:
            error = f"{describe(shown)} contains no samples; expected at least one"
    except AudioError as problem:
        error = str(problem)
    duration_s = num_samples / SAMPLING_RATE
    yield End(input=number, name=name, duration_s=duration_s, error=error, warnings=tuple(warnings))
