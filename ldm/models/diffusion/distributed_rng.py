"""Random numbers of training: the same whether one process computes the batch or several share it.

Item i of a global batch belongs to rank i mod world_size, as in torch's DistributedSampler. Every rank generates the
numbers of the global batch, from generators in the same state on all ranks, and takes its own rows. So N processes with
batches of B train like one with a batch of N * B, and no number is used twice. One process generates just what the
public code does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


@dataclass(frozen=True)
class DistributedRNG:
    """Random numbers for the rows of the process `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def for_module(cls, module: object) -> DistributedRNG:
        """The random numbers of a module's process; a module without a trainer is the only one."""
        trainer = getattr(module, "_trainer", None)  # `module.trainer` raises where there is none
        return cls() if trainer is None else cls(trainer.global_rank, trainer.world_size)

    def local_rows(self, count: int, generate: Callable[[int], Tensor]) -> Tensor:
        """This process's `count` rows of `generate(count * world)`."""
        return generate(count * self.world)[self.rank :: self.world]

    def randn(self, shape: Sequence[int], device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal noise of `shape`, rows first."""
        return self.local_rows(shape[0], lambda n: torch.randn((n, *shape[1:]), device=device, dtype=dtype))

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise for x (B, ...), in its memory format: the numbers of `torch.randn_like`."""
        if self.world == 1:
            return torch.randn_like(x)
        return torch.randn_like(torch.cat([x] * self.world))[self.rank :: self.world]

    def timesteps(self, count: int, end: int, device: torch.device) -> Tensor:
        """Uniform timesteps (count,) int64 from 0 to end - 1."""
        return self.local_rows(count, lambda n: torch.randint(0, end, (n,), device=device).long())

    def bernoulli(self, count: int, p: float) -> Tensor:
        """Booleans (count,), True with probability p, generated on the CPU."""
        return self.local_rows(count, lambda n: torch.rand(n, device="cpu")) < p

    def sample(self, posterior: DiagonalGaussianDistribution) -> Tensor:
        """A sample (B, ...) of a posterior."""
        return posterior.sample() if self.world == 1 else posterior.sample(self.randn(posterior.mean.shape, "cpu"))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and of `device` inside the context; restore their state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
