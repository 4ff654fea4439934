"""DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models")."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.guidance import Condition, Guidance
from ldm.models.diffusion.sampler import Run, Sampler, register, transfer


def ddim_update(run: Run, eps: Tensor, x0: Tensor, index: int) -> Tensor:
    """x at the level after step `index`, given eps and x0 (B, ...)."""
    return noisy_transfer(run, eps, x0, float(run.schedule.a_prev[index]), float(run.schedule.sigma[index]))


def noisy_transfer(run: Run, eps: Tensor, x0: Tensor, a: float, sigma: float) -> Tensor:
    """x at level a, made up of x0 and eps (B, ...), where noise of standard deviation sigma is new (eq. 12)."""
    direction = math.sqrt(max(1.0 - a - sigma**2, 0.0)) * eps
    return math.sqrt(a) * x0 + direction + run.added(eps, sigma)


@register("ddim")
class DDIMSampler(Sampler):
    """The default sampler; with eta = 1 and every timestep it is ancestral sampling."""

    supports_eta = True
    default_schedule = "uniform"
    cfg_pp = True
    published = True

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One DDIM update."""
        eps, x0 = self.predict(run, x, run.schedule.timesteps[index], run.schedule.a[index])
        return ddim_update(run, eps, x0, index), x0

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        index: int,
        repeat_noise: bool = False,
        use_original_steps: bool = False,
        quantize_denoised: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
    ) -> tuple[Tensor, Tensor]:
        """(next x, predicted x0) of schedule entry `index`, the network asked at t (B,), one number for the batch."""
        schedule = self._select(use_original_steps)
        timesteps = schedule.timesteps.copy()
        timesteps[index] = int(t.flatten()[0])
        run = self._run(
            replace(schedule, timesteps=timesteps),
            c,
            unconditional_conditioning,
            Guidance(unconditional_guidance_scale),
            temperature=temperature,
            noise_dropout=noise_dropout,
            repeat_noise=repeat_noise,
            quantize=self._quantize if quantize_denoised else None,
            correct=self._corrector(score_corrector, c, corrector_kwargs),
        )
        return self.step(run, x, index)

    @torch.no_grad()
    def encode(
        self,
        x0: Tensor,
        c: Condition,
        t_enc: int,
        use_original_steps: bool = False,
        return_intermediates: int | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        callback: Callable[[int], None] | None = None,
        verbose: bool = True,
        schedule_timesteps: bool = False,
        guidance: Guidance | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """DDIM inversion: walk x0 (B, C, H, W) up the first `t_enc` steps of the schedule.

        schedule_timesteps: ask the network at the timesteps of the schedule. The published code asks at 0, 1, 2 ...,
        the indices of the steps; that is the default here only so that its published numbers come out.

        Returns the noisy latent and {"x_encoded", "intermediate_steps", "intermediates"}; the last is filled with
        about `return_intermediates` latents.
        """
        schedule = self._select(use_original_steps)
        if not 0 <= t_enc <= len(schedule):
            raise ValueError(f"t_enc must be from 0 to the schedule's {len(schedule)} steps, not {t_enc}")
        run = self._run(schedule, c, unconditional_conditioning, guidance or Guidance(unconditional_guidance_scale))
        every = max(t_enc // return_intermediates, 1) if return_intermediates else None
        x, kept, kept_steps = x0, [], []
        for i in tqdm(range(t_enc), desc="DDIM inversion", disable=not verbose):
            a, a_next = float(schedule.a_prev[i]), float(schedule.a[i])
            run.step = len(schedule) - 1 - i  # of a run the other way, whose scale this takes
            # A step down from x_next is from the guided eps on along the other one, if they differ (CFG++). Both are
            # asked for as of x_next, at its level and timestep; x stands in for it.
            onward, x0 = self.predict(run, x, schedule.timesteps[i] if schedule_timesteps else i, a_next)
            eps = (x - math.sqrt(a_next) * x0) / math.sqrt(1 - a_next)
            x = transfer((x - math.sqrt(1 - a) * onward) / math.sqrt(a), eps, a_next)
            if every and (i % every == 0 or i >= t_enc - 2):
                kept.append(x)
                kept_steps.append(i)
            if callback:
                callback(i)
        out = {"x_encoded": x, "intermediate_steps": kept_steps}
        return x, out | ({"intermediates": kept} if every else {})
