"""Random numbers of training: the same whether one process draws them or many share the batch.

Item i of a global batch is dealt to rank i mod world_size (as torch's DistributedSampler does it). Every rank draws for
the whole of it, from generators that stand alike on all ranks, and keeps its own rows. So N processes with batches of
B train as one with a batch of N * B, and no draw is used twice. One process draws just what the public code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class DistributedRNG:
    """DistributedRNG for the rows of one process, `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def of(cls, module: object) -> DistributedRNG:
        """Those of a module under its trainer; a module without one is alone."""
        trainer = getattr(module, "_trainer", None)  # `module.trainer` raises where there is none
        return cls() if trainer is None else cls(trainer.global_rank, trainer.world_size)

    def rows(self, count: int, draw: Callable[[int], Tensor]) -> Tensor:
        """This process's `count` rows of what `draw(count * world)` gives."""
        return draw(count * self.world)[self.rank :: self.world]

    def randn(self, shape: Sequence[int], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal noise of `shape`, rows first."""
        return self.rows(shape[0], lambda n: torch.randn((n, *shape[1:]), device=device, dtype=dtype))

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise for x (B, ...)."""
        return self.randn(x.shape, x.device, x.dtype)

    def timesteps(self, count: int, end: int, device: torch.device) -> Tensor:
        """Timesteps (count,) int64 from 0 to end - 1, all alike probable."""
        return self.rows(count, lambda n: torch.randint(0, end, (n,), device=device).long())

    def bernoulli(self, count: int, p: float) -> Tensor:
        """Booleans (count,), True with probability p, drawn on the CPU."""
        return self.rows(count, lambda n: torch.rand(n, device="cpu")) < p


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it the generators of the CPU and of `device` start at `seed`; afterwards they are where they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
