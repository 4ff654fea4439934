"""The one sampling loop. It walks the schedule, blends masks, calls a subclass's update rule, and reports.

A sampler sees its model as a duck with `apply_model`, `alphas_cumprod`, `num_timesteps`, `parameterization` and
`device`. An update rule is a subclass with a `step`; `self.predict` is where guidance and parameterization end, so
every rule works with every model, and masks, callbacks and intermediates work with every rule.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.guidance import Condition, Denoiser, classifier_free, condition_batch_size
from ldm.modules.diffusionmodules.schedule import (
    eps_and_x0,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    usable_timesteps,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, in ascending time, as float64 host numbers.

    Step i leaves timestep `timesteps[i]`, where the cumulative alpha is `a[i]`, for the level `a_prev[i]`, and adds
    noise of standard deviation `sigma[i]`.
    """

    timesteps: np.ndarray
    a: np.ndarray
    a_prev: np.ndarray
    sigma: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)

    def until(self, steps: int) -> Schedule:
        """The last `steps` steps of a run, those nearest to the data."""
        return Schedule(self.timesteps[:steps], self.a[:steps], self.a_prev[:steps], self.sigma[:steps])


@dataclass
class Run:
    """What holds for one walk: the schedule, the guided network, and the caller's wishes."""

    schedule: Schedule
    denoise: Denoiser
    temperature: float = 1.0
    noise_dropout: float = 0.0
    repeat_noise: bool = False
    quantize: Callable[[Tensor], Tensor] | None = None
    keep: Callable[[Tensor], Tensor] | None = None  # puts the known data under the mask into a predicted x0
    correct: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    history: list[Tensor] = field(default_factory=list)


