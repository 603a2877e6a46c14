"""When each word was said: the words of a transcript, aligned with the letters that the encoder's CTC head heard.

The Viterbi path through the letters, with blanks between them, gives every letter its frames. Words that cannot be
spelled in the head's alphabet, such as digits, match anything and lie between their neighbours. Words of which nothing
was heard are skipped, and lie between their neighbours too. Times are seconds from the first sample. Knows no audio,
model or recording. Travels with the checkpoint.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from .audio import HOP_LENGTH, SAMPLING_RATE
from .transcript import Word

FRAME_S = HOP_LENGTH / SAMPLING_RATE
BLANK, SPACE = "", " "  # the keys of the two symbols in an alphabet that are no letters
ANYTHING = -1  # a target that matches any symbol
# A longer stretch without letters between two words is a pause; a shorter one is the rest of the first word, whose last
# letter the head marks where it begins.
PAUSE_S = 0.2
LAST_LETTER_S = 0.06  # how long the last letter before a pause lasts; chosen on the demo's test sets
HEARD = 0.1  # a symbol of a smaller probability was not heard in that frame
MISSING_LETTERS = 3  # so many more letters heard than written are a word that is missing; chosen on the demo's dev set
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u0060\u00b4"), "'")


def spell(word: str, alphabet: Mapping[str, int]) -> list[int]:
    """Return the ids of a word's letters, without accents and punctuation; [ANYTHING] if it has others, or none."""
    folded = unicodedata.normalize("NFKD", word.translate(_APOSTROPHES))
    cased = {letter.casefold(): symbol for letter, symbol in alphabet.items()}
    ids = [cased.get(letter) for letter in folded.casefold() if letter.isalnum() or letter in cased]
    return [ANYTHING] if None in ids or not ids else [symbol for symbol in ids if symbol is not None]


def align(
    log_probs: Tensor,
    num_frames: Sequence[int],
    targets: Sequence[Sequence[int]],
    blank: int,
    *,
    space: int | None = None,
    skip_cost: float = 0.0,
) -> list[Tensor]:
    """Find the best CTC path of each row through its targets.

    Args:
        log_probs: (B, T, V), natural logarithms of probabilities, on any device.
        num_frames: valid frames of each row.
        targets: symbols of each row in order, or `ANYTHING`, whose score is that of a frame's best symbol.
        blank: the symbol of CTC's blank.
        space: the symbol between words; with it, whole words may be skipped.
        skip_cost: what skipping a word costs for each of its letters, in nats.

    Returns:
        For each row (num_frames,) on the CPU: the state of each frame, where 2 * i + 1 is the i-th target and even
        states are blanks. An empty tensor if the targets need more frames.

    Source: Graves et al. 2006, section 4.1, with maxima for sums. All rows and states advance together by a frame. The
    words that may be skipped are ours.
    """
    device, (num_rows, longest, _) = log_probs.device, log_probs.shape
    width = 2 * max(map(len, targets), default=0) + 1
    symbols = torch.full((num_rows, width), blank)
    for row, target in zip(symbols, targets, strict=True):
        row[1 : 2 * len(target) : 2] = torch.tensor(target, dtype=torch.long)
    # A letter may follow another without a blank, unless they are the same.
    may_skip = torch.zeros((num_rows, width), dtype=torch.bool)
    may_skip[:, 3::2] = (symbols[:, 3::2] != symbols[:, 1:-2:2]) | (symbols[:, 3::2] == ANYTHING)
    symbols, may_skip = symbols.to(device), may_skip.to(device)
    is_anything, symbols = symbols == ANYTHING, symbols.clamp(min=0)
    best = log_probs.amax(-1)
    skips = _Skips(targets, space, skip_cost, device) if space is not None else None

    def emissions(t: int) -> Tensor:
        return torch.where(is_anything, best[:, t, None], log_probs[:, t].gather(1, symbols))

    never = float("-inf")
    score = torch.full((num_rows, width), never, device=device, dtype=log_probs.dtype)
    score[:, :2] = 0
    if skips is not None:
        score = skips.begin(score)
    score = score + emissions(0)
    steps = torch.zeros((longest, num_rows, width), dtype=torch.int16, device=device)
    lengths = torch.tensor(num_frames, device=device)
    for t in range(1, longest):
        one = torch.nn.functional.pad(score, (1, 0), value=never)[:, :-1]
        two = torch.nn.functional.pad(score, (2, 0), value=never)[:, :-2].masked_fill(~may_skip, never)
        top, step = torch.stack([score, one, two]).max(0)
        if skips is not None:
            top, step = skips.follow(score, top, step)
        steps[t] = step
        score = torch.where((t < lengths)[:, None], top + emissions(t), score)
    if skips is not None:
        score = skips.end(score)
    backwards, final = steps.cpu(), score.cpu()
    paths = []
    for row, (length, target) in enumerate(zip(num_frames, targets, strict=True)):
        last = 2 * len(target)
        ends = final[row, : last + 1] if skips is not None else final[row, max(0, last - 1) : last + 1]
        state = int(ends.argmax()) + last + 1 - len(ends)
        if final[row, state] == never or not length:
            paths.append(torch.zeros(0, dtype=torch.long))
            continue
        choices = backwards[:length, row].tolist()
        path = [state]
        for t in range(length - 1, 0, -1):
            state -= choices[t][state]
            path.append(state)
        paths.append(torch.tensor(path[::-1]))
    return paths


