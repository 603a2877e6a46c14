"""The encoder's own CTC head, where its checkpoint has one: which letter was heard in each frame.

A head is frozen and in float32. It reads the encoder's features and never changes them. Travels with the checkpoint.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from .align import BLANK, SPACE
from .errors import TinyAudioError
from .frozen import freeze, load_config, load_frozen


class CTCHead(nn.Module):
    """A linear layer from features to symbols.

    Args:
        linear: from the encoder's width to its symbols.
        alphabet: symbols of the letters, of CTC's blank (`align.BLANK`) and of the space between words (`align.SPACE`).
        offset_s: how much later than its letter the head marks it, seconds. From `ctc_offset_s` in the encoder's
            configuration, which only the demo's has; 0 if unknown.
    """

    def __init__(self, linear: nn.Linear, alphabet: Mapping[str, int], offset_s: float = 0.0) -> None:
        super().__init__()
        self.linear, self.alphabet, self.offset_s = linear, dict(alphabet), offset_s
        freeze(self)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Return the log-probabilities (B, T, V), float32, of features (B, T, D)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.linear(features.float()).log_softmax(-1)


def load_alphabet(encoder_id: str, revision: str | None = None) -> dict[str, int] | None:
    """Read what the symbols of an encoder's CTC head stand for, from its tokenizer.

    Returns:
        The symbols of the single letters, of the blank and of the space between words; None if the checkpoint is not of
        a CTC model, or its tokenizer is missing or has no space.
    """
    architectures = load_config(encoder_id, revision).architectures or []
    if not any(name.endswith("ForCTC") for name in architectures):
        return None
    try:
        tokenizer = load_frozen(AutoTokenizer, encoder_id, revision)
    except (TinyAudioError, TypeError):  # transformers opens a vocabulary of None where there is none
        return None
    symbols = tokenizer.get_vocab()
    space = symbols.get(getattr(tokenizer, "word_delimiter_token", None))
    if space is None or tokenizer.pad_token_id is None:
        return None
    letters = {token: symbol for token, symbol in symbols.items() if len(token) == 1 and symbol != space}
    return {BLANK: tokenizer.pad_token_id, SPACE: space, **letters}
