"""The model that stage two trains, built from a recipe and a store's fingerprint: frozen decoder, new projector."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from cache import FeatureReader, FeatureStore
from pipelines.errors import RunError
from pipelines.recipes import Recipe
from tinyaudio.model.audio import HOP_LENGTH, SAMPLING_RATE
from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.ctc_head import load_alphabet
from tinyaudio.model.encoder import load_encoder_with_head, load_feature_extractor
from tinyaudio.model.frozen import load_decoder, load_frozen, place, resolved_revision, weights_digest
from tinyaudio.model.loss import check_head
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor
from tinyaudio.model.prompt import end_of_text_id, prompt_ids


def load_tokenizer(decoder_id: str, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """Load the decoder's tokenizer.

    A decoder without a padding token gets `<|finetune_right_pad_id|>`, or its end-of-text token.
    """
    tokenizer = load_frozen(AutoTokenizer, decoder_id, revision, gguf_file=gguf_file)
    if tokenizer.pad_token_id is None:
        # SmolLM3-3B-Base defines none, but its vocabulary has this one for the purpose (id 128004).
        pad = tokenizer.convert_tokens_to_ids("<|finetune_right_pad_id|>")
        if pad is None or pad == tokenizer.unk_token_id:
            pad = end_of_text_id(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.padding_side = "right"  # pipelines require the side of the feature extractor
    return tokenizer


def build_model(
    recipe: Recipe, store: FeatureStore, device: torch.device
) -> tuple[TinyAudioForConditionalGeneration, TinyAudioProcessor]:
    """Build the model on a device; `train.seed` decides the weights of the projector.

    Raises:
        MissingModelError, ModelError: a part cannot be loaded or used.
    """
    part = recipe.decoder
    decoder = load_decoder(part.id, part.revision, getattr(torch, part.dtype), part.gguf_file)
    file = part.gguf_file or "config.json"
    commit = None if Path(part.id).is_dir() else resolved_revision(decoder, part.revision, file)
    tokenizer = load_tokenizer(part.id, commit, part.gguf_file)
    prefix, suffix = prompt_ids(tokenizer)
    made_by = store.fingerprint["encoder"]
    head = None
    if Path(recipe.encoder.id).is_dir():  # a hub revision pins the head, which would be 1.3 GB to read
        _, head = load_encoder_with_head(recipe.encoder.id)
    config = TinyAudioConfig(
        encoder_id=recipe.encoder.id,
        encoder_revision=made_by["revision"],
        encoder_digest=made_by["weights"],
        encoder_dim=store.dim,
        encoder_precision=made_by["precision"],
        encoder_context=made_by.get("context"),
        ctc_alphabet=load_alphabet(recipe.encoder.id, made_by["revision"]),
        ctc_head_digest=None if head is None else weights_digest(head),
        decoder_id=part.id,
        decoder_revision=commit,
        decoder_digest=weights_digest(decoder),
        decoder_gguf_file=part.gguf_file,
        decoder_dim=decoder.get_input_embeddings().embedding_dim,
        decoder_dtype=part.dtype,
        projector_kind=recipe.projector.kind,
        stack_factor=recipe.projector.stack_factor,
        projector_hidden_size=recipe.projector.hidden_size,
        prompt_prefix_ids=prefix,
        prompt_suffix_ids=suffix,
        eos_token_id=end_of_text_id(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        window_s=window_s(store, recipe.corpus.train_split),
        store_fingerprint=store.fingerprint_id,
        calibration_id=None if store.calibration is None else store.calibration.id,
    )
    torch.manual_seed(recipe.train.seed)
    model = TinyAudioForConditionalGeneration(config, decoder=decoder)
    processor = TinyAudioProcessor(load_feature_extractor(recipe.encoder.id, made_by["revision"]), tokenizer)
    place(model, device)
    check_head(decoder)
    return model, processor


def window_s(store: FeatureStore, split: str) -> float:
    """Return the longest training utterance in whole seconds: the longest piece the model may decode at once.

    Raises:
        RunError: there are no training utterances.
    """
    num_frames = FeatureReader(store, split=split).num_frames
    if not len(num_frames):
        raise RunError(
            f"{str(store.path)!r}: expected utterances of split {split!r}, found none. See its quarantine folder for "
            "the reasons, and extract again"
        )
    longest = int(num_frames.max())
    return float(math.ceil(longest * HOP_LENGTH / SAMPLING_RATE))
