"""Tiny random encoders of every family, saved as their published checkpoints are."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    SeamlessM4TFeatureExtractor,
    UniSpeechSatConfig,
    UniSpeechSatModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMForCTC,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

WIDTH = 32
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
# With the dropout and SpecAugment of the published ones: a model that trains would show.
NOISY = {"hidden_dropout": 0.3, "mask_time_prob": 0.5}
CONVOLUTIONS = {"conv_dim": (8,) * 7, "conv_bias": True, "num_conv_pos_embedding_groups": 2}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_conv_pos_embeddings": 16}
GROUP_NORM = {"feat_extract_norm": "group", "num_conv_pos_embeddings": 16}


def hubert() -> PreTrainedModel:
    return HubertModel(HubertConfig(**SIZES, **NOISY, **CONVOLUTIONS, **LAYER_NORM))


def wav2vec2_base() -> PreTrainedModel:
    return Wav2Vec2Model(Wav2Vec2Config(**SIZES, **NOISY, **CONVOLUTIONS, **GROUP_NORM))


def wavlm() -> PreTrainedModel:
    return WavLMModel(WavLMConfig(**SIZES, **NOISY, **CONVOLUTIONS, **LAYER_NORM))


def unispeech_sat() -> PreTrainedModel:
    return UniSpeechSatModel(UniSpeechSatConfig(**SIZES, **NOISY, **CONVOLUTIONS, **LAYER_NORM))


def data2vec() -> PreTrainedModel:
    return Data2VecAudioModel(Data2VecAudioConfig(**SIZES, **NOISY, **CONVOLUTIONS, num_conv_pos_embeddings=3))


def whisper(max_s: int = 30) -> PreTrainedModel:
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        max_source_positions=50 * max_s,
        max_target_positions=16,
        vocab_size=40,
        dropout=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return WhisperForConditionalGeneration(config)


def w2v_bert() -> PreTrainedModel:
    return Wav2Vec2BertModel(Wav2Vec2BertConfig(**SIZES, **NOISY, conformer_conv_dropout=0.3))


def save_ctc(name: str, folder: Path) -> Path:
    """Save a w2v-BERT or WavLM with a head of letters, as fine-tuned ones are."""
    torch.manual_seed(4)
    if name == "w2v_bert":
        Wav2Vec2BertForCTC(Wav2Vec2BertConfig(**SIZES, **NOISY, vocab_size=len(LETTERS))).save_pretrained(folder)
        SeamlessM4TFeatureExtractor().save_pretrained(folder)
    else:
        sizes = {**SIZES, **NOISY, **CONVOLUTIONS, **LAYER_NORM}
        WavLMForCTC(WavLMConfig(**sizes, vocab_size=len(LETTERS))).save_pretrained(folder)
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({letter: i for i, letter in enumerate(LETTERS)}))
    Wav2Vec2CTCTokenizer(str(vocabulary)).save_pretrained(folder)
    return folder


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    maker.__name__: maker for maker in (hubert, wav2vec2_base, wavlm, unispeech_sat, data2vec, whisper, w2v_bert)
}


def save_encoder(name: str, folder: Path, **settings: int) -> Path:
    """Save the weights and the feature extractor of a family; settings are of its maker."""
    torch.manual_seed(0)
    FAMILIES[name](**settings).save_pretrained(folder)
    if name == "whisper":
        WhisperFeatureExtractor().save_pretrained(folder)
    elif name == "w2v_bert":
        SeamlessM4TFeatureExtractor().save_pretrained(folder)
    else:
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True).save_pretrained(folder)
    return folder
