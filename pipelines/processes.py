"""The processes of one run under torchrun or accelerate: which one this is, how many there are, and waiting for all.

Launchers describe the processes in environment variables, so most of this works before torch is loaded.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any

TIMEOUT = datetime.timedelta(days=7)  # gloo's default is half an hour; a shard of the slowest process may take longer


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return the number of this process among those on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def num_processes() -> int:
    """Count the processes that torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this process prints and writes files."""
    return rank() == 0


@dataclass(frozen=True)
class Place:
    """One of several extracting processes; alone, 0 of 1."""

    rank: int = 0
    world: int = 1

    def part(self, index: int, parts: int) -> tuple[int, int]:
        """Divide part `index` of `parts` further among the processes of this group."""
        return index * self.world + self.rank, parts * self.world


def place() -> Place:
    """Return the place of this process under torchrun; other launchers' variables do not make a group."""
    return Place(rank(), num_processes()) if "TORCHELASTIC_RUN_ID" in os.environ else Place()


def use_all_cores() -> None:
    """Give torch one CPU thread per core again.

    torchrun and Ray set one thread per process. The number of threads changes the last bits of a product on a CPU, and
    every process must compute what a single process would have computed.
    """
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


def wait_for_all() -> None:
    """Return when every process of the group has called this. Extraction needs no other collective."""
    if place().world > 1:
        import torch.distributed as group

        if not group.is_initialized():
            group.init_process_group("gloo", timeout=TIMEOUT)
        group.barrier()


def gather(value: Any) -> list[Any]:
    """Return the values that the other processes pass; a collective of torch.distributed."""
    if num_processes() == 1:
        return []
    import torch

    values: list[Any] = [None] * num_processes()
    torch.distributed.all_gather_object(values, value)
    return values[: rank()] + values[rank() + 1 :]
