"""Further members of the DPM-Solver++ family (Lu et al. 2022, arXiv:2211.01095); `dpmpp_2m` is `DPMSolverSampler`.

They integrate x0 against the half log signal-to-noise ratio lambda; h is a step's length in it. All are written as the
first-order step and what higher orders add, so that CFG++ works with them.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.models.diffusion.dpm_solver.sampler import FEW_STEPS, log_snr, steps_in_log_snr
from ldm.models.diffusion.sampler import Run, Sampler, register, transfer


@register("dpmpp_3m")
class DPMpp3MSampler(Sampler):
    """Third order, multi-step: one network evaluation a step, and the x0 of two steps before (their appendix B)."""

    cfg_pp = True

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One step; `run.history` holds x0 of the steps before, the newest first."""
        s = run.schedule
        a_next = float(s.a_prev[index])
        eps, x0 = self.predict(run, x, s.timesteps[index], s.a[index])
        x_next = transfer(x0, eps, a_next)
        history = run.history[:index] if len(s) < FEW_STEPS else run.history  # a short run ends in lower orders
        if history and a_next < 1:
            h, before = steps_in_log_snr(s, index, len(history))
            one, two = derivatives(x0, history, [b / h for b in before])
            phi_1 = math.expm1(-h)
            if two is None:  # the second step is one of 2M
                x_next = x_next - math.sqrt(a_next) * phi_1 / 2 * one
            else:
                phi_2 = phi_1 / h + 1
                x_next = x_next + math.sqrt(a_next) * (phi_2 * one - (phi_2 / h - 0.5) * two)
        run.history = [x0, *run.history[:1]]
        return x_next, x0


def derivatives(x0: Tensor, history: list[Tensor], r: list[float]) -> tuple[Tensor, Tensor | None]:
    """First and second derivative of x0 in steps' lengths; r: the lengths of the steps before in that of this one.

    A second divided difference is half a derivative. The published code takes it for a whole one, which leaves its rule
    of third order one of second.
    """
    slope = (x0 - history[0]) / r[0]
    if len(history) < 2:
        return slope, None
    half_curve = (slope - (history[0] - history[1]) / r[1]) / (r[0] + r[1])
    return slope + r[0] * half_curve, 2 * half_curve


@register("dpmpp_2s")
class DPMpp2SSampler(Sampler):
    """Second order, single-step: asks a second time in the middle of a step, and remembers nothing (algorithm 1)."""

    cfg_pp = True

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One step; to clean data, where the middle is nowhere, one of first order."""
        s = run.schedule
        a, a_next = float(s.a[index]), float(s.a_prev[index])
        eps, x0 = self.predict(run, x, s.timesteps[index], a)
        x_next = transfer(x0, eps, a_next)
        if a_next >= 1:
            return x_next, x0
        h = log_snr(a_next) - log_snr(a)
        sigma_mid = math.exp(-(log_snr(a) + h / 2))
        a_mid, t_mid = 1 / (1 + sigma_mid**2), float(self.levels.time_of(sigma_mid))
        _, x0_mid = self.predict(run, transfer(x0, eps, a_mid), t_mid, a_mid)
        return x_next - math.sqrt(a_next) * math.expm1(-h) * (x0_mid - x0), x0


@register("dpmpp_2m_sde")
class DPMpp2MSDESampler(Sampler):
    """Second order, multi-step, of the diffusion itself and not of its flow: with noise (their appendix A)."""

    cfg_pp = True

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One step; `run.history` holds the x0 of the step before."""
        s = run.schedule
        a_next = float(s.a_prev[index])
        eps, x0 = self.predict(run, x, s.timesteps[index], s.a[index])
        if a_next >= 1:
            return x0, x0
        h, before = steps_in_log_snr(s, index, len(run.history))
        signal, noise = math.sqrt(a_next), math.sqrt(1 - a_next)
        fresh = run.added(x, noise * math.sqrt(-math.expm1(-2 * h)))
        x_next = signal * x0 + noise * math.exp(-h) * eps + fresh
        if run.history and not (index == 0 and len(s) < FEW_STEPS):
            slope = (x0 - run.history[0]) * (h / before[0])
            x_next = x_next - signal * math.expm1(-2 * h) / 2 * slope
        run.history = [x0]
        return x_next, x0
