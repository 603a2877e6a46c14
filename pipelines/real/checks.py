"""Checks of the converted parts, before anything is trained: does each alone do what it is known for?"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.corpora.open import open_corpus
from pipelines.recipes.recipe import CorpusSection
from tinyaudio.model.prompt import prompt_ids, transcript_ids


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a language model predicts transcripts that it reads after the prompt, without hearing anything."""

    nats_per_token: float  # the end of text included: the validation loss of a projector that tells it nothing
    per_word: float  # exp of the nats per word
    tokens: int
    words: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.nats_per_token:.2f} nats a token, perplexity {self.per_word:,.0f} a word "
            f"({self.tokens:,} tokens, {self.words:,} words)"
        )


def read_transcripts(corpus: CorpusSection, split: str, count: int) -> list[str]:
    """Return the first `count` transcripts of a split."""
    return [str(text) for text in open_corpus(corpus).scan(split)["transcript"].to_pylist()[:count]]


def perplexity(decoder: Path, transcripts: Sequence[str]) -> Perplexity:
    """Measure a language model on transcripts, each by itself, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32).eval()
    prefix, suffix = prompt_ids(tokenizer)
    prompt = prefix + suffix
    nats, tokens = 0.0, 0
    for transcript in transcripts:
        target = transcript_ids(tokenizer, transcript)
        ids = torch.tensor([prompt + target])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
        tokens += len(target)
    words = sum(len(transcript.split()) for transcript in transcripts)
    return Perplexity(nats_per_token=nats / tokens, per_word=math.exp(nats / words), tokens=tokens, words=words)