class _Skips:
    """The steps of a path past whole words: from the end of a word to the space before a later one.

    A path may also begin with a later word, and end with an earlier one.

    Args:
        targets, space, skip_cost: as in `align`.
    """

    def __init__(self, targets: Sequence[Sequence[int]], space: int, skip_cost: float, device: torch.device) -> None:
        words = [_words(target, space) for target in targets]
        most = max(map(len, words), default=0)
        table = torch.zeros((3, len(targets), most), dtype=torch.long)  # first and last state of each word; its letters
        for row, spans in enumerate(words):
            for i, (first, last) in enumerate(spans):
                table[:, row, i] = torch.tensor([2 * first + 1, 2 * last + 1, last - first + 1])
        self.first, self.last, num_letters = table.to(device)
        self.exists = self.first > 0
        self.cost = skip_cost * num_letters.float().cumsum(1)  # of skipping a word and all before it
        self.before = self.cost.roll(1, 1)  # of skipping all before it
        self.before[:, :1] = 0

    def begin(self, score: Tensor) -> Tensor:
        """Let paths begin with any word, or with the blank before it."""
        allowed = torch.where(self.exists, -self.before, -math.inf)
        for states in (self.first, self.first - 1):
            score = score.scatter_reduce(1, states.clamp(min=0), allowed, "amax")
        return score

    def follow(self, score: Tensor, top: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Take the steps that skip words wherever they are better than those that do not; arguments as in `align`."""
        if self.first.shape[1] < 3:
            return top, step
        exits = torch.stack([self.last, self.last + 1], -1)  # a word's last letter, and the blank behind it
        leaving = score.gather(1, exits.flatten(1)).view(exits.shape) + self.cost[..., None]
        leaving = leaving.masked_fill(~self.exists[..., None], -math.inf)
        reached, source = (found[:, 1:-4:2] for found in leaving.flatten(1).cummax(1))  # by any word up to this one
        spaces = (self.first[:, 2:] - 2).clamp(min=0)
        value = torch.where(self.exists[:, 2:], reached - self.before[:, 2:], -math.inf)
        length = spaces - exits.flatten(1).gather(1, source)
        is_better = value > top.gather(1, spaces)
        top = top.scatter_reduce(1, spaces, value, "amax")
        return top, step.scatter(1, spaces, torch.where(is_better, length, step.gather(1, spaces)))

    def end(self, score: Tensor) -> Tensor:
        """Let paths end with any word, or before the first; other states are no ends."""
        ends = torch.full_like(score, -math.inf)
        total = self.cost.amax(1, keepdim=True) if self.cost.shape[1] else score.new_zeros(len(score), 1)
        ends[:, :1] = score[:, :1] - total
        allowed = torch.where(self.exists, self.cost - total, -math.inf)
        for states in (self.last, self.last + 1):
            ends = ends.scatter_reduce(1, states, allowed + score.gather(1, states), "amax")
        return ends


def _words(target: Sequence[int], space: int) -> list[tuple[int, int]]:
    """Return the first and the last position of each word."""
    edges = [-1, *(i for i, symbol in enumerate(target) if symbol == space), len(target)]
    return [(before + 1, after - 1) for before, after in pairwise(edges) if after - before > 1]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """A text beside what was heard."""

    words: tuple[Word, ...]  # of the text, with their times
    # (start, end) in seconds of each stretch where letters were heard and nothing was written.
    missing: tuple[tuple[float, float], ...] = ()


def align_words(
    texts: Sequence[str],
    log_probs: Tensor,
    num_frames: Sequence[int],
    alphabet: Mapping[str, int],
    *,
    offset_s: float,
    spans: Sequence[tuple[float, float]],
) -> list[Alignment]:
    """Time the words of each text, and find words that were not heard and letters that were not written.

    Args:
        texts: one for each row of `log_probs`; words are what `str.split` gives.
        log_probs, num_frames: as `align`.
        alphabet: letters and their symbols, with `BLANK` and `SPACE`.
        offset_s: how much later than its letter the head marks it; negative if earlier.
        spans: where each row's speech begins and ends, seconds; no word is outside.

    Returns:
        For each text one `Word` for each of its words, without `probability`, and what is missing between them.
    """
    blank, space = alphabet[BLANK], alphabet[SPACE]
    letters = torch.tensor([symbol for letter, symbol in alphabet.items() if letter not in (BLANK, SPACE)])
    spelled = [[spell(word, alphabet) for word in text.split()] for text in texts]
    targets = []
    for words in spelled:
        target: list[int] = []
        for symbols in words:
            target += [space, *symbols] if target else symbols
        targets.append(target)
    floor = math.log(HEARD)  # letters that were not heard are all alike, however unlikely
    paths = align(log_probs.clamp(min=floor), num_frames, targets, blank, space=space, skip_cost=-floor)
    found = []
    for text, words, target, path, span, row in zip(texts, spelled, targets, paths, spans, log_probs, strict=True):
        heard = row[: len(path)].cpu()
        written = torch.tensor([blank, *(s for symbol in target for s in (symbol, blank))])[path]
        score = heard.gather(1, written.clamp(min=0)[:, None])[:, 0].masked_fill(written == ANYTHING, 0.0)
        best = heard.argmax(1)
        is_letter = torch.isin(best, letters)
        places: list[_Place] = []
        first = 0
        for symbols in words:
            frames = ((path % 2 == 1) & (path // 2 >= first) & (path // 2 < first + len(symbols))).nonzero()[:, 0]
            first += len(symbols) + 1
            if symbols == [ANYTHING]:
                places.append(_Place(is_estimated=True, is_unheard=not bool(is_letter[frames].any())))
            elif not len(frames):
                places.append(_Place(is_estimated=True, is_unheard=True, score=0.0))
            else:
                first_s, last_s = (int(frames[i]) * FRAME_S - offset_s for i in (0, -1))
                places.append(_Place(first_s=first_s, last_s=last_s, score=float(score[frames].mean().exp())))
        missing = _missing(path, written == space, score >= floor, best, is_letter)
        found.append(
            Alignment(
                words=_bounded(text.split(), places, span),
                missing=tuple((begin * FRAME_S - offset_s, end * FRAME_S - offset_s) for begin, end in missing),
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a word's first and last letters are, seconds, and their score; estimated if skipped or not spelled."""

    first_s: float = 0.0
    last_s: float = 0.0
    score: float | None = None
    is_estimated: bool = False
    is_unheard: bool = False


def _missing(
    path: Tensor, is_space: Tensor, is_heard: Tensor, best: Tensor, is_letter: Tensor
) -> list[tuple[int, int]]:
    """Find stretches with many more letters heard than written: (first frame, frame behind the last).

    Args, each (T,):
        path: the state of each frame.
        is_space: whether that state is a space between words.
        is_heard: whether the symbol of that state was heard.
        best: the symbol that was heard best, and is_letter: whether it is a letter.
    """
    stretches: list[tuple[int, int]] = []
    unwritten: list[int] = []  # frames of letters since the last one that is in the text
    num_unheard, previous, before, explained = 0, -1, -1, -1

    def finish() -> None:
        if len(unwritten) - num_unheard >= MISSING_LETTERS:
            stretches.append((unwritten[0], unwritten[-1] + 1))

    columns = (column.tolist() for column in (path, is_space, is_heard, best, is_letter))
    for t, (state, between, heard, symbol, letter) in enumerate(zip(*columns, strict=True)):
        is_written = state % 2 == 1 and not between
        if letter and heard and is_written and state != explained:
            finish()
            unwritten, num_unheard, explained = [], 0, state
        elif letter and not heard and symbol != before:
            unwritten.append(t)
        if is_written and not heard and state != previous and state != explained:
            num_unheard += 1
        previous, before = state, symbol
    finish()
    return stretches


def _bounded(words: Sequence[str], places: Sequence[_Place], span: tuple[float, float]) -> tuple[Word, ...]:
    """Make words of their places: in order, inside the span, and up to the next word."""
    timed: list[Word] = []
    for is_estimated, run in groupby(range(len(words)), key=lambda i: places[i].is_estimated):
        indices = list(run)
        behind = indices[-1] + 1
        following = span[1] if behind == len(words) else _inside(span, places[behind].first_s)
        if is_estimated:
            begin = timed[-1].end if timed else span[0]
            timed += _shared([words[i] for i in indices], [places[i] for i in indices], (begin, max(begin, following)))
            continue
        for i in indices:
            start, last_s = _inside(span, places[i].first_s), places[i].last_s
            is_last = i == indices[-1]
            until = following if is_last else _inside(span, places[i + 1].first_s)
            is_pause = until - last_s > PAUSE_S or (is_last and behind < len(words))  # words without a place follow
            end = min(last_s + LAST_LETTER_S, until) if is_pause else until
            timed.append(Word(word=words[i], start=start, end=max(start, end), acoustic_score=places[i].score))
    return tuple(timed)


def _inside(span: tuple[float, float], second: float) -> float:
    return max(span[0], min(second, span[1]))


def _shared(words: Sequence[str], places: Sequence[_Place], span: tuple[float, float]) -> list[Word]:
    """Divide a span among words by their numbers of characters."""
    each_s = (span[1] - span[0]) / max(1, sum(map(len, words)))
    timed, start = [], span[0]
    for word, place in zip(words, places, strict=True):
        end = start + each_s * len(word)
        timed.append(
            Word(
                word=word,
                start=start,
                end=end,
                acoustic_score=place.score,
                is_estimated=True,
                is_unheard=place.is_unheard,
            )
        )
        start = end
    return timed
