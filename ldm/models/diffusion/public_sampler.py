"""The base of the public DDIM and PLMS samplers: their buffers, and what our additions share.

Their loops and steps are written out in `ddim.py` and `plms.py`, since research code overrides those.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion.guidance import Condition, ConditionalModel, Guidance, GuidedOutput, ModelOutputs
from ldm.models.diffusion.noise import NoiseSource, global_noise
from ldm.models.diffusion.sampler import Sampler, add_noise, batch_of, blend, progress_bar
from ldm.models.diffusion.schedules import Schedule, ScheduleChoice, make_schedule
from ldm.modules.diffusionmodules.schedule import alphas_cumprod_buffers, ddim_sigmas, sqrt, usable_timesteps
from ldm.modules.diffusionmodules.util import noise_like as published_noise_like

Level = float | Tensor


class PublicSampler(Sampler):
    """A sampler with the attributes of the public ones; `schedule` and `device` are accepted, the model's are used."""

    default_schedule = "uniform"
    legacy_public = True
    # Of the run in progress, `guidance` without its scale. Attributes, not arguments: the public loops and steps, which
    # research code overrides and calls, have no argument for them.
    _guidance = Guidance()
    _noise: NoiseSource = staticmethod(global_noise)
    _verbose = True
    # registered by `make_schedule`
    ddim_timesteps: Any
    ddim_alphas: Any
    ddim_alphas_prev: Any
    ddim_sigmas: Any
    ddim_sqrt_one_minus_alphas: Any
    _host_steps: tuple[Any, Schedule] | None = None
    _last: ConditionalModel | None = None

    def __init__(self, model: Any, schedule: str = "linear", device: Any = None, **kwargs: Any) -> None:
        super().__init__(model)
        self.schedule = schedule

    def _register_schedule(
        self,
        choice: ScheduleChoice | None,
        steps: int,
        eta: float,
        verbose: bool,
        make_timesteps: Callable[..., np.ndarray],
        make_parameters: Callable[..., tuple[Any, Any, Any]],
    ) -> None:
        """`make_schedule` with the functions of a module that may have been replaced."""
        self._check_eta(eta)
        self._reset_levels()
        self.ddim_eta = eta
        choice = self.default_schedule if choice is None else choice
        dtype, levels = self.model.alphas_cumprod.dtype, self.levels.alphas_cumprod
        if isinstance(choice, str) and choice in ("uniform", "quad"):
            timesteps = make_timesteps(
                ddim_discr_method=choice,
                num_ddim_timesteps=steps,
                num_ddpm_timesteps=self.ddpm_num_timesteps,
                verbose=verbose,
            )
            timesteps = np.unique(usable_timesteps(timesteps, self.ddpm_num_timesteps))
            sigmas, alphas, alphas_prev = (
                np.asarray(column, np.float64)
                for column in make_parameters(alphacums=levels, ddim_timesteps=timesteps, eta=eta, verbose=verbose)
            )
        else:
            made = make_schedule(choice, steps, levels, eta)
            timesteps, alphas, alphas_prev = made.timesteps, made.alphas_cumprod, made.alphas_cumprod_prev
            sigmas = made.ddim_sigmas
        derived = alphas_cumprod_buffers(levels)
        betas = getattr(self.model, "betas", None)
        betas = 1 - levels / derived["alphas_cumprod_prev"] if betas is None else betas.detach()
        for name, values in {"betas": betas, **derived}.items():
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32))
        original = ddim_sigmas(levels, derived["alphas_cumprod_prev"], eta)
        self.ddim_timesteps = timesteps
        self.register_buffer("ddim_sigmas", torch.as_tensor(sigmas, dtype=dtype))
        self.register_buffer("ddim_alphas", torch.as_tensor(alphas, dtype=dtype))
        self.register_buffer("ddim_alphas_prev", alphas_prev)
        self.register_buffer("ddim_sqrt_one_minus_alphas", torch.as_tensor(np.sqrt(1 - alphas), dtype=dtype))
        self.register_buffer("ddim_sigmas_for_original_num_steps", torch.as_tensor(original, dtype=dtype))
        self._host_steps = self.ddim_alphas, Schedule(timesteps, alphas, alphas_prev, sigmas)

    @property
    def sampling_schedule(self) -> Schedule:  # type: ignore[override]  # an attribute of other samplers
        """The schedule on the host, read from the buffers again where they have been replaced."""
        alphas = self.ddim_alphas
        if self._host_steps is None or self._host_steps[0] is not alphas:
            columns = (alphas, self.ddim_alphas_prev, self.ddim_sigmas)
            host = (np.asarray(torch.as_tensor(column).cpu().double()) for column in columns)
            self._host_steps = alphas, Schedule(np.asarray(self.ddim_timesteps), *host)
        return self._host_steps[1]

    def _schedule(self, use_original_steps: bool) -> Schedule:
        if not use_original_steps and not hasattr(self, "ddim_alphas"):
            raise ValueError("there is no schedule yet: call make_schedule or sample first")
        return self._original_steps if use_original_steps else self.sampling_schedule

    # ---- parts of a run ----

    def _sample(
        self,
        cond: Condition,
        shape: Sequence[int],
        x_T: Tensor | None,
        uncond: Condition,
        guidance: Guidance,
        *,
        noise: NoiseSource,
        verbose: bool,
        **options: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        scales = guidance.over(len(self.sampling_schedule)).scales
        if len(scales) > 1:
            options["ucg_schedule"] = scales
        with self._run(guidance, noise, verbose):
            return self._sampling(
                cond,
                shape,
                x_T=x_T,
                ddim_use_original_steps=False,
                unconditional_guidance_scale=scales[0],
                unconditional_conditioning=uncond,
                **options,
            )

    def _sampling(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """The public loop of the class."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _run(self, guidance: Guidance, noise: NoiseSource, verbose: bool) -> Iterator[None]:
        """Keep what the public arguments have no place for while a run lasts."""
        self._check_guidance(guidance)
        before = self._guidance, self._noise, self._verbose
        self._guidance, self._noise, self._verbose = guidance, noise, verbose
        try:
            yield
        finally:
            self._guidance, self._noise, self._verbose = before

    def _timesteps(self, use_original_steps: bool, count: int | None = None) -> Sequence[float]:
        """The last `count` timesteps of the run, in ascending order."""
        if use_original_steps:
            return list(range(self.ddpm_num_timesteps))[:count]
        self._schedule(False)
        return list(np.asarray(self.ddim_timesteps)[:count].tolist())

    def _iterate(self, timesteps: Sequence[float], x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """(i, index, t (B,)) of each step from the last timestep to the first."""
        total = len(timesteps)
        for i in progress_bar(range(total), total, self._verbose):
            index = total - i - 1
            yield i, index, batch_of(timesteps[index], x)

    def _blend(
        self, x: Tensor, t: Tensor, index: int, original: bool, mask: Tensor | None, x0: Tensor | None
    ) -> Tensor:
        """x with the known data x0, noised to timestep t, where the mask is 1."""
        if mask is None or x0 is None:
            return x
        if t.is_floating_point() or not hasattr(self.model, "q_sample"):
            alpha_bar = float(self._schedule(original).alphas_cumprod[index])
            return blend(mask, add_noise(x0, self._noise(x0.shape, x0.device).to(x0.dtype), alpha_bar), x)
        given = {} if self._noise is global_noise else {"noise": self._noise(x0.shape, x0.device).to(x0.dtype)}
        return blend(mask, self.model.q_sample(x0, t, **given), x)

    def _guided(
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        alpha_bar: float,
        scale: float,
        uncond: Condition,
        score_corrector: Any,
        corrector_kwargs: dict[str, Any] | None,
    ) -> GuidedOutput:
        """The guided and corrected output of the model for x at timesteps t."""
        if self._last is None or self._last.cond is not c or self._last.uncond is not uncond:
            self._last = self._conditional(c, uncond)
        output, without = self._guidance(ModelOutputs(self._last, x, t, alpha_bar), scale)
        correct = self._corrector(score_corrector, c, corrector_kwargs)
        return GuidedOutput(correct(output, x, t) if correct else output, without)

    def _levels_at(self, index: int, use_original_steps: bool) -> tuple[Level, Level, Level]:
        """(alpha_bar, alpha_bar_prev, sigma) of a step, from the buffers, which may have been replaced."""
        if use_original_steps:
            original = self._original_steps
            columns = original.alphas_cumprod, original.alphas_cumprod_prev, original.ddim_sigmas
        else:
            columns = self.ddim_alphas, self.ddim_alphas_prev, self.ddim_sigmas
        alpha_bar, alpha_bar_prev, sigma = (
            column[index] if isinstance(column, Tensor) else float(column[index]) for column in columns
        )
        return alpha_bar, alpha_bar_prev, sigma

    def _scaled_noise(
        self,
        x: Tensor,
        sigma: Level,
        temperature: float,
        noise_dropout: float,
        repeat_noise: bool,
        noise_like: Callable[..., Tensor],
    ) -> Tensor:
        """What a step to x (B, ...) adds; sampled even where sigma is 0, as in the public code."""
        if self._noise is global_noise or noise_like is not published_noise_like:
            noise = noise_like(x.shape, x.device, repeat_noise)
        else:
            noise = self._noise((1, *x.shape[1:]) if repeat_noise else x.shape, x.device).expand(x.shape)
        noise = sigma * temperature * noise.to(x.dtype)
        return F.dropout(noise, p=noise_dropout) if noise_dropout > 0.0 else noise

    def _noise_to(
        self, x0: Tensor, t: Tensor | int, original: bool, noise: Tensor | None, extract: Callable[..., Tensor]
    ) -> Tensor:
        """x0 (B, ...) noised to entry t of the schedule, one number or (B,); t past the last entry is clamped."""
        if original:
            alphas = torch.as_tensor(self._original_steps.alphas_cumprod, dtype=torch.float32).to(x0.device)
            columns = alphas.sqrt(), (1 - alphas).sqrt()
        else:
            self._schedule(False)
            columns = torch.as_tensor(self.ddim_alphas).sqrt(), torch.as_tensor(self.ddim_sqrt_one_minus_alphas)
        noise = torch.randn_like(x0) if noise is None else noise
        t = torch.as_tensor(t).to(x0.device).reshape(-1).clamp(max=len(columns[0]) - 1)
        signal, sigma = (extract(column, t, x0.shape).to(x0.dtype) for column in columns)
        return signal * x0 + sigma * noise


def ddim_update(pred_x0: Tensor, eps: Tensor, alpha_bar_prev: Level, sigma: Level, noise: Tensor) -> Tensor:
    """x_{t-1} from x_0 and eps (Song et al. 2021, eq. 12); noise: of standard deviation sigma."""
    x_prev: Tensor = sqrt(alpha_bar_prev) * pred_x0 + sqrt(1 - alpha_bar_prev - sigma**2) * eps + noise
    return x_prev
