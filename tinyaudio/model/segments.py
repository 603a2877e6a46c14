"""From a stream of samples to pieces that fit the model, cut at pauses; and texts joined again where pieces overlap.

A recording that fits the model's window is decoded whole, as in training; only pauses of two seconds are cut out of it.
A longer one is cut at every pause. Speech that is longer than the window is cut at its longest gap and, where it has no
gap, into windows that overlap. Every frame that voice activity detection calls speech is in a piece. At most one window
and one block of samples are held at a time. Travels with the checkpoint.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, product, takewhile

import numpy as np
from numpy.typing import NDArray

from .audio import SAMPLING_RATE, Samples
from .voice import FRAME_LENGTH, FRAME_S, VoiceActivity

# Probability that begins speech, and below which it ends: Silero's own defaults (utils_vad.py of silero-vad 6.2.3).
SPEECH_BEGINS, SPEECH_ENDS = 0.5, 0.35
MIN_GAP = 3  # frames, 96 ms: shorter dips are stops inside words
MIN_SPEECH = 3  # frames: shorter bursts are clicks
LAST_STOP = 8  # frames, 0.26 s: a short burst so close behind speech is its last consonant, not a click
# Kept on both sides of speech: as much as the projector joins (5 frames of 20 ms), so that the frames of a piece are
# joined as if it began with its speech. A model trained on trimmed utterances depends on it: with 60 ms before speech
# instead of 0 or 100, the demo's model makes 21 % word errors instead of 5.
EDGE_S = 0.1
SEARCH_LENGTH = 4_000  # samples, 0.25 s: how long before its first frame speech may begin (worst 0.12 s of 520 cases)
LEVEL_LENGTH = 80  # samples, 5 ms: a level is the largest value in so many samples
ABOVE_PAUSE = 3.0  # times the level of a pause is sound; in noise of 100 levels, one is 1.5 times its quietest fifth
QUIET = 20  # levels, 0.1 s: ends a sound for good; closures before a last stop are shorter
LONG_PAUSE_S, LONG_PAUSE_EDGE_S = 2.0, 1.0  # cut out of a recording that fits the window, and what is kept around it
MAX_EXCESS_S = 2.6  # by which a piece may be longer than the window: its margins, and where the speech in it begins
MAX_OVERLAP_S = 2.0  # of two windows without a gap between them: five to eight words
WORDS_PER_SECOND = 5  # fast speech; bounds how far from a seam the same words can stand in both texts


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Samples to decode at once, and their place in the recording: seconds from its beginning."""

    samples: Samples  # (n,) at 16 kHz
    begin_s: float = 0.0  # where its samples begin
    start_s: float  # where its speech begins
    end_s: float  # where its speech ends
    advance_s: float  # seconds of the recording that are done when this piece is
    overlap_s: float = 0.0  # seconds at its beginning that the piece before holds as well; 0 after a gap
    overlap_after_s: float = 0.0  # seconds at its end that the next piece holds as well; 0 before a gap
    warnings: tuple[str, ...] = ()  # codes of `guard.CODES`
    input: int = 0  # number of its input; set by `reader`, as what follows
    index: int = 0  # its number within the input
    name: str = ""  # of the input


