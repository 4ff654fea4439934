"""Samplers that step along eps: Euler with and without noise, Heun, DPM-Solver-2, LMS.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithms 1 and 2, written for
x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps: an Euler step in their sigma is a deterministic DDIM step.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import Polynomial
from torch import Tensor

from ldm.models.diffusion.sampler import Sampler, SamplerState, add_noise, ddim_step, register
from ldm.models.diffusion.schedules import Step, is_long_step, sigma_from_alpha_bar
from ldm.modules.diffusionmodules.schedule import MIN_ALPHA_BAR, ddim_sigmas

LMS_ORDER = 4
PURE_NOISE = 1e6 * MIN_ALPHA_BAR  # alpha_bar below this counts as pure noise, whose sigma is next to infinite


@register("euler")
class EulerSampler(Sampler):
    """Algorithm 1 without churn: DDIM without noise."""

    cfg_pp = True

    def step(self, state: SamplerState, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """One model evaluation a step."""
        eps, x0 = self.predict(state, x, step.t, step.alpha_bar)
        return add_noise(x0, eps, step.alpha_bar_prev), x0


@register("euler_a")
@register("ddpm")
class AncestralSampler(Sampler):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), which is DDIM with eta 1 and Euler's ancestral step."""

    default_schedule = "trailing"  # with every timestep this is algorithm 2 exactly
    cfg_pp = True

    def step(self, state: SamplerState, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """The last step, to clean data, adds no noise."""
        eps, x0 = self.predict(state, x, step.t, step.alpha_bar)
        sigma = float(ddim_sigmas(step.alpha_bar, step.alpha_bar_prev, 1.0))
        direction = math.sqrt(max(1 - step.alpha_bar_prev - sigma**2, 0.0)) * eps
        return math.sqrt(step.alpha_bar_prev) * x0 + direction + state.scaled_noise(x, sigma), x0


@register("heun")
class HeunSampler(Sampler):
    """Second order: along the mean of eps at both ends of a step (algorithm 1); two evaluations, but one at the end."""

    def step(self, state: SamplerState, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """An Euler step where that is too long."""
        eps, x0 = self.predict(state, x, step.t, step.alpha_bar)
        x_prev = add_noise(x0, eps, step.alpha_bar_prev)
        if is_long_step(step.alpha_bar, step.alpha_bar_prev):
            return x_prev, x0
        eps_prev, _ = self.predict(state, x_prev, step.t_prev, step.alpha_bar_prev)
        return ddim_step(x, (eps + eps_prev) / 2, step.alpha_bar, step.alpha_bar_prev), x0


@register("dpm2")
class DPM2Sampler(Sampler):
    """DPM-Solver-2 (Lu et al. 2022): along eps at the middle of a step in log sigma; two evaluations like Heun."""

    def step(self, state: SamplerState, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """An Euler step where that is too long."""
        eps, x0 = self.predict(state, x, step.t, step.alpha_bar)
        if is_long_step(step.alpha_bar, step.alpha_bar_prev):
            return add_noise(x0, eps, step.alpha_bar_prev), x0
        sigma_mid = math.sqrt(sigma_from_alpha_bar(step.alpha_bar) * sigma_from_alpha_bar(step.alpha_bar_prev))
        alpha_bar_mid, t_mid = 1 / (1 + sigma_mid**2), float(self.levels.sigma_to_t(sigma_mid))
        eps_mid, _ = self.predict(state, add_noise(x0, eps, alpha_bar_mid), t_mid, alpha_bar_mid)
        return ddim_step(x, eps_mid, step.alpha_bar, step.alpha_bar_prev), x0


@register("lms")
class LMSSampler(Sampler):
    """Linear multi-step: integrate the polynomial in sigma through up to four eps (Adams-Bashforth)."""

    def step(self, state: SamplerState, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """`state.history` holds (sigma, eps) of the steps before, the newest last."""
        eps, x0 = self.predict(state, x, step.t, step.alpha_bar)
        if step.alpha_bar < PURE_NOISE:  # no polynomial reaches an infinite sigma
            return add_noise(x0, eps, step.alpha_bar_prev), x0
        state.history = [*state.history[1 - LMS_ORDER :], (float(sigma_from_alpha_bar(step.alpha_bar)), eps)]
        weights = lms_weights([sigma for sigma, _ in state.history], float(sigma_from_alpha_bar(step.alpha_bar_prev)))
        moved = x / math.sqrt(step.alpha_bar) + sum(weight * eps for weight, (_, eps) in zip(weights, state.history))
        return math.sqrt(step.alpha_bar_prev) * moved, x0


def lms_weights(sigmas: list[float], end: float) -> list[float]:
    """Integrals from the last of `sigmas` to `end` of the Lagrange polynomials on them."""
    weights = []
    for i, sigma in enumerate(sigmas):
        others = [other for j, other in enumerate(sigmas) if j != i]
        basis = Polynomial.fromroots(others) if others else Polynomial([1])
        integral = (basis / np.prod([sigma - other for other in others])).integ()
        weights.append(float(integral(end) - integral(sigmas[-1])))
    return weights
