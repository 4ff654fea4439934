"""UniPC (Zhao et al. 2023, arXiv:2302.04867): a predictor, and a corrector that costs no further evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldm.models.diffusion.dpm_solver.sampler import log_snr
from ldm.models.diffusion.sampler import Run, Sampler, register

ORDER = 2  # of the predictor; the corrector adds one


@dataclass(frozen=True)
class _Step:
    """A step that was taken: from x at level a, whose x0 is the first of `known`; the others lie before it."""

    x: Tensor
    a: float
    known: tuple[tuple[float, Tensor], ...]  # (lambda, x0), the newest first


@register("unipc")
class UniPCSampler(Sampler):
    """UniPC-2 with B(h) = e^h - 1, in terms of x0: one network evaluation a step, third order with the corrector."""

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """Correct x by what the network says of it, then predict the next; `run.history` holds the last `_Step`."""
        s = run.schedule
        a, a_next = float(s.a[index]), float(s.a_prev[index])
        _, x0 = self.predict(run, x, s.timesteps[index], a)
        here = log_snr(a)
        known: tuple[tuple[float, Tensor], ...] = ()
        if run.history:
            (last,) = run.history
            x = unified(last.x, last.a, a, last.known, (here, x0))
            known = last.known
        if a_next >= 1:
            return x0, x0
        known = ((here, x0), *known)[:ORDER]
        run.history = [_Step(x, a, known)]
        left = index + 1  # a run ends in lower orders, which is stabler
        return unified(x, a, a_next, known[:left]), x0


def unified(
    x: Tensor,
    a: float,
    a_next: float,
    known: tuple[tuple[float, Tensor], ...],
    arrived: tuple[float, Tensor] | None = None,
) -> Tensor:
    """x (B, ...) from level a to a_next by the x0 known at a, before, and at a_next if it `arrived` (eq. 3 and 9)."""
    (here, x0), *earlier = known
    h = log_snr(a_next) - log_snr(a)
    others = [*earlier, *([arrived] if arrived else [])]
    places = np.array([(place - here) / h for place, _ in others])
    weights = coefficients(places, h)
    signal = math.sqrt(a_next)
    x_next = math.sqrt((1 - a_next) / (1 - a)) * x - signal * math.expm1(-h) * x0
    for weight, place, (_, value) in zip(weights, places, others):
        x_next = x_next - signal * math.expm1(-h) * (weight / place) * (value - x0)
    return x_next


def coefficients(places: np.ndarray, h: float) -> np.ndarray:
    """How much each difference of x0 counts, so that all polynomials of that degree are integrated exactly (eq. 5)."""
    count = len(places)
    if count == 1:
        return np.array([0.5])  # theorem 3.1: the simpler weight is of the same order
    phi, factorial, wanted = math.expm1(-h) / -h - 1, 1.0, []
    for k in range(1, count + 1):
        factorial *= k
        wanted.append(phi * factorial / math.expm1(-h))
        phi = phi / -h - 1 / (factorial * (k + 1))
    return np.linalg.solve(np.vander(places, count, increasing=True).T, np.array(wanted))
