"""The bundled decoder: a small SmolLM3 with its tokenizer, steerable through its input embeddings.

Invariants: training reads no sentence of dev, test and test_unseen; everything is a pure function of a seed, the
inputs and the installed libraries. Knows nothing of speech, the encoder or the projector.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

from pipelines.demo.make.training import TrainingPlan, save_weights, update
from tinyaudio.model.prompt import PREFIX, SUFFIX

EOS_TOKEN = "<|end_of_text|>"
PAD_TOKEN = "<|finetune_right_pad_id|>"
DECODER_PLAN = TrainingPlan(steps=2_500, batch_size=48, learning_rate=3e-3, warmup_steps=100)


def train_tokenizer(sentences: Sequence[str], vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: any text round-trips, and common words of the demo are one piece each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    prompts = [PREFIX + SUFFIX] * (len(sentences) // 20)
    tokenizer.train_from_iterator([*(f" {s}" for s in sentences), *prompts], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="right",
        model_max_length=2_048,
        clean_up_tokenization_spaces=False,
    )


def decoder_config(tokenizer: PreTrainedTokenizerFast) -> SmolLM3Config:
    """Return SmolLM3's layout (grouped queries, every fourth layer without RoPE, tied embeddings) made small."""
    return SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2_048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@dataclass(frozen=True, kw_only=True)
class DenoiseSequence:
    """One training sequence of the decoder, position by position."""

    ids: list[int]  # token of each position; -1 is a blank frame
    mixed_ids: list[int]  # the second token of a frame; equal to `ids` elsewhere
    mix: list[float]  # share of the second token, 0 outside frames
    is_frame: list[bool]  # whether the position stands for an audio frame
    has_loss: list[bool]  # whether the token is to be predicted


def _stretch(rng: random.Random, pieces: Sequence[int], vocab_size: int) -> list[tuple[int, int, float]]:
    """Spread pieces over 10 Hz frames with blanks between: (token or -1, second token, its share)."""
    frames: list[tuple[int, int, float]] = [(-1, -1, 0.0)] * rng.choice((0, 0, 1, 1, 2, 3, 8))
    for position, piece in enumerate(pieces):
        frames += [(-1, -1, 0.0)] * rng.choice((0, 0, 0, 1, 1, 2))
        lost = rng.random() < 0.02
        for _ in range(rng.choice((1, 1, 2, 2, 3))):
            draw, second, share = rng.random(), piece, 0.0
            if draw < 0.2:
                second, share = pieces[max(0, min(len(pieces) - 1, position + rng.choice((-1, 1))))], rng.random() * 0.5
            elif draw < 0.4:
                second, share = rng.randrange(vocab_size), rng.random() * 0.6
            frames.append((-1, -1, 0.0) if lost else (piece, second, share))
    return frames + [(-1, -1, 0.0)] * rng.choice((0, 0, 1, 1, 2, 3, 8))


