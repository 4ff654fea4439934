"""Several processes that share the work of one command, as torchrun starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_PATIENCE = timedelta(days=7)  # a fast process waits for a slow one; one that dies is noticed at once


def environment() -> tuple[int, int, int]:
    """(rank, world size, rank on this machine) as the launcher tells them; (0, 1, 0) without one."""
    if not all(os.environ.get(name, "").isdecimal() for name in _VARIABLES):
        return 0, 1, 0
    rank, world, local = (int(os.environ[name]) for name in _VARIABLES)
    return rank, world, local


@dataclass(frozen=True)
class DistributedContext:
    """This process's `rank` among `world`. Every process has to call the methods in the same order."""

    rank: int = 0
    world: int = 1

    def agree(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all processes on rank 0, rank by rank; nothing elsewhere."""
        if self.world == 1:
            return values
        import torch.distributed as dist

        parts: Any = [None] * self.world if self.rank == 0 else None
        dist.gather_object(values, parts, dst=0)
        return sum(parts or [], [])


ALONE = DistributedContext()


@contextlib.contextmanager
def process_group() -> Iterator[DistributedContext]:
    """The processes of this command, in touch with each other; just this one where no launcher started several.

    Raises ValueError, or RuntimeError once a process has ended before its time, so that no other waits for it.
    """
    rank, world, _ = environment()
    if world == 1:
        yield ALONE
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield DistributedContext(rank, world)
    finally:
        dist.destroy_process_group()
