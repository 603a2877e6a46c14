"""A process's place under torchrun: which part of the shards is its own, and waiting for the others at the end.

Extraction needs no collective: shards are independent and claims keep two processes from one shard. Over gloo they only
wait: for the first, which plans and makes the store, and at the end for the slowest.
"""

import datetime
import os
from dataclasses import dataclass

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
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


def wait_for_all() -> None:
    """Return when every process of the group has come here."""
    if place().world > 1:
        import torch.distributed as group

        if not group.is_initialized():
            group.init_process_group("gloo", timeout=PATIENCE)
        group.barrier()
