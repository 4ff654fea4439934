"""PLMS: pseudo linear multi-step sampling (Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models")."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.guidance import Condition, Guidance
from ldm.models.diffusion.noise import NoiseSource, global_noise
from ldm.models.diffusion.public_sampler import PublicSampler, ddim_update
from ldm.models.diffusion.sampler import Intermediates, batch_of
from ldm.models.diffusion.schedules import ScheduleChoice, is_long_step
from ldm.modules.diffusionmodules.schedule import eps_and_x0
from ldm.modules.diffusionmodules.util import (
    extract_into_tensor,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)

logger = logging.getLogger(__name__)

# Adams-Bashforth weights of the newest and the older eps, by the number of older ones (eq. 12 and appendix).
WEIGHTS = {1: (3 / 2, -1 / 2), 2: (23 / 12, -16 / 12, 5 / 12), 3: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PLMSSampler(PublicSampler):
    """Fourth-order multi-step DDIM, deterministic; the first step evaluates the model twice.

    Args:
        convert_v: convert a v model's output to eps. The public sampler takes v for eps, which spoils the image; the
            default reproduces its numbers. `ldm.inference` sets it.
    """

    def __init__(
        self, model: Any, schedule: str = "linear", device: Any = None, convert_v: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(model, schedule, device)
        if self.parameterization == "v" and not convert_v:
            self.parameterization = "eps"
            logger.warning("PLMS takes this model's v for eps, like the public code: pass convert_v=True to convert it")

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: ScheduleChoice | None = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Register the buffers of a schedule; see `Sampler.make_schedule`. ddim_eta must be 0."""
        self._register_schedule(
            ddim_discretize, ddim_num_steps, ddim_eta, verbose, make_ddim_timesteps, make_ddim_sampling_parameters
        )

    def _sampling(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, list[Tensor]]]:
        return self.plms_sampling(*args, **kwargs)

    @torch.no_grad()
    def plms_sampling(
        self,
        cond: Condition,
        shape: Sequence[int],
        x_T: Tensor | None = None,
        ddim_use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        dynamic_threshold: None = None,
        ucg_schedule: Sequence[float] | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Denoise latents of `shape` (B, C, H, W); timesteps: only the last so many. The rest is as in `sample`."""
        x = self._noise(shape, self.model.device) if x_T is None else x_T
        intermediates = Intermediates(x, callback, img_callback, log_every_t)
        old_eps: list[Tensor] = []
        ascending = self._timesteps(ddim_use_original_steps, timesteps)
        for i, index, t in self._iterate(ascending, x):
            x = self._blend(x, t, index, ddim_use_original_steps, mask, x0)
            x, pred_x0, eps = self.p_sample_plms(
                x,
                cond,
                t,
                index=index,
                use_original_steps=ddim_use_original_steps,
                quantize_denoised=quantize_denoised,
                temperature=temperature,
                noise_dropout=noise_dropout,
                score_corrector=score_corrector,
                corrector_kwargs=corrector_kwargs,
                unconditional_guidance_scale=unconditional_guidance_scale if ucg_schedule is None else ucg_schedule[i],
                unconditional_conditioning=unconditional_conditioning,
                old_eps=old_eps,
                t_next=batch_of(ascending[max(index - 1, 0)], x),
                **({} if dynamic_threshold is None else {"dynamic_threshold": dynamic_threshold}),
            )
            old_eps = [*old_eps[-2:], eps]
            intermediates.record(x, pred_x0, i, index)
        return x, intermediates.images

    @torch.no_grad()
    def p_sample_plms(
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
        old_eps: list[Tensor] | None = None,
        t_next: Tensor | None = None,
        dynamic_threshold: None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One PLMS step of x (B, C, H, W) at timesteps t (B,), entry `index` of the schedule.

        old_eps: up to three eps of the steps before, the newest last. t_next: the timesteps (B,) after this step, where
        the first step evaluates the model again.

        Returns:
            (x_{t-1}, predicted x_0, eps), each (B, C, H, W).
        """
        if dynamic_threshold is not None:
            raise ValueError("dynamic_threshold is not supported: use the guidance term `threshold`")
        schedule = self._schedule(use_original_steps)
        alpha_bar, alpha_bar_prev, sigma = self._levels_at(index, use_original_steps)

        def predict_eps(x: Tensor, t: Tensor, index: int) -> Tensor:
            host_alpha_bar = float(schedule.alphas_cumprod[index])
            scale, uncond = unconditional_guidance_scale, unconditional_conditioning
            output, _ = self._guided(x, c, t, host_alpha_bar, scale, uncond, score_corrector, corrector_kwargs)
            return eps_and_x0(output, x, self._levels_at(index, use_original_steps)[0], self.parameterization)[0]

        def step_along(eps: Tensor) -> tuple[Tensor, Tensor]:
            _, pred_x0 = eps_and_x0(eps, x, alpha_bar, "eps")
            if quantize_denoised:
                pred_x0 = self._quantize(pred_x0)
            noise = self._scaled_noise(eps, sigma, temperature, noise_dropout, repeat_noise, noise_like)
            return ddim_update(pred_x0, eps, alpha_bar_prev, sigma, noise), pred_x0

        eps = predict_eps(x, t, index)
        if old_eps:
            weights = WEIGHTS[min(len(old_eps), 3)]
            mean = sum((w * e for w, e in zip(weights[1:], reversed(old_eps))), weights[0] * eps)
        elif is_long_step(schedule.alphas_cumprod[index], schedule.alphas_cumprod_prev[index]):
            mean = eps  # never in a published schedule
        else:  # improved Euler: the mean of eps at both ends of the step
            x_prev, _ = step_along(eps)
            t_next = t if t_next is None else t_next
            mean = (eps + predict_eps(x_prev, t_next, max(index - 1, 0))) / 2
        return *step_along(mean), eps

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor | int, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise x0 (B, ...) to entry t of the schedule, as `DDIMSampler.stochastic_encode`."""
        return self._noise_to(x0, t, use_original_steps, noise, extract_into_tensor)

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Condition,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        use_original_steps: bool = False,
        callback: Callable[[int], None] | None = None,
        verbose: bool = True,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        *,
        guidance: Guidance | None = None,
        noise: NoiseSource = global_noise,
        img_callback: Callable[[Tensor, int], None] | None = None,
    ) -> Tensor:
        """Denoise x_latent (B, C, H, W) along the last `t_start` steps; see `Sampler.decode`."""
        self._check_mask(mask, x0)
        guidance = guidance or Guidance(unconditional_guidance_scale)
        scales = guidance.over(len(self._timesteps(use_original_steps, t_start))).scales
        with self._run(guidance, noise, verbose):
            x, _ = self.plms_sampling(
                cond,
                x_latent.shape,
                x_T=x_latent,
                ddim_use_original_steps=use_original_steps,
                callback=callback,
                timesteps=t_start,
                mask=mask,
                x0=x0,
                img_callback=img_callback,
                unconditional_guidance_scale=scales[0],
                unconditional_conditioning=unconditional_conditioning,
                ucg_schedule=scales if len(scales) > 1 else None,
            )
        return x
