"""Count how often a speech encoder runs: the proof that ablations over a store never do.

Whatever code path calls it, a model that reads waveforms is seen: PyTorch tells us of every module call.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration


@dataclass
class PassCount:
    """Encoder forward passes so far."""

    passes: int = 0


@contextlib.contextmanager
def counting_encoder_passes() -> Iterator[PassCount]:
    """Count every forward pass, in this process, of a model whose input is a waveform."""
    count = PassCount()

    def see(module: nn.Module, _: Any) -> None:
        if isinstance(module, PreTrainedModel) and module.main_input_name == "input_values":
            count.passes += not isinstance(module, TinyAudioForConditionalGeneration)

    handle = register_module_forward_pre_hook(see)
    try:
        yield count
    finally:
        handle.remove()
