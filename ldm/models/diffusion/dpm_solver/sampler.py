"""DPM-Solver++ 2M.

Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models".
"""

from __future__ import annotations

import logging
import math

from torch import Tensor

from ldm.models.diffusion.sampler import Choice, Run, Sampler, register, transfer
from ldm.models.diffusion.schedules import Schedule

logger = logging.getLogger(__name__)

FEW_STEPS = 15  # below this many steps the last one is first order, which is stabler (as published)


@register("dpm_solver")
@register("dpmpp_2m")
class DPMSolverSampler(Sampler):
    """Second-order multi-step solver of the probability-flow ODE in terms of x0; deterministic."""

    cfg_pp = True

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: Choice | None = None,
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """As of every sampler, but eta is accepted, as published, and has no effect."""
        if ddim_eta != 0:
            logger.warning("DPM-Solver++ adds no noise: eta=%g has no effect", ddim_eta)
        super().make_schedule(ddim_num_steps, ddim_discretize, 0.0, verbose)

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One DPM-Solver++ update (algorithm 2); `run.history` holds the x0 of the step before."""
        s = run.schedule
        eps, x0 = self.predict(run, x, s.timesteps[index], s.a[index])
        if s.a_prev[index] >= 1:
            return x0, x0
        x_next = transfer(x0, eps, s.a_prev[index])
        if run.history and not (index == 0 and len(s) < FEW_STEPS):
            h, (h_before,) = steps_in_log_snr(s, index, 1)
            slope = (x0 - run.history[-1]) * (h / h_before)
            x_next = x_next - math.sqrt(s.a_prev[index]) * math.expm1(-h) / 2 * slope
        run.history = [x0]
        return x_next, x0


def steps_in_log_snr(schedule: Schedule, index: int, before: int) -> tuple[float, list[float]]:
    """The lengths in `log_snr` of step `index` and of as many steps before it as asked for, the latest first."""
    ends = [schedule.a_prev[index], *schedule.a[index : index + before + 1]]
    logs = [log_snr(a) for a in ends]
    h, *earlier = (later - sooner for later, sooner in zip(logs, logs[1:]))
    return h, earlier


def log_snr(a: float) -> float:
    """lambda = log(sqrt(a) / sqrt(1 - a)), half the log signal-to-noise ratio."""
    return 0.5 * (math.log(a) - math.log1p(-a))
