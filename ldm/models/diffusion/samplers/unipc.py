"""UniPC (Zhao et al. 2023, arXiv:2302.04867): a predictor, and a corrector that needs no further evaluation."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampler import Sampler, SamplerState, register
from ldm.models.diffusion.schedules import Step, log_snr

ORDER = 2  # of the predictor; the corrector has one more

Points = tuple[tuple[float, Tensor], ...]  # (lambda, x0), the newest first


class _Taken(NamedTuple):
    """The step before: from x at alpha_bar, whose x0 is the first of `points`."""

    x: Tensor
    alpha_bar: float
    points: Points


@register("unipc")
class UniPCSampler(Sampler):
    """UniPC-2 with B(h) = e^h - 1 in terms of x0: one evaluation a step, third order with the corrector."""

    def step(self, state: SamplerState, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Correct x by its own x0, then predict the next; `state.history` holds the last `_Taken`."""
        _, x0 = self.predict(state, x, step.t, step.alpha_bar)
        point = (log_snr(step.alpha_bar), x0)
        points: Points = ()
        if state.history:
            (last,) = state.history
            x = unipc_update(last.x, last.alpha_bar, step.alpha_bar, last.points, point)
            points = last.points
        if step.alpha_bar_prev >= 1:
            return x0, x0
        points = (point, *points)[:ORDER]
        state.history = [_Taken(x, step.alpha_bar, points)]
        # a run ends in lower orders, which is more stable
        return unipc_update(x, step.alpha_bar, step.alpha_bar_prev, points[: step.remaining + 1]), x0


def unipc_update(
    x: Tensor, alpha_bar: float, alpha_bar_prev: float, points: Points, arrived: tuple[float, Tensor] | None = None
) -> Tensor:
    """x (B, ...) from alpha_bar to alpha_bar_prev (eq. 3 and 9).

    points: x0 at alpha_bar and before; arrived: x0 at alpha_bar_prev, for the corrector.
    """
    (lambda_t, x0), *earlier = points
    h = log_snr(alpha_bar_prev) - lambda_t
    others = [*earlier, *([arrived] if arrived else [])]
    r = np.array([(lambda_i - lambda_t) / h for lambda_i, _ in others])
    signal_phi = math.sqrt(alpha_bar_prev) * math.expm1(-h)
    x_prev = math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * x - signal_phi * x0
    for weight, r_i, (_, x0_i) in zip(coefficients(r, h), r, others):
        x_prev = x_prev - signal_phi * (weight / r_i) * (x0_i - x0)
    return x_prev


def coefficients(r: np.ndarray, h: float) -> np.ndarray:
    """Weights of the differences of x0 that integrate all polynomials of their degree exactly (eq. 5)."""
    count = len(r)
    if count == 1:
        return np.array([0.5])  # theorem 3.1: the simpler weight has the same order
    phi, factorial, b = math.expm1(-h) / -h - 1, 1.0, []
    for k in range(1, count + 1):
        factorial *= k
        b.append(phi * factorial / math.expm1(-h))
        phi = phi / -h - 1 / (factorial * (k + 1))
    return np.linalg.solve(np.vander(r, count, increasing=True).T, np.array(b))
