"""One-step rules: Euler with and without noise, Heun, DPM-Solver-2. All but the last two ask the network once a step.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithms 1 and 2, written for
x = sqrt(a) x0 + sqrt(1 - a) eps: there a step along eps from one sigma to another is DDIM's.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.models.diffusion.ddim import noisy_transfer
from ldm.models.diffusion.sampler import Run, Sampler, register, transfer
from ldm.models.diffusion.schedules import ddim_sigmas, far, sigma_of


@register("euler")
class EulerSampler(Sampler):
    """Along eps: DDIM without noise, and without drawing any."""

    cfg_pp = True

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One step of algorithm 1 without churn."""
        s = run.schedule
        eps, x0 = self.predict(run, x, s.timesteps[index], s.a[index])
        return transfer(x0, eps, s.a_prev[index]), x0


@register("euler_a")
@register("ddpm")
class AncestralSampler(Sampler):
    """As much noise a step as the diffusion had (Ho et al. 2020, algorithm 2): DDIM with eta 1.

    Euler's ancestral steps, down to less noise than the next level has and up to it again, come to the same.
    """

    default_schedule = "trailing"  # with all steps it is algorithm 2 to the letter
    cfg_pp = True

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One step; the last one, to clean data, adds no noise."""
        s = run.schedule
        a, a_next = float(s.a[index]), float(s.a_prev[index])
        eps, x0 = self.predict(run, x, s.timesteps[index], a)
        return noisy_transfer(run, eps, x0, a_next, float(ddim_sigmas(a, a_next, 1.0))), x0


def along(x: Tensor, eps: Tensor, a: float, a_next: float) -> Tensor:
    """x (B, ...) from level a to a_next along a given eps."""
    return transfer((x - math.sqrt(1 - a) * eps) / math.sqrt(a), eps, a_next)


@register("heun")
class HeunSampler(Sampler):
    """Second order: along the mean of eps at both ends of a step (algorithm 1). Asks twice, but at the last step."""

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One step, or one of Euler's where that is `far`."""
        s = run.schedule
        a, a_next = float(s.a[index]), float(s.a_prev[index])
        eps, x0 = self.predict(run, x, s.timesteps[index], a)
        x_next = transfer(x0, eps, a_next)
        if far(a, a_next):
            return x_next, x0
        eps_next, _ = self.predict(run, x_next, s.time_after(index), a_next)
        return along(x, (eps + eps_next) / 2, a, a_next), x0


@register("dpm2")
class DPM2Sampler(Sampler):
    """Second order: along eps halfway, in log sigma (Lu et al. 2022, DPM-Solver-2). Asks twice, as Heun does."""

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One step, or one of Euler's where that is `far`."""
        s = run.schedule
        a, a_next = float(s.a[index]), float(s.a_prev[index])
        eps, x0 = self.predict(run, x, s.timesteps[index], a)
        if far(a, a_next):
            return transfer(x0, eps, a_next), x0
        sigma_mid = math.sqrt(sigma_of(a) * sigma_of(a_next))
        a_mid, t_mid = 1 / (1 + sigma_mid**2), float(self.levels.time_of(sigma_mid))
        eps_mid, _ = self.predict(run, transfer(x0, eps, a_mid), t_mid, a_mid)
        return along(x, eps_mid, a, a_next), x0