def cut_steps(blocks: Iterable[Samples], window_s: float, voice: VoiceActivity | None = None) -> Iterator[Piece | None]:
    """Cut a recording into pieces.

    A model trained on utterances of a few seconds has seen no long pauses inside them: the shorter its window, the
    shorter the pause that ends a piece, from 0.5 s (windows of 30 s) down to 0.25 s (15 s and less).

    Args:
        blocks: its samples, any number at a time.
        window_s: the longest piece, seconds.
        voice: finds the speech; None for a fresh `VoiceActivity`.

    Yields:
        Pieces in order of time, as soon as they are complete; no piece where there is no speech. None for each block,
        where a reader of several recordings may switch.
    """
    voice = voice or VoiceActivity()
    held = _HeldSamples()
    speech = _Speech(window=max(int(window_s / FRAME_S), 8), overlap=int(min(MAX_OVERLAP_S, window_s / 4) / FRAME_S))
    pause_s, edge_s = LONG_PAUSE_S, LONG_PAUSE_EDGE_S
    done = 0  # samples before belong to an earlier piece or to a pause
    for block in chain(blocks, [None]):
        yield None
        if block is None:
            speech.add(voice.finish())
            speech.end_span()
        else:
            held.append(block)
            speech.add(voice.feed(block))
            if held.end <= window_s * SAMPLING_RATE:
                continue  # so far the recording fits the window as a whole
            pause_s, edge_s = min(0.5, max(0.25, window_s / 60)), EDGE_S
        margin = int(edge_s * SAMPLING_RATE)
        while spans := speech.take_piece(round(pause_s / FRAME_S), is_final=block is None):
            first, last = spans[0], spans[-1]
            end = min(last.end * FRAME_LENGTH, held.end)
            if last.overlap_after:  # cut inside speech: it changes over to the next window in the middle of the overlap
                speech_end = (last.end - last.overlap_after + last.overlap_after // 2) * FRAME_LENGTH
            else:
                gap = max((speech.spans[0].start * FRAME_LENGTH if speech.spans else held.end) - end, 0)
                limit = end + (gap // 2 if speech.spans else gap)
                speech_end = end + audible_length(held.read(end, min(limit, end + SEARCH_LENGTH // 2)))
                end = min(speech_end + margin, limit)
            if first.overlap_before:
                begin = first.start * FRAME_LENGTH
                speech_start = begin + first.overlap_before // 2 * FRAME_LENGTH
            else:  # speech begins within its first frame, or before it where detection was late
                latest = min((first.start + 1) * FRAME_LENGTH, end)
                earliest = max(latest - SEARCH_LENGTH, done)
                audible = audible_length(held.read(earliest, latest)[::-1]) or FRAME_LENGTH
                speech_start = max(latest - audible, earliest)
                begin = max(speech_start - margin, done)
            yield Piece(
                samples=held.read(begin, end),
                begin_s=begin / SAMPLING_RATE,
                start_s=speech_start / SAMPLING_RATE,
                end_s=speech_end / SAMPLING_RATE,
                advance_s=(end - done) / SAMPLING_RATE,
                overlap_s=first.overlap_before * FRAME_S,
                overlap_after_s=last.overlap_after * FRAME_S,
                warnings=("no_pause",) if first.overlap_before else (),
            )
            done = end
        next_frame = speech.spans[0].start if speech.spans else speech.num_frames
        held.drop_before(next_frame * FRAME_LENGTH - SEARCH_LENGTH - margin)


@dataclass
class _Span:
    """Frames [start, end) of unbroken speech; `overlap_before` and `overlap_after` of them are in two pieces."""

    start: int
    end: int
    overlap_before: int = 0
    overlap_after: int = 0


class _Speech:
    """The spans of speech that are not yet in a piece."""

    def __init__(self, window: int, overlap: int) -> None:
        self.window = window  # the longest stretch of speech in one piece, frames
        self.overlap = overlap  # of two windows without a gap between them, frames
        self.num_frames = 0  # followed so far
        self.spans: list[_Span] = []  # in order of time; the last one is still growing while `is_open`
        self.is_open = False

    def add(self, probabilities: NDArray[np.float32]) -> None:
        """Follow frames: speech begins at once, and ends at the first of `MIN_GAP` frames without it."""
        for probability in probabilities.tolist():
            self.num_frames += 1
            if not self.is_open:
                if probability >= SPEECH_BEGINS:
                    self.spans.append(_Span(self.num_frames - 1, self.num_frames))
                    self.is_open = True
            elif probability >= SPEECH_ENDS:
                self.spans[-1].end = self.num_frames
            elif self.num_frames - self.spans[-1].end == MIN_GAP:
                self.end_span()

    def end_span(self) -> None:
        """End the growing span, if there is one. Too short a span is dropped, or joined to the one just before it."""
        if self.is_open and self.spans[-1].end - self.spans[-1].start < MIN_SPEECH:
            burst = self.spans.pop()
            if self.spans and burst.start - self.spans[-1].end <= LAST_STOP:
                self.spans[-1].end = burst.end
        self.is_open = False

    def take_piece(self, pause: int, is_final: bool) -> list[_Span]:
        """Remove the spans of the next piece; none if more frames are needed to find its end, or no spans are left.

        Args:
            pause: frames without speech that end a piece.
            is_final: whether all frames were followed.
        """
        spans, num_taken = self.spans, len(self.spans) if is_final else 0
        for i, span in enumerate(spans):
            if span.end - spans[0].start > self.window:
                if i == 0:  # there is no gap in it
                    cut_at = span.start + self.window
                    self.spans = [_Span(cut_at - self.overlap, span.end, overlap_before=self.overlap), *spans[1:]]
                    return [_Span(span.start, cut_at, span.overlap_before, overlap_after=self.overlap)]
                # After the longest gap, among those in the window's last three quarters if there are any.
                gaps = [(spans[n - 1].end, spans[n].start, n) for n in range(1, i + 1)]
                at_least = spans[0].start + self.window // 4
                num_taken = max((start >= at_least, end - start, n) for start, end, n in gaps)[-1]
                break
            is_growing = self.is_open and span is spans[-1]
            following = spans[i + 1].start if i + 1 < len(spans) else self.num_frames
            if not is_growing and following - span.end >= pause:
                num_taken = i + 1
                break
        self.spans = spans[num_taken:]
        return spans[:num_taken]


class _HeldSamples:
    """The samples [begin, end) of a recording, which later pieces may need."""

    def __init__(self) -> None:
        self.begin = self.end = 0
        self._blocks = [np.zeros(0, np.float32)]

    def append(self, samples: Samples) -> None:
        self._blocks.append(samples)
        self.end += len(samples)

    def read(self, begin: int, end: int) -> Samples:
        if begin < self.begin:
            raise AssertionError(f"sample {begin} was dropped; the first one held is {self.begin}")
        self._blocks = [np.concatenate(self._blocks)]
        return self._blocks[0][begin - self.begin : end - self.begin].copy()

    def drop_before(self, index: int) -> None:
        index = max(index, self.begin)
        self._blocks, self.begin = [self.read(index, self.end)], index


def audible_length(samples: Samples) -> int:
    """Count the samples until a sound has died away in a pause for good; 0 where there is only the pause.

    Args:
        samples: of a pause, beginning where it meets speech; reversed, for the pause before speech.
    """
    num_levels = len(samples) // LEVEL_LENGTH
    if not num_levels:
        return 0
    levels = np.abs(samples[: num_levels * LEVEL_LENGTH]).reshape(num_levels, LEVEL_LENGTH).max(axis=1)
    is_sound = levels > ABOVE_PAUSE * np.quantile(levels, 0.2)
    audible = 0
    for level in np.flatnonzero(is_sound).tolist():
        if level >= audible + QUIET:
            break
        audible = level + 1
    return audible * LEVEL_LENGTH


def join_texts(before: str, after: str, overlap_s: float) -> tuple[str, str, bool]:
    """Join the texts of two windows that overlap, so that no word is doubled or lost.

    Words at the very edge of a window may be cut in half, so both texts are trusted up to the words they share. Words
    behind them in the first text and before them in the second are such edges, and cost half a word each; a match that
    costs more than it has words does not count. (difflib's longest match takes the earliest of several, which loses
    words at a seam.)

    Returns:
        What remains of the first text, what remains of the second, and whether they agree.
    """
    most = max(3, round(overlap_s * WORDS_PER_SECOND) + 2)
    left, right = before.split(), after.split()
    tail, head = [_plain(word) for word in left[-most:]], [_plain(word) for word in right[:most]]
    matches = []
    for i, j in product(range(len(tail)), range(len(head))):
        size = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(tail[i:], head[j:], strict=False)))
        behind = len(tail) - i - size
        if size > 0 and behind + j <= 2 * size:
            matches.append((size - (behind + j) / 2, -behind - j, len(left) - behind, j + size))
    if not matches:
        return before, after, not left or not right
    _, _, num_kept, num_skipped = max(matches, key=lambda match: match[:2])
    return " ".join(left[:num_kept]), " ".join(right[num_skipped:]), True


def _plain(word: str) -> str:
    return "".join(letter for letter in word.lower() if letter.isalnum()) or word
