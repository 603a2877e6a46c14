"""Whisper from CTranslate2's format: a binary of named arrays becomes transformers' `WhisperForConditionalGeneration`.

Supports models of specification `WhisperSpec` in float16 or float32; quantised ones (int8 with scales) are refused.

Source: github.com/OpenNMT/CTranslate2, `python/ctranslate2/specs/model_spec.py` (the binary) and
`python/ctranslate2/converters/transformers.py`, `WhisperLoader` (the names), version 4.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from pipelines.errors import RunError

Arrays = dict[str, NDArray[Any]]

BINARY_VERSION = 6  # of the file; older ones have other headers
DTYPES = {0: "<f4", 1: "|i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # the specification's ids of types; 5 is bfloat16
HEAD_DIM = 64  # of every Whisper
END_OF_TEXT = 50_256  # "<|endoftext|>" of the English-only vocabulary; "<|startoftranscript|>" follows it


def read_arrays(path: Path) -> Arrays:
    """Read every array of a CTranslate2 model by its name, such as "encoder/layer_0/ffn/linear_0/weight".

    Raises:
        RunError: not a Whisper of this format, a type that is not read here, or a file that was cut.
    """
    with path.open("rb") as stream:
        try:
            (version,) = _unpack(stream, "<I")
            kind = _text(stream) if version == BINARY_VERSION else f"binary version {version}"
            if kind != "WhisperSpec":
                raise RunError(f"expected WhisperSpec, binary version {BINARY_VERSION}, found {kind} in {str(path)!r}")
            _, num_arrays = _unpack(stream, "<II")
            return dict(_array(stream) for _ in range(num_arrays))
        except (struct.error, ValueError, KeyError) as error:
            raise RunError(f"{str(path)!r} is damaged or of another type ({error}). Copy it again") from error


def _unpack(stream: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def _text(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "<H")
    return stream.read(length).rstrip(b"\0").decode()


def _array(stream: BinaryIO) -> tuple[str, NDArray[Any]]:
    name = _text(stream)
    (rank,) = _unpack(stream, "<B")
    shape = _unpack(stream, f"<{rank}I")
    kind, size = _unpack(stream, "<BI")
    return name, np.frombuffer(stream.read(size), DTYPES[kind]).reshape(shape)


def whisper_config(arrays: Mapping[str, NDArray[Any]]) -> WhisperConfig:
    """Derive the configuration of an English-only Whisper from the shapes of its arrays."""
    vocab_size, width = arrays["decoder/embeddings/weight"].shape
    hidden = arrays["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    return WhisperConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_mel_bins=arrays["encoder/conv1/weight"].shape[1],
        encoder_layers=_num_layers(arrays, "encoder"),
        decoder_layers=_num_layers(arrays, "decoder"),
        encoder_attention_heads=width // HEAD_DIM,
        decoder_attention_heads=width // HEAD_DIM,
        encoder_ffn_dim=hidden,
        decoder_ffn_dim=hidden,
        max_source_positions=len(arrays["encoder/position_encodings/encodings"]),
        max_target_positions=len(arrays["decoder/position_encodings/encodings"]),
        bos_token_id=END_OF_TEXT,
        eos_token_id=END_OF_TEXT,
        pad_token_id=END_OF_TEXT,
        decoder_start_token_id=END_OF_TEXT + 1,
    )


def _num_layers(arrays: Mapping[str, NDArray[Any]], side: str) -> int:
    return len({name.split("/")[1] for name in arrays if name.startswith(f"{side}/layer_") and name.count("/") > 2})


def whisper_model(arrays: Mapping[str, NDArray[Any]]) -> WhisperForConditionalGeneration:
    """Build the model in float32, in eval mode.

    Raises:
        RunError: the arrays are not exactly those of a Whisper.
    """
    model = WhisperForConditionalGeneration(whisper_config(arrays)).eval()
    state = _whisper_state(arrays)
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"expected the arrays of a Whisper: {' '.join(str(error).split())[:200]}") from error
    return model


def _whisper_state(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Rename arrays as transformers does, and split the joined projections of attention.

    CTranslate2 joins queries, keys and values of self-attention, and keys and values of attention to the encoder.
    Whisper's keys have no bias; where CTranslate2 joins them it stores zeros.
    """
    state: dict[str, Tensor] = {}

    def copy(source: str, target: str, parts: tuple[str, ...] = ("",)) -> None:
        for kind, name in (("weight", "weight"), ("bias", "bias"), ("gamma", "weight"), ("beta", "bias")):
            if f"{source}/{kind}" in arrays:
                array = torch.from_numpy(arrays[f"{source}/{kind}"].astype(np.float32))
                for part, values in zip(parts, array.chunk(len(parts)), strict=True):
                    if (part, name) != ("k_proj", "bias"):
                        state[f"{target}{part}.{name}"] = values.clone()

    for conv in ("conv1", "conv2"):
        copy(f"encoder/{conv}", f"model.encoder.{conv}")
    copy("decoder/embeddings", "model.decoder.embed_tokens")
    for side in ("encoder", "decoder"):
        positions = arrays[f"{side}/position_encodings/encodings"].astype(np.float32)
        state[f"model.{side}.embed_positions.weight"] = torch.from_numpy(positions)
        copy(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(_num_layers(arrays, side)):
            layer, target = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            copy(f"{layer}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            copy(f"{layer}/self_attention/linear_0", f"{target}.self_attn.", ("q_proj", "k_proj", "v_proj"))
            copy(f"{layer}/self_attention/linear_1", f"{target}.self_attn.out_proj")
            copy(f"{layer}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
            copy(f"{layer}/attention/linear_0", f"{target}.encoder_attn.q_proj")
            copy(f"{layer}/attention/linear_1", f"{target}.encoder_attn.", ("k_proj", "v_proj"))
            copy(f"{layer}/attention/linear_2", f"{target}.encoder_attn.out_proj")
            copy(f"{layer}/ffn/layer_norm", f"{target}.final_layer_norm")
            copy(f"{layer}/ffn/linear_0", f"{target}.fc1")
            copy(f"{layer}/ffn/linear_1", f"{target}.fc2")
    return state
