"""A queue of requests before one model: recordings of many requests are decoded together, in fair order.

Readers read the recordings by turns, a time slice each; one thread runs the model. A batch holds the next piece of the
request that was served longest ago, and pieces of like length of the other requests: after each batch its requests go
to the back, so that an hour of audio delays a sentence by a batch, not by an hour. Reading, cutting, batching and
decoding are those of `recognize`, so that texts equal the command line's. Knows no HTTP.
"""

import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tinyaudio.model.audio import SAMPLING_RATE
from tinyaudio.model.encoder import give_back_free_memory
from tinyaudio.model.errors import AudioError, TinyAudioError
from tinyaudio.model.reader import End, Input, read_events
from tinyaudio.model.recognize import (
    BATCH_SIZE,
    BATCHES_AHEAD,
    OpenInput,
    Options,
    Scores,
    batches_by_length,
    longest_window_s,
)
from tinyaudio.model.segments import Piece
from tinyaudio.model.source import describe
from tinyaudio.model.transcript import Segment, Transcript
from tinyaudio.model.voice import VoiceActivity

if TYPE_CHECKING:
    from tinyaudio.transcribe import Transcriber

NUM_READERS = 2  # one more than needed, so that a file that decodes slowly does not stop the others
READ_SLICE_S = 0.05  # how long a reader stays with one recording: enough to read a short one whole
TRIM_EVERY = 32  # batches, after which freed memory is returned to the system

logger = logging.getLogger(__name__)


class QueueFullError(TinyAudioError):
    """Every place is taken."""


class NotReadyError(TinyAudioError):
    """The model is still being loaded, or the queue accepts no more requests."""