class DenoiseTask:
    """The decoder's training task: write out sentences that stand as blurred frames in the product's prompt.

    A twelfth of the sequences are plain text; a fifteenth contain only blanks, and the answer is end-of-text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str], seed: int) -> None:
        self.rng = random.Random(seed)
        self.eos = cast(int, tokenizer.eos_token_id)
        self.vocab_size = len(tokenizer)
        self.prefix: list[int] = tokenizer.encode(PREFIX, add_special_tokens=False)
        self.suffix: list[int] = tokenizer.encode(SUFFIX, add_special_tokens=False)
        self.pieces: list[list[int]] = tokenizer([f" {s}" for s in sentences], add_special_tokens=False)["input_ids"]

    def sequence(self) -> DenoiseSequence:
        """Draw one sequence."""
        draw = self.rng.random()
        pieces = list(self.rng.choice(self.pieces))
        if draw < 1 / 12:
            return self._assemble([], [], [], pieces)
        if draw < 1 / 12 + 1 / 15:
            blanks = [(-1, -1, 0.0)] * self.rng.randint(1, 60)
            return self._assemble(self.prefix, blanks, self.suffix, [])
        if draw > 0.95:
            pieces += self.rng.choice(self.pieces)
        return self._assemble(self.prefix, _stretch(self.rng, pieces, self.vocab_size), self.suffix, pieces)

    def _assemble(
        self,
        prefix: Sequence[int],
        frames: Sequence[tuple[int, int, float]],
        suffix: Sequence[int],
        transcript: Sequence[int],
    ) -> DenoiseSequence:
        target = [*transcript, self.eos]
        before, after = len(prefix), len(suffix) + len(target)
        return DenoiseSequence(
            ids=[*prefix, *(f[0] for f in frames), *suffix, *target],
            mixed_ids=[*prefix, *(f[1] for f in frames), *suffix, *target],
            mix=[0.0] * before + [f[2] for f in frames] + [0.0] * after,
            is_frame=[False] * before + [True] * len(frames) + [False] * after,
            has_loss=[False] * (before + len(frames) + len(suffix)) + [True] * len(target),
        )


def _pad(rows: Sequence[Sequence[float]], value: float, dtype: torch.dtype) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=dtype)


def denoise_loss(model: SmolLM3ForCausalLM, batch: Sequence[DenoiseSequence], blur: float) -> Tensor:
    """Return the mean cross entropy of the transcripts and their end-of-text.

    Frames are token embeddings: mixed, with noise of up to 1.2 of their size, and scaled by 0.5 to 2. Blanks are noise.

    Args:
        blur: 0 to 1, the share of the mixing and of the noise that is applied.
    """
    ids = _pad([s.ids for s in batch], 0, torch.long)
    second = _pad([s.mixed_ids for s in batch], 0, torch.long)
    mix = _pad([s.mix for s in batch], 0.0, torch.float32)[..., None] * blur
    is_frame = _pad([s.is_frame for s in batch], 0, torch.bool)[..., None]
    has_loss = _pad([s.has_loss for s in batch], 0, torch.bool)
    table: Any = model.get_input_embeddings()
    mixed = (1 - mix) * table(ids.clamp(min=0)) + mix * table(second.clamp(min=0))
    mixed = mixed * (ids >= 0)[..., None]
    size = table.weight.detach().pow(2).mean().sqrt()
    noise = torch.randn_like(mixed) * size * torch.rand(len(batch), 1, 1) * 1.2 * blur
    frames = (mixed + noise) * torch.exp2(torch.rand(len(batch), 1, 1) * 2 - 1)
    embedded = torch.where(is_frame, frames, mixed)
    hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
    wanted = has_loss[:, 1:]
    return functional.cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted])


def train_decoder(
    tokenizer: PreTrainedTokenizerFast, sentences: Sequence[str], seed: int, plan: TrainingPlan = DECODER_PLAN
) -> SmolLM3ForCausalLM:
    """Train the small SmolLM3; return it in eval mode, float32.

    Text alone would not make it steerable through its embeddings, so it learns to denoise. The blur grows over the
    first half: copying is learnt from clean frames, and blurred ones from the start hide it for thousands of steps.
    """
    torch.manual_seed(seed)
    model = SmolLM3ForCausalLM(decoder_config(tokenizer))
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    task = DenoiseTask(tokenizer, sentences, seed)
    for step in range(plan.steps):
        blur = min(1.0, 2 * step / plan.steps)
        loss = denoise_loss(model, [task.sequence() for _ in range(plan.batch_size)], blur)
        update(optimizer, parameters, loss, plan.rate(step))
        if step % 100 == 0:
            print(f"decoder step {step}/{plan.steps} loss {loss.item():.3f}", flush=True)
    model.train(False)
    return model


def save_decoder(model: SmolLM3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights, generation settings and tokenizer as one transformers folder."""
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    save_weights(model, folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
