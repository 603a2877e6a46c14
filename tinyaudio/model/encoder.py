"""The frozen encoder, from samples to features at 50 Hz; the same code in both stages and at inference.

Invariants: eval mode, no gradients; an utterance has the same features alone and in any padded batch (attention mask
on, frames after its end zeroed); frames are counted by the encoder's family (`families`) only.
Does not know stores, prompts or text.
"""

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoModelForCTC, PreTrainedModel, Wav2Vec2FeatureExtractor

from .audio import SAMPLING_RATE, Samples, pad_to_window
from .ctc_head import CTCHead, load_alphabet
from .errors import ModelError
from .families import Waveform, family_of
from .frozen import check_complete, freeze, load_config, load_frozen

# oneDNN keeps a compiled kernel for each of the last 1,024 shapes; batches rarely repeat a shape, so 250 MB are wasted.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_REPORTED = ("UNEXPECTED", "MISSING", "MISMATCH", "CONVERSION")  # states of weights in transformers' report
VARIANCE_FLOOR = 1e-7  # added to each recording's variance by `Wav2Vec2FeatureExtractor.zero_mean_unit_var_norm`


def load_encoder(encoder_id: str, revision: str | None = None, context: str | None = None) -> PreTrainedModel:
    """Load a frozen encoder in float32, in eval mode, on the CPU.

    Args:
        context: of an encoder that has a choice, see `families.Family`.

    Raises:
        MissingModelError: there is no model with that id.
        ModelError: it is of no known family, does not give 50 frames a second, has no such context, or is not whole.
    """
    family = family_of(load_config(encoder_id, revision), context)

    def from_pretrained(auto_class: Any, **settings: Any) -> PreTrainedModel:
        model, info = load_frozen(
            auto_class, encoder_id, revision, dtype=torch.float32, output_loading_info=True, **settings
        )
        check_complete(encoder_id, info["missing_keys"])
        return cast(PreTrainedModel, model)

    with _without_report_of_heads():
        return _with_context(freeze(family.load(from_pretrained)), family.context)


def load_encoder_with_head(
    encoder_id: str, revision: str | None = None, alphabet: Mapping[str, int] | None = None, context: str | None = None
) -> tuple[PreTrainedModel, CTCHead | None]:
    """Load a frozen encoder as `load_encoder` does, and its CTC head from the same files.

    Args:
        alphabet: of the head; None to read it from the encoder's tokenizer.

    Returns:
        The encoder, with the same weights as without its head; and the head, None where the checkpoint has none or
        its alphabet is unknown.
    """
    alphabet = alphabet or load_alphabet(encoder_id, revision)
    if alphabet is None:
        return load_encoder(encoder_id, revision, context), None
    whole, info = load_frozen(AutoModelForCTC, encoder_id, revision, dtype=torch.float32, output_loading_info=True)
    encoder = freeze(whole.base_model)
    encoder = _with_context(encoder, family_of(encoder.config, context).context)
    of_head = {key for key in info["missing_keys"] if key.startswith("lm_head.")}
    check_complete(encoder_id, info["missing_keys"] - of_head)
    offset_s = float(getattr(encoder.config, "ctc_offset_s", 0.0))  # no field of transformers' own configurations
    return encoder, None if of_head else CTCHead(whole.lm_head, alphabet, offset_s)


def _with_context(encoder: PreTrainedModel, context: str | None) -> PreTrainedModel:
    """Keep the context with the encoder, where `family_of` finds it."""
    if context is not None:
        encoder.config.encoder_context = context
    return encoder


@contextlib.contextmanager
def _without_report_of_heads() -> Iterator[None]:
    """Omit transformers' report of weights that the encoder does not use, if they are those of a CTC head."""

    def is_news(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        rows = [line for line in text.splitlines() if "|" in line and any(status in line for status in _REPORTED)]
        return "LOAD REPORT" not in text or any(not row.lstrip().startswith("lm_head") for row in rows)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)


