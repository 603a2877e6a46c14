"""From a stream of samples to pieces that fit the model. (Grows: for now every recording is one piece.)"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from .audio import SAMPLING_RATE, Samples


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Samples to decode at once, and where they stand.

    Args:
        samples: (n,) at 16 kHz.
        start_s, end_s: where speech was heard, seconds from the beginning of the recording.
        advance_s: seconds of the recording that are done with when this piece is; they add up to its length.
        overlap_s: how much of its beginning the piece before holds too; 0 after a pause.
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


def cut(blocks: Iterable[Samples], window_s: float) -> Iterator[Piece]:
    """Cut a recording into pieces of at most `window_s` seconds."""
    held = [*blocks]
    if held:
        samples = np.concatenate(held)
        length_s = len(samples) / SAMPLING_RATE
        yield Piece(samples=samples, start_s=0.0, end_s=length_s, advance_s=length_s)


def join_texts(before: str, after: str) -> tuple[str, str, bool]:
    return before, after, True
