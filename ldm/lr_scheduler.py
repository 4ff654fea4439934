"""Learning-rate multipliers as functions of the step, for `torch.optim.lr_scheduler.LambdaLR`."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class LambdaWarmUpCosineScheduler2:
    """Cycles of a linear warm-up from f_start to f_max and a cosine decay to f_min, for a base rate of about 1e-4.

    All arguments have one entry per cycle; lengths are in steps. After the last cycle the multiplier stays constant.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ) -> None:
        lengths = {len(x) for x in (warm_up_steps, f_min, f_max, f_start, cycle_lengths)}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError("warm_up_steps, f_min, f_max, f_start and cycle_lengths need one entry per cycle each")
        self.lr_warm_up_steps = list(warm_up_steps)
        self.f_min, self.f_max, self.f_start = list(f_min), list(f_max), list(f_start)
        self.cycle_lengths = list(cycle_lengths)
        self.cum_cycles = [0, *accumulate(self.cycle_lengths)]

    def find_in_interval(self, n: int) -> int:
        """The cycle of step `n`; the last one for all later steps."""
        return min(max(bisect_left(self.cum_cycles, n) - 1, 0), len(self.cycle_lengths) - 1)

    def decay(self, cycle: int, n: int) -> float:
        """Multiplier at step `n` of a cycle, after its warm-up."""
        warm_up = self.lr_warm_up_steps[cycle]
        t = min((n - warm_up) / (self.cycle_lengths[cycle] - warm_up), 1.0)
        return self.f_min[cycle] + 0.5 * (self.f_max[cycle] - self.f_min[cycle]) * (1 + math.cos(t * math.pi))

    def schedule(self, n: int, **kwargs: object) -> float:
        """Multiplier at step `n`."""
        cycle = self.find_in_interval(n)
        n = min(n - self.cum_cycles[cycle], self.cycle_lengths[cycle])
        warm_up = self.lr_warm_up_steps[cycle]
        if n < warm_up:
            return (self.f_max[cycle] - self.f_start[cycle]) / warm_up * n + self.f_start[cycle]
        return self.decay(cycle, n)

    def __call__(self, n: int, **kwargs: object) -> float:
        """Multiplier at step `n`."""
        return self.schedule(n, **kwargs)


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """Cycles with a linear decay."""

    def decay(self, cycle: int, n: int) -> float:
        """Multiplier at step `n` of a cycle, after its warm-up."""
        length = self.cycle_lengths[cycle]
        return self.f_min[cycle] + (self.f_max[cycle] - self.f_min[cycle]) * (length - n) / length


class LambdaWarmUpCosineScheduler(LambdaWarmUpCosineScheduler2):
    """One cycle: linear warm-up from lr_start to lr_max, cosine decay to lr_min at step `max_decay_steps`."""

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ) -> None:
        super().__init__([warm_up_steps], [lr_min], [lr_max], [lr_start], [max_decay_steps], verbosity_interval)
