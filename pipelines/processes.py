"""The processes of one run under torchrun or accelerate: which one this is, how many there are, waiting for the others.

Extraction needs no collective: shards are independent, and claims keep two processes from one shard. Over gloo its
processes only wait: for the first, which plans and creates the store, and at the end for the slowest.
"""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch

PATIENCE = datetime.timedelta(days=7)  # gloo's own is half an hour, and a shard of the slowest may take longer


@dataclass(frozen=True)
class Place:
    """One process among several that torchrun started; alone, 0 of 1."""

    rank: int = 0
    world: int = 1

    def part(self, index: int, parts: int) -> tuple[int, int]:
        """Divide part `index` of `parts` further among the processes of this group."""
        return index * self.world + self.rank, parts * self.world


def place() -> Place:
    """Read where torchrun put this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Place()
    return Place(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def use_all_cores() -> None:
    """Undo what launchers do to CPU threads.

    torchrun and Ray give each process one thread. How many there are changes the last bits of a product on a CPU,
    and every process is to compute what one process alone would have computed.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))


def wait_for_all() -> None:
    """Return when every process of the group has come here."""
    if place().world > 1:
        import torch.distributed as group

        if not group.is_initialized():
            group.init_process_group("gloo", timeout=PATIENCE)
        group.barrier()


def world_size() -> int:
    """Count the processes of this run."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """Number this process among those of the run; 0 speaks and writes."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather(mine: Any) -> list[Any]:
    """Collect what the other processes have."""
    if world_size() == 1:
        return []
    everyones: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(everyones, mine)
    return [one for i, one in enumerate(everyones) if i != rank()]


def is_main_process() -> bool:
    """Whether this process writes; before the processes have met, too."""
    return int(os.environ.get("RANK", "0")) == 0


def num_processes() -> int:
    """Count the processes that torchrun or accelerate started."""
    return max(world_size(), int(os.environ.get("WORLD_SIZE", "1")))
