"""When each word was said: the words of a transcript, aligned with the letters that the encoder's CTC head heard.

The Viterbi path through the letters, with blanks between them, gives every letter its frames. Words that cannot be
spelled in the head's alphabet, such as digits, match anything and lie between their neighbours. Times are seconds from
the first sample. Knows no audio, model or recording. Travels with the checkpoint.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from itertools import groupby

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
_APOSTROPHES = dict.fromkeys(map(ord, "\u2018\u2019\u02bc\u0060\u00b4"), "'")


def spell(word: str, alphabet: Mapping[str, int]) -> list[int]:
    """Return the ids of a word's letters, without accents and punctuation; [ANYTHING] if it has others, or none."""
    folded = unicodedata.normalize("NFKD", word.translate(_APOSTROPHES))
    cased = {letter.casefold(): symbol for letter, symbol in alphabet.items()}
    ids = [cased.get(letter) for letter in folded.casefold() if letter.isalnum() or letter in cased]
    return [ANYTHING] if None in ids or not ids else [symbol for symbol in ids if symbol is not None]


def align(log_probs: Tensor, num_frames: Sequence[int], targets: Sequence[Sequence[int]], blank: int) -> list[Tensor]:
    """Find the best CTC path of each row through its targets.

    Args:
        log_probs: (B, T, V), natural logarithms of probabilities, on any device.
        num_frames: valid frames of each row.
        targets: symbols of each row in order, or `ANYTHING`, whose score is that of a frame's best symbol.
        blank: the symbol of CTC's blank.

    Returns:
        For each row (num_frames,) on the CPU: the state of each frame, where 2 * i + 1 is the i-th target and even
        states are blanks. An empty tensor if the targets need more frames.

    Source: Graves et al. 2006, section 4.1, with maxima for sums. All rows and states advance together by a frame.
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

    def emissions(t: int) -> Tensor:
        return torch.where(is_anything, best[:, t, None], log_probs[:, t].gather(1, symbols))

    never = float("-inf")
    score = torch.full((num_rows, width), never, device=device, dtype=log_probs.dtype)
    score[:, :2] = emissions(0)[:, :2]
    steps = torch.zeros((longest, num_rows, width), dtype=torch.uint8, device=device)
    lengths = torch.tensor(num_frames, device=device)
    for t in range(1, longest):
        one = torch.nn.functional.pad(score, (1, 0), value=never)[:, :-1]
        two = torch.nn.functional.pad(score, (2, 0), value=never)[:, :-2].masked_fill(~may_skip, never)
        top, step = torch.stack([score, one, two]).max(0)
        steps[t] = step
        score = torch.where((t < lengths)[:, None], top + emissions(t), score)
    backwards, final = steps.cpu(), score.cpu()
    paths = []
    for row, (length, target) in enumerate(zip(num_frames, targets, strict=True)):
        last = 2 * len(target)
        state = last if not target or final[row, last] >= final[row, last - 1] else last - 1
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


def word_times(
    texts: Sequence[str],
    log_probs: Tensor,
    num_frames: Sequence[int],
    alphabet: Mapping[str, int],
    *,
    offset_s: float,
    spans: Sequence[tuple[float, float]],
) -> list[tuple[Word, ...]]:
    """Time the words of each text.

    Args:
        texts: one for each row of `log_probs`; words are what `str.split` gives.
        log_probs, num_frames: as `align`.
        alphabet: letters and their symbols, with `BLANK` and `SPACE`.
        offset_s: how much later than its letter the head marks it; negative if earlier.
        spans: where each row's speech begins and ends, seconds; no word is outside.

    Returns:
        One `Word` for each word of each text. If a text has more letters than there are frames, its words share the
        span by their lengths, and are marked as estimated.
    """
    spelled = [[spell(word, alphabet) for word in text.split()] for text in texts]
    targets = []
    for words in spelled:
        target: list[int] = []
        for letters in words:
            target += [alphabet[SPACE], *letters] if target else letters
        targets.append(target)
    paths = align(log_probs, num_frames, targets, alphabet[BLANK])
    timed = []
    for row, (text, words, target, path, span) in enumerate(zip(texts, spelled, targets, paths, spans, strict=True)):
        if not len(path):
            timed.append(_shared(text.split(), span))
            continue
        at = torch.arange(len(path))
        symbols = torch.tensor([alphabet[BLANK], *(s for symbol in target for s in (symbol, alphabet[BLANK]))])[path]
        heard = log_probs[row, : len(path)].cpu().gather(1, symbols.clamp(min=0)[:, None])[:, 0]
        found, first = [], 0
        for letters in words:
            is_word = (path % 2 == 1) & (path // 2 >= first) & (path // 2 < first + len(letters))
            frames = at[is_word]
            is_estimated = letters == [ANYTHING]
            score = 0.0 if is_estimated else float(heard[is_word].mean().exp())
            found.append(
                (int(frames[0]) * FRAME_S - offset_s, int(frames[-1]) * FRAME_S - offset_s, score, is_estimated)
            )
            first += len(letters) + 1
        timed.append(_bounded(text.split(), found, span))
    return timed


def _bounded(
    words: Sequence[str], found: Sequence[tuple[float, float, float, bool]], span: tuple[float, float]
) -> tuple[Word, ...]:
    """Make words of the places of their first and last letters: in order, inside the span, and up to the next word.

    Args:
        found: where each word's first and last letters are, its score, and whether it was not spelled.
    """
    timed: list[Word] = []
    for is_estimated, run in groupby(range(len(words)), key=lambda i: found[i][3]):
        indices = list(run)
        behind = indices[-1] + 1
        following = _inside(span, found[behind][0]) if behind < len(words) else span[1]
        if is_estimated:
            begin = timed[-1].end if timed else span[0]
            timed += _shared([words[i] for i in indices], (begin, max(begin, following)))
            continue
        for i in indices:
            first, last, score, _ = found[i]
            start, is_last = _inside(span, first), i == indices[-1]
            until = following if is_last else _inside(span, found[i + 1][0])
            is_pause = until - last > PAUSE_S or (is_last and behind < len(words))  # words that are not spelled follow
            end = min(last + LAST_LETTER_S, until) if is_pause else until
            timed.append(Word(word=words[i], start=start, end=max(start, end), probability=score))
    return tuple(timed)


def _inside(span: tuple[float, float], second: float) -> float:
    return max(span[0], min(second, span[1]))


def _shared(words: Sequence[str], span: tuple[float, float]) -> tuple[Word, ...]:
    """Divide a span among words by their numbers of characters."""
    each_s = (span[1] - span[0]) / max(1, sum(map(len, words)))
    timed, start = [], span[0]
    for word in words:
        end = start + each_s * len(word)
        timed.append(Word(word=word, start=start, end=end, probability=0.0, is_estimated=True))
        start = end
    return tuple(timed)
