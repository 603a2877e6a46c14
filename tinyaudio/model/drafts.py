"""Drafts: guesses at a transcript that greedy decoding checks, many tokens in one pass of the decoder.

A drafter guesses the token ids of each row of a batch from what the encoder or the projector made of it. A wrong draft
costs time and never changes the text, since `verify` keeps only what the decoder itself would have written. Shape
letters as in `modeling_tinyaudio`. Travels with the checkpoint.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .ctc import TokenCTC
from .ctc_head import CTCHead
from .errors import ModelError
from .prompt import many_transcript_ids

KINDS = ("auto", "projector", "encoder", "none")
# Characters that the decoder writes without finding the draft again, a dozen words, until the draft is given up.
LONGEST_UNMATCHED = 64
# Tokens proposed after a pass that accepted none: a pass over many positions is not free, and a poor draft wastes them.
AFTER_A_MISS = 4


class Drafter(Protocol):
    """Guesses transcripts; `kind` is its name in options and results, one of `KINDS`."""

    @property
    def kind(self) -> str: ...

    def draft(self, features: Tensor, num_frames: Tensor, projected: Tensor, lengths: Tensor) -> list[list[int]]:
        """Guess the transcripts of a batch.

        Args:
            features: (B, T, D) of the encoder. num_frames: (B,) valid frames.
            projected: (B, P, H) of the projector. lengths: (B,) valid projected frames.

        Returns:
            For each row the decoder's token ids, without end-of-text; empty for no guess.
        """


class ProjectorDrafter:
    """Reads the projected frames with the token CTC that the projector was trained with."""

    kind = "projector"

    def __init__(self, token_ctc: TokenCTC, embeddings: Tensor) -> None:
        self.token_ctc, self.embeddings = token_ctc, embeddings

    def draft(self, features: Tensor, num_frames: Tensor, projected: Tensor, lengths: Tensor) -> list[list[int]]:
        return self.token_ctc.best_path(projected, lengths, self.embeddings)


class EncoderDrafter:
    """Reads the features with the encoder's own CTC head: letters, in lower case as our recipes' transcripts."""

    kind = "encoder"

    def __init__(self, head: CTCHead, tokenizer: Any) -> None:
        self.head, self.tokenizer = head, tokenizer
        self.letters = {symbol: letter.lower() for letter, symbol in head.alphabet.items()}

    def draft(self, features: Tensor, num_frames: Tensor, projected: Tensor, lengths: Tensor) -> list[list[int]]:
        best = self.head(features).argmax(-1).cpu()
        texts = []
        for row, length in zip(best, num_frames.tolist(), strict=True):
            symbols = row[:length].unique_consecutive().tolist()
            texts.append(" ".join("".join(self.letters.get(symbol, "") for symbol in symbols).split()))
        return [ids[:-1] for ids in many_transcript_ids(self.tokenizer, texts)]


def open_drafter(model: Any, tokenizer: Any, kind: str) -> Drafter | None:
    """Open a drafter of a model with its parts attached.

    Args:
        kind: one of `KINDS`. "auto" is the projector's if its CTC loss had a weight, else the encoder's, else none.

    Returns:
        The drafter; None for "none", and for "auto" if the model has no drafter or a decoder that cannot check one.

    Raises:
        ModelError: a drafter that this model does not have, or a decoder that cannot check drafts.
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"draft is {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "none":
        return None
    if not can_verify(model.decoder):
        if kind == "auto":
            return None
        raise ModelError(
            f"the decoder {model.config.decoder_id!r} does not attend to all earlier positions in every layer; drafts "
            "need that. Try --draft none (draft)"
        )
    # Without a weight beside the decoder's loss, training through the decoder made the projector's drafts useless.
    has_kept = model.token_ctc is not None and (kind == "projector" or model.config.ctc_weight)
    if kind in ("auto", "projector") and has_kept:
        return ProjectorDrafter(model.token_ctc, model.get_input_embeddings().weight)
    if kind in ("auto", "encoder") and model.ctc_head is not None:
        return EncoderDrafter(model.ctc_head, tokenizer)
    if kind == "projector":
        raise ModelError("expected a projector trained with a CTC loss, found none. Try --draft auto (draft)")
    if kind == "encoder":
        raise ModelError(
            f"expected an encoder with a CTC head, found none in {model.config.encoder_id!r}. Try --draft auto (draft)"
        )
    return None


def vocabulary_of(tokenizer: Any, size: int) -> list[str]:
    """Return the string of each of `size` token ids, in one case; empty for an id that the tokenizer does not use."""
    return [(piece or "").casefold() for piece in tokenizer.convert_ids_to_tokens(list(range(size)))]


def can_verify(decoder: PreTrainedModel) -> bool:
    """Tell whether all layers attend to all earlier positions, and take the positions' numbers from the caller.

    Rejected positions are masked and not counted; a window or a recurrent state would contain them.
    """
    layers = DynamicCache(config=decoder.config).layers
    takes_positions = "position_ids" in inspect.signature(decoder.get_decoder().forward).parameters
    return takes_positions and all(type(layer) is DynamicLayer for layer in layers)


class Remainder:
    """What is left of a draft behind the text that is written.

    Args:
        vocabulary: the string of each id, as in the tokenizer's own vocabulary, in one case.
    """

    def __init__(self, draft: Sequence[int], vocabulary: Sequence[str]) -> None:
        self._left, self._vocabulary = list(draft), vocabulary
        self._num_skipped = 0  # tokens of `_left` that stand for `_unmatched`
        self._has_missed = False  # whether the last pass accepted nothing
        self._unmatched = ""  # what the decoder wrote since it last agreed with the draft

    def proposal(self) -> list[int]:
        """Return the token ids that the draft expects next."""
        self._num_skipped = self._align()
        return self._left[self._num_skipped :][: AFTER_A_MISS if self._has_missed else None]

    def advance(self, num_accepted: int, token_id: int) -> None:
        """Take note of what was written: so many tokens of the proposal, then another token of the decoder's own."""
        self._has_missed = not num_accepted
        if num_accepted:
            self._left, self._unmatched = self._left[self._num_skipped + num_accepted :], ""
        self._unmatched += self._vocabulary[token_id]

    def _align(self) -> int:
        """Find the beginning of `_left`, in tokens, with the smallest edit distance in characters to `_unmatched`.

        The longest of several: where a word was heard as another, the draft's next word is next.
        """
        text = self._unmatched
        if len(text) > LONGEST_UNMATCHED:
            return len(self._left)
        distances = list(range(len(text) + 1))  # from each beginning of the text to the beginning of `_left`
        nearest, num_tokens, num_characters = len(text), 0, 0
        for count, token_id in enumerate(self._left, 1):
            for character in self._vocabulary[token_id]:
                num_characters += 1
                before, distances = distances, [num_characters]
                for i, written in enumerate(text):
                    substitution = before[i] + (character != written)
                    distances.append(min(substitution, before[i + 1] + 1, distances[i] + 1))
            if distances[-1] <= nearest:
                nearest, num_tokens = distances[-1], count
            if num_characters - len(text) > nearest:  # longer beginnings are further away
                break
        return num_tokens
