"""DPM-Solver++ 2M.

Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models".
"""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from torch import Tensor

from ldm.models.diffusion.sampler import Run, Sampler, Schedule

logger = logging.getLogger(__name__)

FEW_STEPS = 15  # below this many steps the last one is first order, which is stabler (as published)


class DPMSolverSampler(Sampler):
    """Second-order multi-step solver of the probability-flow ODE in terms of x0; deterministic.

    Time is continuous: S + 1 points evenly from the schedule's last timestep to its first, most of them fractional.
    As published, eta and the discretisation are accepted and have no effect.
    """

    def _lay_out(self, steps: int, discretize: str, eta: float) -> Schedule:
        if eta != 0:
            logger.warning("DPM-Solver++ adds no noise: eta=%g has no effect", eta)
        nodes = np.linspace(0, self.ddpm_num_timesteps - 1, steps + 1)
        # Between timesteps log alpha is linear. Where a schedule ends in pure noise, a trace of signal stands for none.
        log_a = np.log(np.maximum(self._alphas_cumprod(), 1e-20))
        a = np.exp(np.interp(nodes, np.arange(self.ddpm_num_timesteps), log_a))
        return Schedule(nodes[1:], a[1:], a[:-1], sigma=np.zeros(steps))

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One DPM-Solver++ update (algorithm 2); `run.history` holds the x0 of the step before."""
        s = run.schedule
        _, x0 = self.predict(run, x, s.timesteps[index], s.a[index])
        if run.keep:  # fresh noise under a mask would otherwise be extrapolated from step to step
            x0 = run.keep(x0)
        if s.a_prev[index] >= 1:  # all of the model's timesteps end at the data itself
            return x0, x0
        target = x0
        first_order = not run.history or (index == 0 and len(s) < FEW_STEPS)
        lambda_now, lambda_next = log_snr(s.a[index]), log_snr(s.a_prev[index])
        h = lambda_next - lambda_now
        if not first_order:
            r = (lambda_now - log_snr(s.a[index + 1])) / h
            target = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * run.history[-1]
        run.history = [x0]
        sigma_ratio = math.sqrt((1 - s.a_prev[index]) / (1 - s.a[index]))
        return sigma_ratio * x - math.sqrt(s.a_prev[index]) * math.expm1(-h) * target, x0

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor | int, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise x0 to where `decode(..., t)` starts.

        The public off-by-one of DDIM's image-to-image is not repeated: no public code used this solver for it.
        """
        return super().stochastic_encode(x0, torch.as_tensor(t) - 1, use_original_steps, noise)


def log_snr(a: float) -> float:
    """lambda = log(sqrt(a) / sqrt(1 - a)), half the log signal-to-noise ratio."""
    return 0.5 * (math.log(a) - math.log1p(-a))
