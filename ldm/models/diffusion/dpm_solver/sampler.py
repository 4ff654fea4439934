"""DPM-Solver++ 2M (Lu et al. 2022, arXiv:2211.01095)."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import Tensor

from ldm.models.diffusion.sampler import Sampler, SamplerState, add_noise
from ldm.models.diffusion.schedules import FEW_STEPS, ScheduleChoice, Step, log_snr

logger = logging.getLogger(__name__)

MODEL_TYPES = {"eps": "noise", "v": "v", "x0": "x_start"}  # parameterizations in the words of `model_wrapper`


class DPMSolverSampler(Sampler):
    """Second-order multi-step solver of the probability-flow ODE in terms of x0; deterministic."""

    cfg_pp = True
    legacy_public = True

    def __init__(self, model: Any, device: Any = None, **kwargs: Any) -> None:
        super().__init__(model)
        self.register_buffer("alphas_cumprod", model.alphas_cumprod.detach().clone())

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: ScheduleChoice | None = None,
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """See `Sampler.make_schedule`; ddim_eta is accepted, as in the public code, and has no effect."""
        if ddim_eta != 0:
            logger.warning("DPM-Solver++ adds no noise: eta=%g has no effect", ddim_eta)
        super().make_schedule(ddim_num_steps, ddim_discretize, 0.0, verbose)

    def step(self, state: SamplerState, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Algorithm 2; `state.history` holds (lambda, x0) of the step before."""
        eps, x0 = self.predict(state, x, step.t, step.alpha_bar)
        if step.alpha_bar_prev >= 1:
            return x0, x0
        lambda_t = log_snr(step.alpha_bar)
        x_prev = add_noise(x0, eps, step.alpha_bar_prev)
        if state.history and not (step.remaining == 0 and len(state.schedule) < FEW_STEPS):
            (lambda_last, x0_last), h = state.history[0], log_snr(step.alpha_bar_prev) - lambda_t
            slope = (x0 - x0_last) * (h / (lambda_t - lambda_last))
            x_prev = x_prev - math.sqrt(step.alpha_bar_prev) * math.expm1(-h) / 2 * slope
        state.history = [(lambda_t, x0)]
        return x_prev, x0
