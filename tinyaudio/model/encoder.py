"""The frozen encoder: samples in, features at 50 Hz out, the same way in both stages and at inference.

Invariants: eval mode, no gradients; an utterance gives the same features alone and in any padded batch (attention mask
on, frames behind its end zeroed); frames are counted by `audio.num_frames` and by nothing else.
Knows HuBERT, wav2vec 2.0 and WavLM through `AutoModel`; knows nothing of stores, prompts or text.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedModel

from .audio import HOP_LENGTH, SAMPLING_RATE, WINDOW_LENGTH, Samples, num_frames, pad_to_window
from .errors import ModelError
from .frozen import freeze, load_frozen

# oneDNN keeps a compiled kernel for each of the last 1,024 shapes, and no two batches have the same: 250 MB for nothing
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_encoder(encoder_id: str, revision: str | None = None) -> PreTrainedModel:
    """Load a frozen encoder in float32, in eval mode, on the CPU.

    Raises:
        MissingModelError: nothing under that id.
        ModelError: an encoder with another frame formula than HuBERT's.
    """
    encoder = freeze(load_frozen(AutoModel, encoder_id, revision, dtype=torch.float32))
    check_geometry(encoder.config)
    return encoder


def load_feature_extractor(encoder_id: str, revision: str | None = None) -> Any:
    """Load the encoder's own feature extractor (it decides on normalisation); errors as `load_encoder`."""
    extractor = load_frozen(AutoFeatureExtractor, encoder_id, revision)
    if extractor.sampling_rate != SAMPLING_RATE:
        raise ModelError(f"{encoder_id!r} wants {extractor.sampling_rate} Hz; expected {SAMPLING_RATE} Hz")
    return extractor


def check_geometry(config: Any) -> None:
    """Refuse an encoder whose convolutions do not give `audio.num_frames`.

    Raises:
        ModelError: no convolution settings, or a window and hop other than 400 and 320 samples.
    """
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if kernels is None or strides is None:
        raise ModelError(
            f"encoder type {config.model_type!r} has no waveform convolutions; expected a HuBERT, wav2vec 2.0 or WavLM"
        )
    window, hop = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        window, hop = window + (kernel - 1) * hop, hop * stride
    if (window, hop) != (WINDOW_LENGTH, HOP_LENGTH):
        raise ModelError(
            f"encoder window {window} and hop {hop} samples; expected {WINDOW_LENGTH} and {HOP_LENGTH} (50 Hz)"
        )


def encoder_inputs(feature_extractor: Any, recordings: Sequence[Samples]) -> tuple[Tensor, Tensor]:
    """Normalise and pad recordings into one batch.

    Args:
        feature_extractor: the encoder's own; normalises each recording by itself.
        recordings: (S_i,) float32 each, 16 kHz. Shorter than 400 samples is zero-padded to 400 first.

    Returns:
        input_values (B, S) float32, zero behind each end, and attention_mask (B, S) int64, 1 on samples.
    """
    padded = [pad_to_window(samples) for samples in recordings]
    rows = feature_extractor(padded, sampling_rate=SAMPLING_RATE, padding=True, return_tensors="np")["input_values"]
    lengths = np.array([len(samples) for samples in padded])
    mask = np.arange(rows.shape[1])[None, :] < lengths[:, None]
    values = np.where(mask, rows, 0.0).astype(np.float32)
    return torch.from_numpy(values), torch.from_numpy(mask.astype(np.int64))


def encode(
    encoder: PreTrainedModel,
    input_values: Tensor,
    attention_mask: Tensor,
    precision: str = "float32",
    *,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the frozen encoder.

    Args:
        encoder: in eval mode.
        input_values: (B, S) float32, as `encoder_inputs` makes them, on the encoder's device.
        attention_mask: (B, S), 1 on samples, 0 on padding; at least 400 ones a row.
        precision: "float32", or "bfloat16" for autocast. An autocast around the call is overridden either way.
        lengths: samples of each row, where the caller knows them: asking a GPU for them means waiting for it.

    Returns:
        features (B, T, D) float32, zero behind each row's end, and num_frames (B,) int64.
    """
    if encoder.training:
        raise AssertionError("the encoder is in training mode: dropout and SpecAugment would change features")
    if lengths is None:
        lengths = attention_mask.sum(-1).tolist()
    counts = [num_frames(length) for length in lengths]
    frames = torch.tensor(counts).to(input_values.device, non_blocking=True)
    device = input_values.device.type
    with torch.no_grad(), _autocast(device, precision), _exact_convolutions(device, precision):
        if encoder.config.feat_extract_norm == "layer":
            features = encoder(input_values, attention_mask=attention_mask).last_hidden_state
        else:
            features = _encode_one_by_one(encoder, input_values, lengths, max(counts))
    valid = torch.arange(features.shape[1], device=features.device)[None, :] < frames[:, None]
    return features.float() * valid[:, :, None], frames


def give_back_free_memory() -> None:
    """Return what malloc keeps of freed batches: as no two are of one size, the heap would creep up for hours."""
    with contextlib.suppress(AttributeError):  # glibc alone has it, and alone needs it
        ctypes.CDLL(None).malloc_trim(0)


def _encode_one_by_one(encoder: PreTrainedModel, values: Tensor, lengths: Sequence[int], num_rows: int) -> Tensor:
    """Encode unpadded: encoders with group norm (the "base" sizes) average over time, so padding would change them."""
    features = values.new_zeros(len(values), num_rows, encoder.config.hidden_size)
    for i, num_samples in enumerate(lengths):
        alone = encoder(values[i : i + 1, :num_samples]).last_hidden_state[0]
        features[i, : len(alone)] = alone
    return features


@contextlib.contextmanager
def _exact_convolutions(device_type: str, precision: str) -> Iterator[None]:
    """Compute a GPU's float32 convolutions in float32: by default cuDNN rounds their inputs to TF32's 10 bits."""
    if device_type != "cuda" or precision != "float32":
        yield
        return
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def _autocast(device_type: str, precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision not in PRECISIONS:
        raise ModelError(f"unknown precision {precision!r}; expected one of {', '.join(PRECISIONS)}")
    return torch.autocast(device_type, dtype=torch.bfloat16, enabled=precision == "bfloat16")
