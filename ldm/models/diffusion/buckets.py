"""Losses by timestep: where along the noise levels a model is good."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class TimestepBuckets:
    """Means of per-item losses over equal ranges of timesteps, gathered over batches (and processes)."""

    def __init__(self, num_timesteps: int, count: int = 10) -> None:
        self.num_timesteps = num_timesteps
        self.count = min(count, num_timesteps)
        self.totals: dict[str, Tensor] = {}  # by suffix: (2, count), the sums and how many

    def add(self, suffix: str, t: Tensor, errors: Tensor) -> None:
        """Count the losses `errors` (B,) of items at timesteps t (B,)."""
        index = t * self.count // self.num_timesteps
        values = torch.stack([errors.detach(), torch.ones_like(errors)]).float()  # (2, B)
        totals = self.totals.setdefault(suffix, values.new_zeros(2, self.count))
        totals.index_add_(1, index, values)

    def means(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Mean losses by "t000-099" and suffix, but for ranges without an item; starts afresh.

        reduce_sum: adds a tensor up over all processes, so that all of them see the same ranges.
        """
        means = {}
        for suffix, totals in self.totals.items():
            sums, counts = reduce_sum(totals)
            for i in torch.nonzero(counts).flatten().tolist():
                means[f"{self._name(i)}{suffix}"] = sums[i] / counts[i]
        self.totals = {}
        return means

    def _name(self, index: int) -> str:
        # the timesteps t with t * count // num_timesteps == index
        first, after = (-(-i * self.num_timesteps // self.count) for i in (index, index + 1))
        digits = len(str(self.num_timesteps - 1))
        return f"t{first:0{digits}}-{after - 1:0{digits}}"
