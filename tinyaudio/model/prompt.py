"""The prompt, the same for training and inference.

    <start> Speech: [audio, 10 Hz] \nTranscript: the words that were said <end-of-text>
    '---- prefix --'              '-- suffix --''-------- target -----------------'

The texts are words of the frozen decoder's own vocabulary, since a base model has no chat template; no token is added.
The three texts are tokenised separately and joined as ids, so that words never merge across a border and labels are
placed by position, never found by search. The audio is in the middle, so that the part before it is constant. Shape
letters as in `modeling_tinyaudio`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ModelError

PREFIX = "Speech:"
SUFFIX = "\nTranscript:"


def prompt_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokenise the prompt: ids before the audio (with the tokenizer's own start token, if it has one) and after it."""
    start = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    prefix, suffix = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PREFIX, SUFFIX))
    return [*start, *map(int, prefix)], [*map(int, suffix)]


def transcript_ids(tokenizer: Any, transcript: str) -> list[int]:
    """Tokenise a training target: a space, the transcript, end-of-text. An empty transcript is end-of-text alone."""
    return many_transcript_ids(tokenizer, [transcript])[0]


def many_transcript_ids(tokenizer: Any, transcripts: Sequence[str]) -> list[list[int]]:
    """Tokenise training targets in one call; tokenizers in Rust use several threads for it.

    A transcript that contains the text of a special token, such as "<|end_of_text|>", is text: it gets the ids of its
    letters, and only the last id of a target ends it.
    """
    words = [transcript.strip() for transcript in transcripts]
    texts = [" " + one if one else "" for one in words]
    found = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    end = end_of_text_id(tokenizer)
    return [[*map(int, ids), end] for ids in found]


def end_of_text_id(tokenizer: Any) -> int:
    """Return the id that ends a transcript.

    Raises:
        ModelError: a tokenizer without an end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the decoder's tokenizer has no end-of-text token; expected one, which ends every transcript")
    return int(tokenizer.eos_token_id)


def first_line(text: str) -> str:
    """Return what a decoder wrote up to its first line break, without surrounding space.

    No transcript contains a line break, so it ends one as end-of-text does: behind it a language model that has hardly
    been trained continues the page, often with the same line again.
    """
    return text.strip().partition("\n")[0].rstrip()


def assemble(
    prefix: Tensor, audio: Tensor, num_projected: Tensor, suffix: Tensor, targets: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Join the parts of every prompt, without padding.

    Args:
        prefix: (a, H) embeddings of the ids before the audio.
        audio: (B, P, H) projector output.
        num_projected: (B,) valid projected frames of each row; on the host, since reading it from a GPU waits.
        suffix: (b, H) embeddings of the ids after the audio.
        targets: B tensors (L_i, H), embedded transcripts; None at inference.

    Returns:
        B tensors (a + P_i + b [+ L_i], H).
    """
    rows = []
    for i, length in enumerate(num_projected.tolist()):
        parts = [prefix, audio[i, :length], suffix]
        rows.append(torch.cat(parts if targets is None else [*parts, targets[i]]))
    return rows


def pad_right(rows: Sequence[Tensor]) -> Tensor:
    """Stack rows for training, (B, longest, H). Padding is at the end, where causal attention never looks."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def pad_left(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack rows for generation: (B, longest, H), and the mask (B, longest) with 0 on padding."""
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side="left")
    positions = torch.arange(padded.shape[1], device=padded.device)
    return padded, (positions[None, :] >= padded.shape[1] - lengths[:, None]).long()
