"""Measure a piece of PyTorch work: its peak memory (a GPU's allocator, or storages counted on a CPU) and its flops.

The count sees every tensor that any operation gives, forward and backward, and when it is freed: what the work itself
needs beyond what was there before, the same on every machine.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass
class Peak:
    """Bytes beyond what was in use at the start."""

    size_bytes: int = 0


@contextlib.contextmanager
def measuring_peak(device: torch.device) -> Iterator[Peak]:
    """Measure what happens inside."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.size_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with _CountStorages(peak):
        yield peak


class CountFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the floating-point operations of matrix products, convolutions and attention.

    torch's own FlopCounterMode does not bear a gradient taken inside a forward pass, as our loss does.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


class _CountStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, peak: Peak) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._peak, self._now = peak, 0
        self._live: set[int] = set()  # addresses of the storages that were made here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), given)
        return result

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._live or address in given or not size:  # a view, or written in place
            return
        self._live.add(address)
        self._now += size
        self._peak.size_bytes = max(self._peak.size_bytes, self._now)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._live.discard(address)
        self._now -= size