def load_feature_extractor(encoder_id: str, revision: str | None = None) -> Any:
    """Load what normalises samples before the encoder; errors as `load_encoder`.

    Encoders of samples bring it with them. The others get their samples as they are, and compute spectrograms from
    them.
    """
    if not isinstance(family_of(load_config(encoder_id, revision)), Waveform):
        return Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True)
    extractor = load_frozen(AutoFeatureExtractor, encoder_id, revision)
    if not isinstance(extractor, Wav2Vec2FeatureExtractor):
        raise ModelError(f"expected a feature extractor of samples, found {type(extractor).__name__} in {encoder_id!r}")
    if extractor.sampling_rate != SAMPLING_RATE:
        raise ModelError(
            f"expected an encoder for {SAMPLING_RATE} Hz, found {extractor.sampling_rate} Hz in {encoder_id!r}"
        )
    return extractor


def encoder_inputs(
    feature_extractor: Any, recordings: Sequence[Samples], *, is_pinned: bool = False
) -> tuple[Tensor, Tensor]:
    """Normalise and pad recordings into one batch.

    The bits are those of `feature_extractor`, which takes eight times as long: it copies every recording several times.

    Args:
        feature_extractor: the encoder's own; says whether each recording is normalised, by itself.
        recordings: (S_i,) float32 each, 16 kHz. Those shorter than 400 samples are zero-padded to 400 first.
        is_pinned: return page-locked memory, from which copies to a GPU run in the background.

    Returns:
        input_values (B, S) float32, zero after each end, and attention_mask (B, S) bool, true on samples.
    """
    padded = [pad_to_window(samples) for samples in recordings]
    longest = max(map(len, padded))
    values = torch.empty(len(padded), longest, pin_memory=is_pinned)
    mask = torch.zeros(len(padded), longest, dtype=torch.bool, pin_memory=is_pinned)
    squares = np.empty(longest, np.float32)
    for row, is_sample, samples in zip(values.numpy(), mask.numpy(), padded, strict=True):
        length = len(samples)
        own = row[:length]
        if feature_extractor.do_normalize:
            # As samples.mean() and samples.var() compute, but nothing is computed twice or in new memory.
            np.subtract(samples, samples.mean(), out=own)
            variance = np.multiply(own, own, out=squares[:length]).mean()
            np.divide(own, np.sqrt(variance + VARIANCE_FLOOR), out=own)
        else:
            own[:] = samples
        row[length:] = 0.0
        is_sample[:length] = True
    return values, mask


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
        input_values: (B, S) float32, from `encoder_inputs`, on the encoder's device.
        attention_mask: (B, S) bool or integers, 1 on samples, 0 on padding; at least 400 ones a row.
        precision: "float32", or "bfloat16" for autocast. Overrides an autocast around the call.
        lengths: samples of each row, if the caller has them; computing them from a mask on a GPU waits for the GPU.

    Returns:
        features (B, T, D) float32, zero after each row's end, and num_frames (B,) int64.

    Raises:
        ModelError: unknown precision, or a recording longer than the encoder takes.
    """
    if precision not in PRECISIONS:
        raise ModelError(f"expected a precision of {', '.join(PRECISIONS)}, found {precision!r}")
    if encoder.training:
        raise AssertionError("the encoder is in training mode: dropout and SpecAugment would change features")
    if lengths is None:
        lengths = attention_mask.sum(-1).tolist()
    family = family_of(encoder.config)
    if family.max_samples is not None and max(lengths) > family.max_samples:
        found_s, expected_s = max(lengths) / SAMPLING_RATE, family.max_samples / SAMPLING_RATE
        raise ModelError(
            f"expected recordings of at most {expected_s:g} s for this encoder, found {found_s:.1f} s. Cut them first, "
            "as `tinyaudio transcribe` does"
        )
    counts = [family.num_frames(length) for length in lengths]
    frames = torch.tensor(counts).to(input_values.device, non_blocking=True)
    device = input_values.device.type
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16")
    with torch.no_grad(), autocast, _exact_convolutions(device, precision):
        features = family.run(encoder, input_values, attention_mask, lengths)[:, : max(counts)]
    valid = torch.arange(features.shape[1], device=features.device)[None, :] < frames[:, None]
    return features.float() * valid[:, :, None], frames


def give_back_free_memory() -> None:
    """Return freed memory to the system: batches differ in size, so malloc's heap would grow for hours."""
    with contextlib.suppress(AttributeError):  # only glibc has and needs it
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _exact_convolutions(device_type: str, precision: str) -> Iterator[None]:
    """Compute float32 convolutions on a GPU in float32; by default cuDNN rounds their inputs to TF32 (10 bits)."""
    if device_type != "cuda" or precision != "float32":
        yield
        return
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
