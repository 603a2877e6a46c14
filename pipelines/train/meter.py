"""What a run has gone through and how fast: counts that survive a resume, rates since they were last asked for.

Time spent evaluating and saving is left out of the rates. With several processes the counts are of all of them.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

COUNTS = ("num_utterances", "num_tokens", "num_targets", "audio_s")


class Meter:
    """Counts and clocks of one training loop."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = dict.fromkeys(COUNTS, 0.0)  # of all processes, up to where this one began
        self._here = dict.fromkeys(COUNTS, 0.0)  # of this process
        self._asked = dict.fromkeys(COUNTS, 0.0)
        self._since, self._paused_s, self._waited_s = time.monotonic(), 0.0, 0.0
        self._began, self._seconds_before = time.monotonic(), 0.0  # of the whole run, evaluations included

    def add(self, **counts: float) -> None:
        """Count a batch."""
        for name, count in counts.items():
            self._here[name] += count

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside out of the rates."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - started

    def totals(self) -> dict[str, float]:
        """Add up over all processes and earlier parts of the run; every process must ask."""
        here = torch.tensor([self._here[name] for name in COUNTS], dtype=torch.float64)
        if torch.distributed.is_initialized():
            here = here.to(self.device)
            torch.distributed.all_reduce(here)
        totals = {name: self._before[name] + count for name, count in zip(COUNTS, here.tolist(), strict=True)}
        return {**totals, "seconds": self._seconds_before + time.monotonic() - self._began}

    def restore(self, totals: dict[str, float]) -> None:
        """Go on from the totals of a checkpoint."""
        self._before = {name: totals[name] for name in COUNTS}
        self._seconds_before = totals["seconds"]
        self._asked = dict(self._before)
        self._since, self._paused_s = time.monotonic(), 0.0

    def read(self, waited_s: float) -> dict[str, float]:
        """Give totals, rates since the last reading, and peak memory.

        Args:
            waited_s: all the time that this process has waited for batches.
        """
        totals, now = self.totals(), time.monotonic()
        busy_s = max(now - self._since - self._paused_s, 1e-9)
        rates = {
            "tokens_per_second": (totals["num_tokens"] - self._asked["num_tokens"]) / busy_s,
            "audio_seconds_per_second": (totals["audio_s"] - self._asked["audio_s"]) / busy_s,
            "loader_share": (waited_s - self._waited_s) / busy_s,
        }
        self._asked, self._since, self._paused_s, self._waited_s = totals, now, 0.0, waited_s
        return {**totals, **rates, "peak_memory_bytes": peak_memory_bytes(self.device)}


def peak_memory_bytes(device: torch.device) -> float:
    """Return the most memory in use so far: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    peak: Any = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak * (1 if sys.platform == "darwin" else 1024))
