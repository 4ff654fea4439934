"""LMS: linear multi-step (Adams-Bashforth) steps in sigma, as k-diffusion made them known."""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import Polynomial
from torch import Tensor

from ldm.models.diffusion.sampler import Run, Sampler, register, transfer
from ldm.models.diffusion.schedules import TINY, sigma_of

ORDER = 4
PURE = 1e6 * TINY  # levels below are taken for pure noise, whose sigma is next to infinite


@register("lms")
class LMSSampler(Sampler):
    """Along the polynomial through up to four eps, the newest and those before: one network evaluation a step."""

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One step; `run.history` holds (sigma, eps) of the steps before, the newest last."""
        s = run.schedule
        a, a_next = float(s.a[index]), float(s.a_prev[index])
        eps, x0 = self.predict(run, x, s.timesteps[index], a)
        if a < PURE:  # no polynomial goes through it
            return transfer(x0, eps, a_next), x0
        run.history = [*run.history[1 - ORDER :], (float(sigma_of(a)), eps)]
        weights = integrals([sigma for sigma, _ in run.history], float(sigma_of(a_next)))
        moved = x / math.sqrt(a) + sum(weight * eps for weight, (_, eps) in zip(weights, run.history))
        return math.sqrt(a_next) * moved, x0


def integrals(places: list[float], end: float) -> list[float]:
    """Of each polynomial that is 1 at one of `places` and 0 at the others: the integral from the last to `end`."""
    weights = []
    for i, place in enumerate(places):
        others = [other for j, other in enumerate(places) if j != i]
        basis = (
            Polynomial.fromroots(others) / np.prod([place - other for other in others]) if others else Polynomial([1])
        )
        whole = basis.integ()
        weights.append(float(whole(end) - whole(places[-1])))
    return weights
