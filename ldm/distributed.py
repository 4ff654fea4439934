"""Processes that share the work of one command, started by torchrun."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_TIMEOUT = timedelta(days=7)  # fast processes wait for slow ones; a process that dies is noticed at once


def environment() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) from the launcher's variables; (0, 1, 0) without a launcher."""
    if not all(os.environ.get(name, "").isdecimal() for name in _VARIABLES):
        return 0, 1, 0
    rank, world_size, local_rank = (int(os.environ[name]) for name in _VARIABLES)
    return rank, world_size, local_rank


@dataclass(frozen=True)
class DistributedContext:
    """This process's `rank` among `world_size`. All processes must call the methods in the same order."""

    rank: int = 0
    world_size: int = 1

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather(self, values: list[Any]) -> list[Any]:
        """Return the values of all processes, in order of rank, on rank 0; an empty list elsewhere."""
        if self.world_size == 1:
            return values
        import torch.distributed as dist

        parts: Any = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(values, parts, dst=0)
        return sum(parts or [], [])


SINGLE_PROCESS = DistributedContext()


@contextlib.contextmanager
def process_group() -> Iterator[DistributedContext]:
    """Connect the processes of this command; without a launcher, yield `SINGLE_PROCESS`.

    Raises:
        ValueError: the launcher's variables are unusable.
        RuntimeError: another process ended early.
    """
    rank, world_size, _ = environment()
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield DistributedContext(rank, world_size)
    finally:
        dist.destroy_process_group()
