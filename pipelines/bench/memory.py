"""Meters of PyTorch work: peak memory, floating-point operations, and the matmul speed of a GPU.

On a CPU, `measuring_peak` counts the storages that operations create, forward and backward, until they are freed. The
result is what the work needs beyond what was there before, and is the same on every machine.
"""

import contextlib
import multiprocessing
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipelines.bench.race import seconds

SAMPLING_INTERVAL_S = 0.05  # of resident memory
MATMUL_SIZE = 8192  # rows and columns of the matrices whose product gives a device's peak speed


@dataclass
class Peak:
    """The highest value so far, in bytes."""

    size_bytes: int = 0


@contextlib.contextmanager
def measuring_peak(device: torch.device) -> Iterator[Peak]:
    """Measure the memory that PyTorch allocates inside, beyond what was in use at the start."""
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


@contextlib.contextmanager
def measuring_resident(other: int | None = None) -> Iterator[Peak]:
    """Sample the resident memory of this process and of those it has started through multiprocessing, or of `other`."""
    peak, is_done = Peak(), threading.Event()

    def watch() -> None:
        while True:
            total, own = 0, (os.getpid(), *(child.pid for child in multiprocessing.active_children()))
            for pid in own if other is None else (other,):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    total += psutil.Process(pid).memory_info().rss
            peak.size_bytes = max(peak.size_bytes, total)
            if is_done.wait(SAMPLING_INTERVAL_S):
                return

    thread = threading.Thread(target=watch, name="resident-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        is_done.set()
        thread.join()


def matmul_peak(device: torch.device) -> float:
    """Measure a GPU's floating-point operations per second in a large bfloat16 matrix product: the best of twelve."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        a @ b
        torch.cuda.synchronize(device)

    torch.cuda.synchronize(device)
    return 2 * MATMUL_SIZE**3 / min(seconds(multiply) for _ in range(12))


class CountFlops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the floating-point operations of matrix products, convolutions and attention.

    PyTorch's FlopCounterMode does not support a gradient taken inside a forward pass, as our loss does.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            if "scaled_dot_product" in str(func):
                args = _with_equal_heads(args)
            self.flops += count(*args, **(kwargs or {}), out_val=result)
        return result


def _with_equal_heads(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Give keys and values as many heads as the query has, by shape only.

    CUDA kernels take fewer heads of keys (SmolLM3: 4 beside 16), which the formulas of torch 2.11 refuse.
    """
    num_heads = args[0].shape[1]  # of the query, or of the gradient of the output

    def expanded(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim != 4 or value.shape[1] == num_heads:
            return value
        return torch.empty(value.shape[0], num_heads, *value.shape[2:], device="meta")

    return tuple(expanded(value) for value in args)


class _CountStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, peak: Peak) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._peak, self._now = peak, 0
        self._live: set[int] = set()  # addresses of the storages created inside

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
        weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self._live.discard(address)
        self._now -= size
