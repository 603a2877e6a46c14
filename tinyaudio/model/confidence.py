"""How sure a transcript is: the language model's probability of each word, and whether the encoder's head heard speech.

Probabilities of words are those of the finished text, read once more as in training, whatever search found it. Knows no
audio and no recording. Travels with the checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .align import BLANK, SPACE
from .prompt import many_transcript_ids

CLEAREST_FRAMES = 3  # 60 ms: one frame may be a click


def tokens_of_words(tokenizer: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Tokenise transcripts as in training, and find the tokens of each word.

    Args:
        texts: words with single spaces between them.

    Returns:
        The ids of each text, end-of-text last; and for each word of each text the positions of its tokens among them:
        none if the tokenizer, one in Python, does not know which characters a token is.
    """
    ids = many_transcript_ids(tokenizer, texts)
    if not tokenizer.is_fast:
        return ids, [[[] for _ in text.split()] for text in texts]
    targets = [f" {text}" if text else "" for text in texts]
    offsets = tokenizer(targets, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    found = []
    for text, pairs in zip(texts, offsets["offset_mapping"], strict=True):
        words, end = [], 0
        for word in text.split():
            begin, end = end, end + 1 + len(word)  # with the space before it
            words.append([i for i, (first, behind) in enumerate(pairs) if first < end and behind > begin])
        found.append(words)
    return ids, found


def word_probabilities(log_probs: Tensor, words: Sequence[Sequence[int]]) -> list[float | None]:
    """Compute the mean probability of the tokens of each word, as Whisper does; None for a word without tokens.

    Args:
        log_probs: (L,), of each token after those before it.
        words: positions of the tokens of each word.
    """
    probabilities = log_probs.exp().tolist()
    return [sum(probabilities[i] for i in tokens) / len(tokens) if tokens else None for tokens in words]


def no_speech_probs(log_probs: Tensor, num_frames: Sequence[int], alphabet: Mapping[str, int]) -> list[float]:
    """Compute how little speech a CTC head heard, 0 to 1.

    It is 1 minus the mean probability of a letter in the `CLEAREST_FRAMES` frames where that probability is highest.

    Args:
        log_probs: (B, T, V), natural logarithms.
        num_frames: valid frames of each row.
        alphabet: letters and their symbols, with `BLANK` and `SPACE`.
    """
    letters = [symbol for letter, symbol in alphabet.items() if letter not in (BLANK, SPACE)]
    heard = log_probs[:, :, letters].logsumexp(-1).exp()
    valid = torch.arange(heard.shape[1], device=heard.device) < torch.tensor(num_frames, device=heard.device)[:, None]
    clearest = heard.masked_fill(~valid, 0.0).topk(min(CLEAREST_FRAMES, heard.shape[1]), dim=1).values
    return [max(0.0, 1.0 - float(row.mean())) for row in clearest]
