"""DDIM (Song et al. 2021, "Denoising Diffusion Implicit Models")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.guidance import Condition, Guidance
from ldm.models.diffusion.noise import NoiseSource, global_noise
from ldm.models.diffusion.public_sampler import Level, PublicSampler, ddim_update
from ldm.models.diffusion.sampler import Intermediates, add_noise, progress_bar
from ldm.models.diffusion.schedules import ScheduleChoice
from ldm.modules.diffusionmodules.schedule import eps_and_x0
from ldm.modules.diffusionmodules.util import (
    extract_into_tensor,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
)


class DDIMSampler(PublicSampler):
    """The default sampler; with eta = 1 and every timestep it is ancestral sampling."""

    supports_eta = True
    cfg_pp = True

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: ScheduleChoice | None = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Register the buffers of a schedule; see `Sampler.make_schedule`."""
        self._register_schedule(
            ddim_discretize, ddim_num_steps, ddim_eta, verbose, make_ddim_timesteps, make_ddim_sampling_parameters
        )

    def _sampling(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, list[Tensor]]]:
        return self.ddim_sampling(*args, **kwargs)

    @torch.no_grad()
    def ddim_sampling(
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
        for i, index, t in self._iterate(self._timesteps(ddim_use_original_steps, timesteps), x):
            x = self._blend(x, t, index, ddim_use_original_steps, mask, x0)
            x, pred_x0 = self.p_sample_ddim(
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
                **({} if dynamic_threshold is None else {"dynamic_threshold": dynamic_threshold}),
            )
            intermediates.record(x, pred_x0, i, index)
        return x, intermediates.images

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
        dynamic_threshold: None = None,
    ) -> tuple[Tensor, Tensor]:
        """One DDIM step of x (B, C, H, W) at timesteps t (B,), entry `index` of the schedule.

        repeat_noise: the same noise for every item of the batch.

        Returns:
            (x_{t-1}, predicted x_0), each (B, C, H, W).
        """
        if dynamic_threshold is not None:
            raise ValueError("dynamic_threshold is not supported: use the guidance term `threshold`")
        host_alpha_bar = float(self._schedule(use_original_steps).alphas_cumprod[index])
        scale, uncond = unconditional_guidance_scale, unconditional_conditioning
        output, without = self._guided(x, c, t, host_alpha_bar, scale, uncond, score_corrector, corrector_kwargs)
        alpha_bar, alpha_bar_prev, sigma = self._levels_at(index, use_original_steps)
        eps, pred_x0 = self._eps_and_x0(output, x, t, alpha_bar)
        if quantize_denoised:
            pred_x0 = self._quantize(pred_x0)
        if without is not None:  # CFG++
            eps, _ = self._eps_and_x0(without, x, t, alpha_bar)
        noise = self._scaled_noise(eps, sigma, temperature, noise_dropout, repeat_noise, noise_like)
        return ddim_update(pred_x0, eps, alpha_bar_prev, sigma, noise), pred_x0

    def _eps_and_x0(self, output: Tensor, x: Tensor, t: Tensor, alpha_bar: Level) -> tuple[Tensor, Tensor]:
        """(eps, x0); from v by the model's own methods, where it has them for these timesteps."""
        by_model = self.parameterization == "v" and hasattr(self.model, "predict_eps_from_z_and_v")
        if by_model and not t.is_floating_point():
            eps = self.model.predict_eps_from_z_and_v(x, t, output)
            return eps, self.model.predict_start_from_z_and_v(x, t, output)
        return eps_and_x0(output, x, alpha_bar, self.parameterization)

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor | int, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise x0 (B, ...) to entry t of the schedule, one number or (B,).

        As in the public code this is one step more than `decode(..., t)` removes; t past the last entry is clamped.
        """
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
        x, timesteps = x_latent, self._timesteps(use_original_steps, t_start)
        guidance = (guidance or Guidance(unconditional_guidance_scale)).over(len(timesteps))
        intermediates = Intermediates(x, callback, img_callback)
        with self._run(guidance, noise, verbose):
            for i, index, t in self._iterate(timesteps, x):
                x = self._blend(x, t, index, use_original_steps, mask, x0)
                x, pred_x0 = self.p_sample_ddim(
                    x,
                    cond,
                    t,
                    index=index,
                    use_original_steps=use_original_steps,
                    unconditional_guidance_scale=guidance.scale_at(i),
                    unconditional_conditioning=unconditional_conditioning,
                )
                intermediates.record(x, pred_x0, i, index)
        return x

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
        """DDIM inversion: noise x0 (B, C, H, W) deterministically along the first `t_enc` steps of the schedule.

        Args:
            return_intermediates: record about so many latents.
            schedule_timesteps: evaluate the model at the schedule's timesteps. The public code evaluates it at the
                indices 0, 1, 2 ... of the steps instead; the default reproduces its numbers.

        Returns:
            The noisy latent, and {"x_encoded", "intermediate_steps", "intermediates"}.
        """
        schedule = self._schedule(use_original_steps)
        if not 0 <= t_enc <= len(schedule):
            raise ValueError(f"t_enc must be from 0 to the schedule's {len(schedule)} steps, not {t_enc}")
        guidance = guidance or Guidance(unconditional_guidance_scale)
        state = self._state(schedule, c, unconditional_conditioning, guidance)
        every = max(t_enc // return_intermediates, 1) if return_intermediates else None
        steps = reversed(list(schedule.steps()))
        x, latents, recorded = x0, [], []
        for i, step in zip(progress_bar(range(t_enc), t_enc, verbose, "DDIM inversion"), steps):
            alpha_bar, alpha_bar_next = step.alpha_bar_prev, step.alpha_bar  # this goes up, a step goes down
            state.step = len(schedule) - 1 - i  # guidance scales belong to the steps of sampling
            # Sampling goes from x_next to x by the guided eps and renoises with the unconditional one (CFG++). Both are
            # needed at x_next; x stands in for it.
            renoise, pred_x0 = self.predict(state, x, step.t if schedule_timesteps else i, alpha_bar_next)
            eps = (x - (alpha_bar_next**0.5) * pred_x0) / (1 - alpha_bar_next) ** 0.5
            x = add_noise((x - (1 - alpha_bar) ** 0.5 * renoise) / alpha_bar**0.5, eps, alpha_bar_next)
            if every and (i % every == 0 or i >= t_enc - 2):
                latents.append(x)
                recorded.append(i)
            if callback:
                callback(i)
        out = {"x_encoded": x, "intermediate_steps": recorded}
        return x, out | ({"intermediates": latents} if every else {})