class RecordingTooLongError(AudioError):
    """More audio than a request may contain."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """What is new about a request.

    Args:
        segments: those that became final since the last update.
        done_s: seconds of audio transcribed so far.
        transcript: the result, in the last update.
        failure: instead of a result: the exception that ended the request.
    """

    segments: tuple[Segment, ...] = ()
    done_s: float = 0.0
    transcript: Transcript | None = None
    failure: Exception | None = None


OnUpdate = Callable[[Update], None]


class Ticket:
    """The place of one request in the queue, from its arrival until it leaves. Made by `RequestQueue.enter`.

    Attributes:
        is_too_long: the recording was longer than the limit; the transcript has an `error`.
    """

    def __init__(self, queue: "RequestQueue", number: int) -> None:
        self.number, self._queue = number, queue
        self.is_too_long = self.is_open = False
        self._has_place = True

    def submit(
        self,
        source: Input,
        on_update: OnUpdate,
        *,
        word_timestamps: bool = False,
        confidence: bool = False,
        track: int | None = None,
    ) -> None:
        """Transcribe a recording.

        Args:
            source: as `Transcriber.stream`; a file object must stay open until the ticket has left.
            on_update: called in threads of the queue; must return at once.
            word_timestamps, confidence, track: see `recognize.Options`; for word times the model must have a CTC head.
        """
        self.is_scored = word_timestamps or confidence
        self.source, self.on_update, self.num_samples, self.num_sent = source, on_update, 0, 0
        self.input = OpenInput(describe(source), with_words=word_timestamps)
        self.pending: deque[Piece] = deque()
        self.is_being_read = False
        track = track or self._queue.options.track
        self.events = read_events(self.number, source, self._queue.window_s, self._count, track)
        self._queue.add(self)

    def _count(self, num_samples: int) -> None:
        self.num_samples += num_samples
        if self.num_samples > self._queue.max_duration_s * SAMPLING_RATE:
            self.is_too_long = True
            raise RecordingTooLongError(
                f"expected at most {self._queue.max_duration_s:g} s of audio, found more. Send it in parts"
            )

    def leave(self) -> None:
        """Give the place back; what is still to be read or decoded is dropped. Calling it again does nothing."""
        self._queue.remove(self)


class RequestQueue:
    """One loaded model and the requests that wait for it.

    Args:
        load: returns the model; called in the model's thread.
        max_requests: requests that may be waiting, being read or being decoded.
        max_duration_s: the longest recording, seconds.
        on_batch: called after each batch with its number of pieces, their seconds of audio and the time it took.

    Attributes:
        transcriber: the model, once it is loaded.
        failure: why it could not be loaded.
        num_requests: places that are taken.
        is_closed: whether `close` was called.
    """

    def __init__(
        self,
        load: "Callable[[], Transcriber]",
        options: Options | None = None,
        *,
        max_requests: int = 64,
        max_duration_s: float = 4 * 3600.0,
        on_batch: Callable[[int, float, float], None] = lambda *_: None,
    ) -> None:
        self.options, self.max_requests, self.max_duration_s = options or Options(), max_requests, max_duration_s
        self.on_batch = on_batch
        self.transcriber: Transcriber | None = None
        self.failure: Exception | None = None
        self.num_requests = 0
        self._load = load
        self._batch_size = self.options.batch_size or BATCH_SIZE
        self._max_pieces = BATCHES_AHEAD * self._batch_size  # read ahead; a request may always have one
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: deque[Ticket] = deque()  # to be decoded; the one served longest ago first
        self._to_read: deque[Ticket] = deque()
        self.is_closed = self._is_stopped = False
        names = ["tinyaudio-model", *(f"tinyaudio-request-reader-{n}" for n in range(NUM_READERS))]
        works = [self._run_model, *(self._read for _ in range(NUM_READERS))]
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True) for name, work in zip(names, works, strict=True)
        ]
        self._ready = threading.Event()
        for thread in self._threads:
            thread.start()

    @property
    def window_s(self) -> float:
        if self.transcriber is None:
            raise NotReadyError("the model is still being loaded. Try again in a few seconds")
        return longest_window_s(self.transcriber.model, self.options)

    @property
    def has_word_times(self) -> bool:
        """Whether the model is loaded and its encoder has a CTC head."""
        return self.transcriber is not None and self.transcriber.model.ctc_head is not None

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted, if there is a place."""
        return self.transcriber is not None and not self.is_closed

    def wait_until_ready(self) -> "Transcriber":
        """Wait until the model is loaded, and return it.

        Raises:
            TinyAudioError: it cannot be loaded.
        """
        self._ready.wait()
        if self.transcriber is None:
            raise self.failure or NotReadyError("the queue was stopped before its model was loaded")
        return self.transcriber

    def enter(self) -> Ticket:
        """Take a place.

        Raises:
            QueueFullError: there is none left. NotReadyError: no model yet, or `close` was called.
        """
        with self._changed:
            if self.is_closed:
                raise NotReadyError("the server is shutting down. Try another one, or later")
            if self.transcriber is None:
                raise NotReadyError("the model is still being loaded. Try again in a few seconds")
            if self.num_requests >= self.max_requests:
                raise QueueFullError(f"all {self.max_requests} places of the queue are taken. Try again later")
            self.num_requests += 1
            return Ticket(self, next(self._numbers))

    def add(self, ticket: Ticket) -> None:
        with self._changed:
            ticket.is_open = True
            self._waiting.append(ticket)
            self._to_read.append(ticket)
            self._changed.notify_all()

    def remove(self, ticket: Ticket) -> None:
        with self._changed:
            self._end(ticket)
            if ticket._has_place:
                ticket._has_place = False
                self.num_requests -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Accept no more requests; those with a place are finished."""
        self.is_closed = True

    def stop(self) -> None:
        """End the threads, after the batch that is being decoded."""
        with self._changed:
            self.is_closed = self._is_stopped = True
            for ticket in [*self._waiting]:
                self._fail(ticket, NotReadyError("the server was stopped"))
            self._changed.notify_all()
        self._ready.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _read(self) -> None:
        while True:
            with self._changed:
                while (ticket := self._next_to_read()) is None:
                    if self._is_stopped:
                        return
                    self._changed.wait()
                ticket.is_being_read = True
            self._read_slice(ticket)

    def _next_to_read(self) -> Ticket | None:
        """Return the recording whose turn it is to be read, if any has room; it goes to the back."""
        for _ in range(len(self._to_read)):
            ticket = self._to_read[0]
            self._to_read.rotate(-1)
            if not ticket.is_being_read and self._has_room(ticket):
                return ticket
        return None

    def _has_room(self, ticket: Ticket) -> bool:
        return not ticket.pending or sum(len(other.pending) for other in self._waiting) < self._max_pieces

    def _read_slice(self, ticket: Ticket) -> None:
        """Read one recording for a while: until its slice of time is over, it has no room, or it ends."""
        until = time.monotonic() + READ_SLICE_S
        while True:
            event, failure = None, None
            try:
                event = next(ticket.events)
            except Exception as error:
                failure = error
            with self._changed:
                if not ticket.is_open:
                    ticket.is_being_read = False
                    self._close_source(ticket)
                    return
                if failure is not None:
                    self._fail(ticket, failure)
                elif event is not None:
                    ticket.input.add(event)
                    if isinstance(event, Piece):
                        ticket.pending.append(event)
                    else:
                        self._to_read.remove(ticket)
                        self._report(ticket)
                    self._changed.notify_all()
                is_over = isinstance(event, End) or not ticket.is_open or not self._has_room(ticket)
                if is_over or time.monotonic() > until:
                    ticket.is_being_read = False
                    if not ticket.is_open:
                        self._close_source(ticket)
                    return

    def _run_model(self) -> None:
        try:
            VoiceActivity()  # loads its weights, for which the first requests would lose their turn
            self.transcriber = self._load()
        except Exception as error:
            self.failure = error
            return
        finally:
            self._ready.set()
        for number in itertools.count(1):
            with self._changed:
                while not (batch := self._next_batch()):
                    if self._is_stopped:
                        return
                    self._changed.wait()
            self._decode(batch)
            if number % TRIM_EVERY == 0:
                give_back_free_memory()

    def _next_batch(self) -> list[tuple[Ticket, Piece]]:
        """Take the next batch: the first piece of the first request that has one, with pieces of like length."""
        in_turn = itertools.zip_longest(*(ticket.pending for ticket in self._waiting))  # one of each, a second of each
        pieces = list(itertools.islice((piece for lap in in_turn for piece in lap if piece), self._max_pieces))
        if not pieces:
            return []
        batches = batches_by_length(pieces, self._batch_size)
        (batch,) = (batch for batch in batches if any(piece is pieces[0] for piece in batch))
        tickets = {ticket.number: ticket for ticket in self._waiting}
        taken = [(tickets[piece.input], piece) for piece in batch]
        for ticket in {ticket.number: ticket for ticket, _ in taken}.values():
            mine = {piece.index for owner, piece in taken if owner is ticket}
            ticket.pending = deque(piece for piece in ticket.pending if piece.index not in mine)
            self._waiting.remove(ticket)
            self._waiting.append(ticket)
        self._changed.notify_all()  # there is room to read
        return taken

    def _decode(self, batch: list[tuple[Ticket, Piece]]) -> None:
        assert self.transcriber is not None
        pieces = [piece for _, piece in batch]
        started = time.monotonic()
        try:
            options = replace(self.options, confidence=any(ticket.is_scored for ticket, _ in batch))
            outputs = self.transcriber.recognizer.decode(pieces, options)
        except Exception as error:
            if not isinstance(error, TinyAudioError):
                logger.exception("a batch failed")
            with self._changed:
                for ticket, _ in batch:
                    self._fail(ticket, error)
            return
        audio_s = sum(len(piece.samples) for piece in pieces) / SAMPLING_RATE
        self.on_batch(len(pieces), audio_s, time.monotonic() - started)
        with self._changed:
            for (ticket, piece), output in zip(batch, outputs, strict=True):
                ticket.input.finish(piece, output if ticket.is_scored else replace(output, scores=Scores()))
            for ticket in {ticket.number: ticket for ticket, _ in batch}.values():
                self._report(ticket)

    def _report(self, ticket: Ticket) -> None:
        """Pass on what is new about a request, and end it if that was all."""
        if not ticket.is_open or self.transcriber is None:
            return
        end, transcript = ticket.input.end, None
        if end is not None and (ticket.is_too_long or len(ticket.input.outputs) == len(ticket.input.pieces)):
            transcript = self.transcriber.signed(ticket.input.transcript(end))
        segments = ticket.input.segments()[ticket.num_sent :]
        ticket.num_sent += len(segments)
        done_s = end.duration_s if end is not None and transcript is not None else ticket.input.done_s
        ticket.on_update(Update(segments=tuple(segments), done_s=done_s, transcript=transcript))
        if transcript is not None:
            self._end(ticket)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        if ticket.is_open:
            ticket.on_update(Update(failure=error))
            self._end(ticket)

    def _end(self, ticket: Ticket) -> None:
        """Forget a request's recording; its place is kept until it leaves."""
        if not ticket.is_open:
            return
        ticket.is_open = False
        ticket.pending.clear()
        self._waiting.remove(ticket)
        with contextlib.suppress(ValueError):
            self._to_read.remove(ticket)
        if not ticket.is_being_read:
            self._close_source(ticket)

    @staticmethod
    def _close_source(ticket: Ticket) -> None:
        """Close the recording, unless it is a path or an array."""
        ticket.events.close()
        close = getattr(ticket.source, "close", None)
        if close is not None:
            close()