class Sampler:
    """Base of all samplers. A subclass supplies `step`, and `_lay_out` if its steps lie elsewhere than DDIM's."""

    deterministic = False  # True: the update rule cannot add noise, so eta must be 0

    def __init__(self, model: Any, schedule: str = "linear", device: Any = None) -> None:
        """`schedule` and `device` are accepted as published; both are the model's."""
        self.model = model
        self.parameterization = model.parameterization
        self.ddpm_num_timesteps = int(model.num_timesteps)

    # ---- schedule ----

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Lay out `ddim_num_steps` steps ("uniform" or "quad") with noise `ddim_eta` (0: none, 1: as much as DDPM)."""
        if self.deterministic and ddim_eta != 0:
            raise ValueError(f"{type(self).__name__} is deterministic: eta must be 0, not {ddim_eta}")
        if not 1 <= ddim_num_steps <= self.ddpm_num_timesteps:
            raise ValueError(f"the number of steps must be from 1 to {self.ddpm_num_timesteps}, not {ddim_num_steps}")
        if ddim_discretize not in ("uniform", "quad"):
            raise ValueError(f"ddim_discretize {ddim_discretize!r} is not one of uniform, quad")
        self.schedule = self._lay_out(ddim_num_steps, ddim_discretize, ddim_eta)
        self.ddim_eta = ddim_eta

    def _lay_out(self, steps: int, discretize: str, eta: float) -> Schedule:
        alphas_cumprod = self._alphas_cumprod()
        timesteps = make_ddim_timesteps(discretize, steps, len(alphas_cumprod))
        sigma, a, a_prev = make_ddim_sampling_parameters(alphas_cumprod, timesteps, eta)
        return Schedule(usable_timesteps(timesteps, len(alphas_cumprod)), a, a_prev, sigma)

    def _alphas_cumprod(self) -> np.ndarray:
        return self.model.alphas_cumprod.detach().cpu().double().numpy()  # MPS has no float64

    def _original_schedule(self, eta: float) -> Schedule:
        """Every timestep of the model, ending at the data itself."""
        a = self._alphas_cumprod()
        a_prev = np.append(1.0, a[:-1])
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        return Schedule(np.arange(len(a)), a, a_prev, sigma)

    def _select(self, use_original_steps: bool) -> Schedule:
        if use_original_steps:
            return self._original_schedule(getattr(self, "ddim_eta", 0.0))
        if not hasattr(self, "schedule"):
            raise ValueError("call make_schedule (or sample) first, so that there are steps to walk")
        return self.schedule

    # Public names of the schedule's columns.
    ddim_timesteps = property(lambda self: self.schedule.timesteps)
    ddim_alphas = property(lambda self: self.schedule.a)
    ddim_alphas_prev = property(lambda self: self.schedule.a_prev)
    ddim_sigmas = property(lambda self: self.schedule.sigma)

    # ---- the update rule ----

    def predict(self, run: Run, x: Tensor, t: float, a: float) -> tuple[Tensor, Tensor]:
        """(eps, x0) that the guided network sees in x (B, ...) at timestep t and cumulative alpha a."""
        batch_t = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long if t == int(t) else torch.float32)
        output = run.denoise(x, batch_t)
        if run.correct is not None:
            output = run.correct(output, x, batch_t)
        eps, x0 = eps_and_x0(output, x, a, self.parameterization)
        return eps, run.quantize(x0) if run.quantize else x0

    def step(self, run: Run, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """One step of `run.schedule`, from entry `index` down: (the next x, the x0 that it aims at)."""
        raise NotImplementedError

    # ---- the loop ----

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Condition = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Condition = None,
        dynamic_threshold: None = None,
        ucg_schedule: Sequence[float] | None = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Draw `batch_size` latents of `shape` (C, H, W) in S steps.

        conditioning, unconditional_conditioning, unconditional_guidance_scale: see `guidance`. x_T: start from this
        latent instead of noise. eta: noise of the update, where the rule has any. mask, x0: keep x0 where mask
        (B, 1, H, W) is 1. ucg_schedule: a guidance scale for every step. callback(i), img_callback(x0, i): called
        after every step. log_every_t: keep an intermediate every so many steps. quantize_x0, temperature,
        noise_dropout, score_corrector, corrector_kwargs: as in the public code. normals_sequence, dynamic_threshold:
        in the public signature, and of no effect there; anything but None is refused.

        Returns latents (batch_size, C, H, W) and {"x_inter": [...], "pred_x0": [...]}.
        """
        size = condition_batch_size(conditioning)
        if size is not None and size != batch_size:
            logger.warning("%d conditionings for a batch of %d", size, batch_size)
        if normals_sequence is not None or dynamic_threshold is not None:
            raise ValueError("normals_sequence and dynamic_threshold are not supported: leave them out")
        keep = self._pasting(mask, x0)
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)
        if ucg_schedule is not None and len(ucg_schedule) != len(self.schedule):
            raise ValueError(f"ucg_schedule has {len(ucg_schedule)} scales for {len(self.schedule)} steps")
        device = self.model.device
        x = torch.randn((batch_size, *shape), device=device) if x_T is None else x_T
        run = self._run(
            self.schedule,
            conditioning,
            unconditional_conditioning,
            unconditional_guidance_scale,
            temperature=temperature,
            noise_dropout=noise_dropout,
            quantize=self._quantize if quantize_x0 else None,
            keep=keep,
            correct=self._corrector(score_corrector, conditioning, corrector_kwargs),
        )
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}

        def before(x: Tensor, i: int, index: int) -> Tensor:
            if ucg_schedule is not None:
                run.denoise = self._guide(conditioning, unconditional_conditioning, float(ucg_schedule[i]))
            return x if keep is None else keep(x, self._noised(x0, self.schedule.a[index]))

        def after(x: Tensor, pred_x0: Tensor, i: int, index: int) -> None:
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or i == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)

        return self._walk(run, x, before, after, verbose), intermediates

    def _walk(
        self,
        run: Run,
        x: Tensor,
        before: Callable[[Tensor, int, int], Tensor] | None = None,
        after: Callable[[Tensor, Tensor, int, int], None] | None = None,
        verbose: bool = True,
    ) -> Tensor:
        total = len(run.schedule)
        for i in tqdm(range(total), desc=type(self).__name__, disable=not verbose, leave=None):
            index = total - 1 - i
            if before:
                x = before(x, i, index)
            x, pred_x0 = self.step(run, x, index)
            if after:
                after(x, pred_x0, i, index)
        return x

    # ---- image to image ----

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor | int, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise x0 (B, ...) to the level of schedule entry t (an index, one for all or one each).

        An index past the schedule's end, which full strength asks for, means its last entry.
        """
        noise = torch.randn_like(x0) if noise is None else noise
        levels = self._select(use_original_steps).a
        index = np.atleast_1d(torch.as_tensor(t).cpu().numpy()).clip(0, len(levels) - 1)
        a = torch.tensor(levels[index], dtype=torch.float32).to(x0.device).reshape(-1, *(1,) * (x0.ndim - 1))
        return a.sqrt().to(x0.dtype) * x0 + (1 - a).sqrt().to(x0.dtype) * noise

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
    ) -> Tensor:
        """Walk the last `t_start` steps of the schedule from x_latent (B, C, H, W) to the data.

        mask, x0: as in `sample`.
        """
        schedule = self._select(use_original_steps).until(t_start)
        keep = self._pasting(mask, x0)
        run = self._run(schedule, cond, unconditional_conditioning, unconditional_guidance_scale, keep=keep)
        before = (lambda x, i, index: keep(x, self._noised(x0, schedule.a[index]))) if keep else None
        after = (lambda x, x0, i, index: callback(i)) if callback else None
        return self._walk(run, x_latent, before, after, verbose)

    # ---- parts of a run ----

    def _run(self, schedule: Schedule, cond: Condition, uncond: Condition, scale: float, **options: Any) -> Run:
        return Run(schedule, self._guide(cond, uncond, scale), **options)

    def _guide(self, cond: Condition, uncond: Condition, scale: float) -> Denoiser:
        return classifier_free(self.model.apply_model, cond, uncond, scale)

    def _quantize(self, x0: Tensor) -> Tensor:
        return self.model.first_stage_model.quantize(x0)[0]

    def _corrector(
        self, corrector: Any, cond: Condition, kwargs: dict[str, Any] | None
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        if corrector is None:
            return None
        if self.model.parameterization != "eps":
            raise ValueError(f"score_corrector needs an eps model, not {self.model.parameterization!r}")
        return lambda eps, x, t: corrector.modify_score(self.model, eps, x, t, cond, **(kwargs or {}))

    @staticmethod
    def _pasting(mask: Tensor | None, x0: Tensor | None) -> Callable[..., Tensor] | None:
        """What puts x0, or x0 as it is noised, into an x where the mask is 1; None without a mask."""
        if mask is None:
            return None
        if x0 is None:
            raise ValueError("mask needs x0, the latent to keep where the mask is 1")
        return lambda x, known=x0: mask * known + (1.0 - mask) * x

    @staticmethod
    def _noised(x0: Tensor, a: float) -> Tensor:
        return float(np.sqrt(a)) * x0 + float(np.sqrt(1 - a)) * torch.randn_like(x0)
