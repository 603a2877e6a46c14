"""Tiny random decoders of several kinds, with tokenizers as different as those of the published ones."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

WIDTH = 48
TEXTS = ["Speech:\nTranscript: the cat sat on the mat", "a dog and a cat", "The dog sat."] * 20
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
}


def byte_level(special: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """As Llama 3, Qwen and SmolLM have: bytes, no unknown token, a start token only where `roles` has one."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXTS, trainer)
    if "bos_token" in roles:  # added to every text, unless the caller asks for none
        start = roles["bos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, bpe.token_to_id(start))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **roles)


def metaspace(special: list[str], **roles: str) -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have: spaces are letters, unknown letters are bytes, and there is an unknown token."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(TEXTS, trainer)
    settings = json.loads(bpe.to_str())
    vocabulary = settings["model"]["vocab"]
    vocabulary |= {f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)}
    settings["model"]["byte_fallback"] = True
    bpe = Tokenizer.from_str(json.dumps(settings))
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", **roles)


def smollm3() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """No start token; end and padding are one token, as of the instruction-tuned one. Tied."""
    tokenizer = byte_level(["<|im_end|>"], eos_token="<|im_end|>", pad_token="<|im_end|>")
    config = SmolLM3Config(**SIZES, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, pad_token_id=0)
    return SmolLM3ForCausalLM(config), tokenizer


def llama() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Start token, no padding token, untied."""
    tokenizer = metaspace(["<unk>", "<s>", "</s>"], bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(**SIZES, vocab_size=len(tokenizer), tie_word_embeddings=False)
    return LlamaForCausalLM(config), tokenizer


def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A Llama whose start, end and padding are tokens of bytes' kind; tied."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(names, bos_token=names[1], eos_token=names[2], pad_token=names[2])
    config = LlamaConfig(
        **SIZES, vocab_size=len(tokenizer), tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2
    )
    return LlamaForCausalLM(config), tokenizer


def qwen3() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """No start token; the tables have more rows than the tokenizer has tokens."""
    tokenizer = byte_level(["<|endoftext|>", "<|im_end|>"], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = Qwen3Config(**SIZES, vocab_size=len(tokenizer) + 37, tie_word_embeddings=False, eos_token_id=[1, 0])
    return Qwen3ForCausalLM(config), tokenizer


def gemma() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Scaled embeddings."""
    tokenizer = metaspace(["<pad>", "<eos>", "<bos>", "<unk>"], bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    return GemmaForCausalLM(GemmaConfig(**SIZES, vocab_size=len(tokenizer))), tokenizer


def gemma2() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Scaled embeddings and capped logits; low, so that the cap matters at these sizes."""
    _, tokenizer = gemma()
    config = Gemma2Config(**SIZES, vocab_size=len(tokenizer), final_logit_softcapping=0.3, sliding_window=16)
    return Gemma2ForCausalLM(config), tokenizer


def gemma3() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Scaled embeddings, and attention within a window of 16 positions in most layers."""
    _, tokenizer = gemma()
    config = Gemma3TextConfig(**SIZES, vocab_size=len(tokenizer) + 11, sliding_window=16, eos_token_id=[1, 106])
    return Gemma3ForCausalLM(config), tokenizer


def granite() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Embeddings multiplied inside the model, logits divided."""
    tokenizer = byte_level(["<|end_of_text|>"], bos_token="<|end_of_text|>", eos_token="<|end_of_text|>")
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    config = GraniteConfig(
        **sizes, vocab_size=len(tokenizer), embedding_multiplier=12.0, logits_scaling=8.0, attention_multiplier=0.25
    )
    return GraniteForCausalLM(config), tokenizer


DECODERS: dict[str, Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerFast]]] = {
    maker.__name__: maker for maker in (smollm3, llama, smollm2, qwen3, gemma, gemma2, gemma3, granite)
}


def save_decoder(name: str, folder: Path) -> Path:
    """Save the weights and the tokenizer of a decoder; its logits are larger than those of a new one."""
    torch.manual_seed(1)
    model, tokenizer = DECODERS[name]()
    head = model.get_output_embeddings()
    head.weight.data *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
