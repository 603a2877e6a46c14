"""Counts and rates of a run: what it has trained on (across resumes and processes), how fast, and encoder passes.

Time spent evaluating and saving does not count towards the rates.
"""

import contextlib
import gc
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration

_SPEECH_INPUTS = ("input_values", "input_features")  # of transformers' speech encoders
COUNTS = ("num_utterances", "num_tokens", "num_targets", "audio_s")


class Meter:
    """Counts and clocks of one training loop."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._here: Counter[str] = Counter()  # batches of this process
        self._before = dict.fromkeys((*COUNTS, "seconds"), 0.0)  # of all processes, up to the checkpoint resumed from
        self._last_read = self._before
        self._began = self._last_read_at = time.monotonic()
        self._paused_s = self._last_waited_s = 0.0  # at and since the last reading

    def add(self, **counts: float) -> None:
        """Count a batch."""
        self._here.update(counts)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time spent inside out of the rates."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - started

    def totals(self) -> dict[str, float]:
        """Sum over all processes and earlier parts of the run; a collective, so every process must call it."""
        here = torch.tensor([self._here[name] for name in COUNTS], dtype=torch.float64)
        if torch.distributed.is_initialized():
            here = here.to(self.device)
            torch.distributed.all_reduce(here)
        totals = {name: self._before[name] + count for name, count in zip(COUNTS, here.tolist(), strict=True)}
        return {**totals, "seconds": self._before["seconds"] + time.monotonic() - self._began}

    def restore(self, totals: dict[str, float]) -> None:
        """Continue from the totals of a checkpoint; other keys are ignored."""
        self._last_read = self._before = {name: totals[name] for name in self._before}
        self._last_read_at, self._paused_s = time.monotonic(), 0.0

    def read(self, waited_s: float) -> dict[str, float]:
        """Return totals, rates since the last reading, and peak memory.

        Args:
            waited_s: all the time that this process has waited for batches.
        """
        totals, now = self.totals(), time.monotonic()
        busy_s = max(now - self._last_read_at - self._paused_s, 1e-9)
        rates = {
            "tokens_per_second": (totals["num_tokens"] - self._last_read["num_tokens"]) / busy_s,
            "audio_seconds_per_second": (totals["audio_s"] - self._last_read["audio_s"]) / busy_s,
            "loader_share": (waited_s - self._last_waited_s) / busy_s,
        }
        self._last_read, self._last_read_at, self._paused_s, self._last_waited_s = totals, now, 0.0, waited_s
        return {**totals, **rates, "peak_memory_bytes": peak_memory_bytes(self.device)}


def release_memory(device: torch.device) -> None:
    """Free what finished work has left behind, and begin to measure a GPU's peak again.

    A trainer and its model refer to each other, so they live until Python collects such cycles.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> float:
    """Return the peak memory so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak * (1 if sys.platform == "darwin" else 1024))


@dataclass
class PassCount:
    """Encoder forward passes so far."""

    passes: int = 0


@contextlib.contextmanager
def counting_encoder_passes() -> Iterator[PassCount]:
    """Count the forward passes of speech encoders in this process: models whose input is samples or a spectrogram.

    PyTorch calls the hook for every module, whichever code runs it. The count proves that training from a store never
    runs an encoder.
    """
    count = PassCount()

    def hook(module: nn.Module, _: Any) -> None:
        if isinstance(module, PreTrainedModel) and module.main_input_name in _SPEECH_INPUTS:
            count.passes += not isinstance(module, TinyAudioForConditionalGeneration)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()
