"""Further members of the DPM-Solver++ family (Lu et al. 2022, arXiv:2211.01095); `dpmpp_2m` is `DPMSolverSampler`.

They integrate x0 over lambda, half the log signal-to-noise ratio; h is the length of a step in it. Each is written as
the first-order step plus the terms of higher order, so that CFG++ works with it.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.models.diffusion.sampler import Sampler, SamplerState, add_noise, register
from ldm.models.diffusion.schedules import FEW_STEPS, Step, log_snr


@register("dpmpp_3m")
class DPMpp3MSampler(Sampler):
    """Third order, multi-step: one model evaluation a step, and x0 of the two steps before (appendix B)."""

    cfg_pp = True

    def step(self, state: SamplerState, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """`state.history` holds (lambda, x0) of the steps before, the newest first."""
        eps, x0 = self.predict(state, x, step.t, step.alpha_bar)
        x_prev = add_noise(x0, eps, step.alpha_bar_prev)
        lambda_t, history = log_snr(step.alpha_bar), state.history
        if len(state.schedule) < FEW_STEPS:  # a short run ends in lower orders
            history = history[: step.remaining]
        if history and step.alpha_bar_prev < 1:
            h = log_snr(step.alpha_bar_prev) - lambda_t
            lambdas = [lambda_t, *(lambda_i for lambda_i, _ in history)]
            lengths = [(later - earlier) / h for later, earlier in zip(lambdas, lambdas[1:])]
            first, second = derivatives(x0, [x0_i for _, x0_i in history], lengths)
            signal, phi_1 = math.sqrt(step.alpha_bar_prev), math.expm1(-h)
            if second is None:  # as 2M
                x_prev = x_prev - signal * phi_1 / 2 * first
            else:
                phi_2 = phi_1 / h + 1
                x_prev = x_prev + signal * (phi_2 * first - (phi_2 / h - 0.5) * second)
        state.history = [(lambda_t, x0), *state.history[:1]]
        return x_prev, x0


def derivatives(x0: Tensor, history: list[Tensor], r: list[float]) -> tuple[Tensor, Tensor | None]:
    """First and second derivative of x0 in units of the step; r: lengths of the steps before in that unit.

    The second divided difference is half the second derivative. The public code takes it for all of it, which makes its
    third-order rule one of second order.
    """
    slope = (x0 - history[0]) / r[0]
    if len(history) < 2:
        return slope, None
    half_curve = (slope - (history[0] - history[1]) / r[1]) / (r[0] + r[1])
    return slope + r[0] * half_curve, 2 * half_curve


@register("dpmpp_2s")
class DPMpp2SSampler(Sampler):
    """Second order, single-step: evaluates the model at the middle of a step, too (algorithm 1)."""

    cfg_pp = True

    def step(self, state: SamplerState, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """First order to clean data, where lambda is infinite."""
        eps, x0 = self.predict(state, x, step.t, step.alpha_bar)
        x_prev = add_noise(x0, eps, step.alpha_bar_prev)
        if step.alpha_bar_prev >= 1:
            return x_prev, x0
        lambda_t = log_snr(step.alpha_bar)
        h = log_snr(step.alpha_bar_prev) - lambda_t
        sigma_mid = math.exp(-(lambda_t + h / 2))
        alpha_bar_mid, t_mid = 1 / (1 + sigma_mid**2), float(self.levels.sigma_to_t(sigma_mid))
        _, x0_mid = self.predict(state, add_noise(x0, eps, alpha_bar_mid), t_mid, alpha_bar_mid)
        return x_prev - math.sqrt(step.alpha_bar_prev) * math.expm1(-h) * (x0_mid - x0), x0


@register("dpmpp_2m_sde")
class DPMpp2MSDESampler(Sampler):
    """Second order, multi-step, of the diffusion SDE rather than the ODE: with noise (appendix A)."""

    cfg_pp = True

    def step(self, state: SamplerState, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """`state.history` holds (lambda, x0) of the step before."""
        eps, x0 = self.predict(state, x, step.t, step.alpha_bar)
        if step.alpha_bar_prev >= 1:
            return x0, x0
        lambda_t = log_snr(step.alpha_bar)
        h = log_snr(step.alpha_bar_prev) - lambda_t
        signal, sigma = math.sqrt(step.alpha_bar_prev), math.sqrt(1 - step.alpha_bar_prev)
        noise = state.scaled_noise(x, sigma * math.sqrt(-math.expm1(-2 * h)))
        x_prev = signal * x0 + sigma * math.exp(-h) * eps + noise
        if state.history and not (step.remaining == 0 and len(state.schedule) < FEW_STEPS):
            lambda_last, x0_last = state.history[0]
            slope = (x0 - x0_last) * (h / (lambda_t - lambda_last))
            x_prev = x_prev - signal * math.expm1(-2 * h) / 2 * slope
        state.history = [(lambda_t, x0)]
        return x_prev, x0
