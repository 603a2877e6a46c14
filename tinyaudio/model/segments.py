"""From a stream of samples to pieces that fit the model, cut where nobody speaks; and texts joined again at seams.

A recording that fits the model's window is decoded whole, as in training; only pauses of two seconds are cut out of it.
A longer one is cut at every pause, at the longest gap where a stretch of speech is longer than the window, and, where
there is no gap either, into windows that overlap. Nothing that voice activity detection calls speech is left out, and
no more than one window and one block of samples is held at a time. Travels with the checkpoint.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .audio import SAMPLING_RATE, Samples
from .voice import FRAME_LENGTH, FRAME_S, VoiceActivity

# Probability that begins speech, and below which it ends: Silero's own defaults (utils_vad.py of silero-vad 6.2.3).
SPEECH_BEGINS, SPEECH_ENDS = 0.5, 0.35
MIN_GAP = 3  # frames, 96 ms: shorter dips are stops inside words
MIN_SPEECH = 3  # frames: shorter bursts are clicks
LAST_STOP = 8  # frames, 0.26 s: a short burst so close behind speech is its last consonant, not a click
# Kept around speech: what the projector joins (5 frames of 20 ms), so that the frames of a piece are joined as if it
# began with its speech. A model that has heard trimmed utterances only depends on it: cut 60 ms before its speech
# instead of 0 or 100, the demo's makes 21 % word errors instead of 5.
EDGE_S = 0.1
REACH_S = 0.25  # how far before a frame called speech its onset is looked for (worst 0.12 s on 520 utterances joined)
LEVEL_LENGTH = 80  # samples, 5 ms: over which a level is the largest value
ABOVE_PAUSE = 3.0  # times the level of a pause is sound; in noise of 100 levels, one is 1.5 times its quietest fifth
QUIET = 20  # levels, 0.1 s: what ends a sound for good; closures before a last stop are shorter
MAX_OVERLAP_S = 2.0  # of two windows that have no gap to be cut at: five to eight words
WORDS_PER_SECOND = 5  # fast speech; how far from a seam the same words can stand in both texts


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Samples to decode at once, and where they stand.

    Args:
        samples: (n,) at 16 kHz.
        start_s, end_s: where speech was heard, seconds from the beginning of the recording.
        advance_s: seconds of the recording that are done with when this piece is.
        overlap_s: how much of its beginning the piece before holds too; 0 after a gap.
        warnings: codes of `guard.CODES`.
        input, index, name: number and name of its input, and its place in it; set by `reader`.
    """

    samples: Samples
    start_s: float
    end_s: float
    advance_s: float
    overlap_s: float = 0.0
    warnings: tuple[str, ...] = ()
    input: int = 0
    index: int = 0
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When to cut.

    Args:
        window: the longest stretch of speech in one piece, frames.
        pause: what ends a piece, frames without speech.
        margin: kept on either side of speech, samples; never more than half of the gap.
        overlap: of windows without a gap, frames.
    """

    window: int
    pause: int
    margin: int
    overlap: int


def rules(window_s: float) -> tuple[Rule, Rule]:
    """Return how to cut a recording that fits the window, and one that does not.

    A model trained on utterances of a few seconds has heard no long pauses inside them: the shorter its window, the
    shorter the pause that ends a piece, from 0.5 s (windows of 30 s) down to 0.25 s (15 s and less).
    """
    window = max(int(window_s / FRAME_S), 8)
    overlap = int(min(MAX_OVERLAP_S, window_s / 4) / FRAME_S)
    pause_s = min(0.5, max(0.25, window_s / 60))
    margin = int(EDGE_S * SAMPLING_RATE)
    whole = Rule(window=window, pause=round(2.0 / FRAME_S), margin=SAMPLING_RATE, overlap=overlap)
    return whole, Rule(window=window, pause=round(pause_s / FRAME_S), margin=margin, overlap=overlap)


def cut(blocks: Iterable[Samples], window_s: float) -> Iterator[Piece]:
    """Cut a recording into pieces.

    Args:
        blocks: its samples, any number at a time.
        window_s: the longest piece, seconds.

    Yields:
        Pieces in order of time, as soon as they are complete; none where there is no speech.
    """
    whole, long = rules(window_s)
    voice, cutter = VoiceActivity(), _Cutter(whole)
    for block in blocks:
        cutter.add(block, voice.feed(block))
        if cutter.num_samples > window_s * SAMPLING_RATE:
            cutter.rule = long
            yield from cutter.pieces(is_final=False)
    cutter.add(np.zeros(0, np.float32), voice.finish())
    yield from cutter.pieces(is_final=True)


@dataclass
class _Span:
    """Frames [start, end) of unbroken speech; `overlap` frames of its beginning belong to the piece before as well."""

    start: int
    end: int
    overlap: int = 0


class _Cutter:
    """Turns probabilities into spans of speech, and spans into pieces; holds the samples not yet handed out."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.num_samples = 0
        self._held: list[Samples] = []
        self._held_from = 0  # sample index of the first sample held
        self._num_frames = 0
        self._spans: list[_Span] = []
        self._is_speech = False
        self._quiet_frames = 0
        self._cut_until = 0  # samples before are part of an earlier piece or of a pause

    def add(self, samples: Samples, probabilities: np.ndarray) -> None:
        self._held.append(samples)
        self.num_samples += len(samples)
        for probability in probabilities.tolist():
            self._hear(probability)

    def _hear(self, probability: float) -> None:
        """Follow one frame: speech begins at once, and ends where `MIN_GAP` frames without it began."""
        frame = self._num_frames
        self._num_frames += 1
        if probability >= SPEECH_BEGINS and not self._is_speech:
            self._spans.append(_Span(frame, frame + 1))
            self._is_speech, self._quiet_frames = True, 0
        elif self._is_speech and probability >= SPEECH_ENDS:
            self._spans[-1].end, self._quiet_frames = frame + 1, 0
        elif self._is_speech:
            self._quiet_frames += 1
            if self._quiet_frames == MIN_GAP:
                self._end_span()

    def _end_span(self) -> None:
        self._is_speech = False
        if self._spans[-1].end - self._spans[-1].start < MIN_SPEECH:
            burst = self._spans.pop()
            if self._spans and burst.start - self._spans[-1].end <= LAST_STOP:
                self._spans[-1].end = burst.end

    def pieces(self, is_final: bool) -> Iterator[Piece]:
        """Hand out every piece whose end is certain by now."""
        if is_final and self._is_speech:
            self._end_span()
        while self._spans:
            num_spans = self._complete(is_final)
            if num_spans is None:
                break
            yield self._emit(num_spans) if num_spans else self._emit_window()
        self._forget(self._spans[0].start * FRAME_LENGTH if self._spans else self._num_frames * FRAME_LENGTH)

    def _complete(self, is_final: bool) -> int | None:
        """Count the spans of the next piece; 0: it must be cut inside speech; None: wait for more samples."""
        first = self._spans[0].start
        for i, span in enumerate(self._spans):
            if span.end - first > self.rule.window:
                return self._longest_gap(first)
            is_last = i == len(self._spans) - 1
            next_start = self._num_frames if is_last else self._spans[i + 1].start
            ended = not (is_last and self._is_speech)
            if ended and next_start - span.end >= self.rule.pause:
                return i + 1
        return len(self._spans) if is_final else None

    def _longest_gap(self, first: int) -> int:
        """Count the spans before the longest gap of a window, in its later three quarters if there is one; 0: none."""
        gaps = [
            (span.end - first >= self.rule.window // 4, following.start - span.end, count)
            for count, (span, following) in enumerate(pairwise(self._spans), 1)
            if span.end - first <= self.rule.window
        ]
        return max(gaps, default=(False, 0, 0))[2]

    def _emit(self, num_spans: int) -> Piece:
        """Hand out the first spans, with silence on both sides."""
        taken, self._spans = self._spans[:num_spans], self._spans[num_spans:]
        next_sample = self._spans[0].start * FRAME_LENGTH if self._spans else self.num_samples
        end = min(taken[-1].end * FRAME_LENGTH, self.num_samples)
        gap = max(next_sample - end, 0)
        limit = end + (gap // 2 if self._spans else gap)
        end += reach(self._samples(end, min(limit, end + int(REACH_S / 2 * SAMPLING_RATE))))
        return self._piece(taken[0], end, min(end + self.rule.margin, limit))

    def _emit_window(self) -> Piece:
        """Hand out one window of speech without a gap; the next begins before its end."""
        first, limit = self._spans[0], self._spans[0].start + self.rule.window
        crossing = next(i for i, span in enumerate(self._spans) if span.end > limit)
        rest = self._spans[crossing]
        self._spans = self._spans[crossing:]
        self._spans[0] = _Span(limit - self.rule.overlap, rest.end, overlap=self.rule.overlap)
        seam = limit - (self.rule.overlap - self.rule.overlap // 2)
        return self._piece(first, seam * FRAME_LENGTH, limit * FRAME_LENGTH)

    def _piece(self, first: _Span, speech_end: int, end: int) -> Piece:
        """Cut the samples up to `end` off; speech ends at `speech_end`, or its second half is the next window's."""
        if first.overlap:
            begin, speech = first.start * FRAME_LENGTH, (first.start + first.overlap // 2) * FRAME_LENGTH
        else:
            speech = self._onset(first, end)
            begin = max(speech - self.rule.margin, self._cut_until)
        advance_s = (end - self._cut_until) / SAMPLING_RATE
        self._cut_until = end
        return Piece(
            samples=self._samples(begin, end),
            start_s=speech / SAMPLING_RATE,
            end_s=speech_end / SAMPLING_RATE,
            advance_s=advance_s,
            overlap_s=first.overlap * FRAME_S,
            warnings=("no_pause",) if first.overlap else (),
        )

    def _onset(self, span: _Span, end: int) -> int:
        """Find the sample with which speech begins: the end of its first frame at the latest, or before detection."""
        latest = min((span.start + 1) * FRAME_LENGTH, end)
        earliest = max(latest - int(REACH_S * SAMPLING_RATE), self._cut_until)
        reached = reach(self._samples(earliest, latest)[::-1])
        return max(latest - (reached or FRAME_LENGTH), earliest)

    def _samples(self, begin: int, end: int) -> Samples:
        if begin < self._held_from:
            raise AssertionError(f"sample {begin} was let go of; the first one held is {self._held_from}")
        self._held = [np.concatenate(self._held)]
        return self._held[0][begin - self._held_from : end - self._held_from].copy()

    def _forget(self, next_start: int) -> None:
        """Let go of samples that no later piece can hold."""
        lead = self.rule.margin + int(REACH_S * SAMPLING_RATE)  # a piece begins a margin before its onset
        keep_from = max(min(next_start - lead, self.num_samples), self._held_from)
        if self._spans and not self._spans[0].overlap:
            keep_from = max(keep_from, min(self._cut_until, next_start))
        joined = np.concatenate(self._held) if self._held else np.zeros(0, np.float32)
        self._held = [joined[keep_from - self._held_from :].copy()]
        self._held_from = keep_from


def reach(samples: Samples) -> int:
    """Count the samples before sound has sunk into the pause for good: 0 where the first are no louder than the pause.

    Args:
        samples: of a pause, beginning where it meets speech; reversed, for the pause before.
    """
    num_levels = len(samples) // LEVEL_LENGTH
    if not num_levels:
        return 0
    levels = np.abs(samples[: num_levels * LEVEL_LENGTH]).reshape(num_levels, LEVEL_LENGTH).max(axis=1)
    is_sound = levels > ABOVE_PAUSE * np.quantile(levels, 0.2)
    reached = 0
    for level in np.flatnonzero(is_sound).tolist():
        if level >= reached + QUIET:
            break
        reached = level + 1
    return reached * LEVEL_LENGTH


def join_texts(before: str, after: str, overlap_s: float) -> tuple[str, str, bool]:
    """Join the texts of two windows that overlap, so that no word is doubled or lost.

    Words at the very edge of a window may be cut in half, so both texts are trusted up to the words they share.

    Returns:
        What stands of the first, what stands of the second, and whether they shared a word.
    """
    reach = max(3, round(overlap_s * WORDS_PER_SECOND) + 2)
    left, right = before.split(), after.split()
    tail, head = [_plain(word) for word in left[-reach:]], [_plain(word) for word in right[:reach]]
    match = _best_match(tail, head)
    if match is None:
        return before, after, not left or not right
    in_tail, in_head, size = match
    kept = len(left) - len(tail) + in_tail + size
    return " ".join(left[:kept]), " ".join(right[in_head + size :]), True


def _best_match(tail: list[str], head: list[str]) -> tuple[int, int, int] | None:
    """Find the shared words that leave the fewest others out: their place in both lists, and how many they are.

    Words behind them in the first list and before them in the second are half-heard edges, and cost half a word each;
    a match that costs more than it has words is none.
    """
    best: tuple[tuple[float, int], tuple[int, int, int]] | None = None
    for i in range(len(tail)):
        for j in range(len(head)):
            size = 0
            while i + size < len(tail) and j + size < len(head) and tail[i + size] == head[j + size]:
                size += 1
            left_out = len(tail) - i - size + j
            merit = (size - left_out / 2, -left_out)
            if size and left_out <= 2 * size and (best is None or merit > best[0]):
                best = merit, (i, j, size)
    return best[1] if best else None


def _plain(word: str) -> str:
    return "".join(letter for letter in word.lower() if letter.isalnum()) or word
