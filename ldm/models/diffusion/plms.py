"""PLMS: pseudo linear multi-step sampling (Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models")."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ldm.models.diffusion.ddim import ddim_update
from ldm.models.diffusion.sampler import Run, Sampler, register
from ldm.models.diffusion.schedules import far
from ldm.modules.diffusionmodules.schedule import eps_and_x0

# Adams-Bashforth weights of the newest and the older eps, by how many older ones there are (eq. 12 and appendix).
WEIGHTS = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}

logger = logging.getLogger(__name__)


@register("plms", convert_v=True)
class PLMSSampler(Sampler):
    """Fourth-order multi-step update of eps in DDIM's transfer; deterministic. The first step asks the network twice.

    convert_v: see v-prediction networks for what they are. The published sampler takes their v for eps, which spoils
    the picture; that is the default here only so that its published numbers come out. `ldm.inference` sets it.
    """

    default_schedule = "uniform"
    published = True

    def __init__(self, model: Any, schedule: str = "linear", device: Any = None, convert_v: bool = False) -> None:
        super().__init__(model, schedule, device)
        if self.parameterization == "v" and not convert_v:
            self.parameterization = "eps"
            logger.warning("PLMS takes this model's v for eps, as published; PLMSSampler(convert_v=True) does it right")

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One PLMS update; `run.history` holds up to three earlier eps, the newest last."""
        schedule = run.schedule
        a = float(schedule.a[index])
        eps, x0 = self.predict(run, x, schedule.timesteps[index], a)
        if not run.history and far(a, float(schedule.a_prev[index])):  # as in no published schedule
            return ddim_update(run, eps, x0, index), x0
        if run.history:
            older = reversed(run.history[-3:])
            weights = WEIGHTS[min(len(run.history), 3)]
            combined = sum((w * e for w, e in zip(weights[1:], older)), weights[0] * eps)
        else:
            # Improved Euler: average with eps at the next point. The schedule's last timestep stands in past its end.
            x_next = ddim_update(run, eps, x0, index)
            after = max(index - 1, 0)
            a_after = float(schedule.a[after])
            combined = (eps + self.predict(run, x_next, schedule.timesteps[after], a_after)[0]) / 2
        run.history = [*run.history[-2:], eps]
        _, x0 = eps_and_x0(combined, x, a, "eps")
        return ddim_update(run, combined, run.quantize(x0) if run.quantize else x0, index), x0
