"""The one sampling loop. It walks the schedule, blends masks, calls a subclass's update rule, and reports.

A sampler sees its model as a duck with `apply_model`, `alphas_cumprod`, `num_timesteps`, `parameterization` and
`device`, and perhaps with `perturbed_attention` and `one_by_one` (see `guidance.Network`). An update rule is a subclass
with a `step`; `self.predict` is where guidance and parameterization end, so every rule works with every model, and
masks, callbacks and intermediates work with every rule.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.guidance import Branches, Condition, Guidance, Network, condition_batch_size
from ldm.models.diffusion.noise import NoiseSource, global_noise
from ldm.models.diffusion.schedules import TINY, Levels, Schedule, ddim_sigmas, lay_out
from ldm.modules.diffusionmodules.schedule import eps_and_x0

logger = logging.getLogger(__name__)

Choice = str | Sequence[float]  # of a schedule: a name in `schedules.SCHEDULES`, or timesteps


@dataclass
class Run:
    """What holds for one walk: the schedule, the network and its guidance, and the caller's wishes."""

    schedule: Schedule
    network: Network
    guidance: Guidance
    noise: NoiseSource = global_noise
    temperature: float = 1.0
    noise_dropout: float = 0.0
    repeat_noise: bool = False
    quantize: Callable[[Tensor], Tensor] | None = None
    keep: Callable[..., Tensor] | None = None  # puts known data in where the mask is 1
    correct: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    history: list[Any] = field(default_factory=list)  # the update rule's own
    step: int = 0  # steps taken so far

    def fresh(self, x: Tensor) -> Tensor:
        """Standard normal noise of x's shape (B, ...) and kind; the same for every item with `repeat_noise`."""
        shape = (1, *x.shape[1:]) if self.repeat_noise else x.shape
        return self.noise(shape, x.device).expand(x.shape).to(x.dtype)

    def added(self, x: Tensor, sigma: float) -> Tensor:
        """What a step to x (B, ...) adds: noise of standard deviation sigma, but for temperature and dropout.

        It is drawn even where sigma is 0, as published: the random stream of a whole run depends on it.
        """
        noise = sigma * self.temperature * self.fresh(x)
        return F.dropout(noise, p=self.noise_dropout) if self.noise_dropout > 0.0 else noise


def transfer(x0: Tensor, eps: Tensor, a: float) -> Tensor:
    """x at level a, made up of x0 and eps (B, ...)."""
    return float(np.sqrt(a)) * x0 + float(np.sqrt(1 - a)) * eps


SAMPLERS: dict[str, functools.partial[Sampler]] = {}


def register(name: str, **options: Any) -> Callable[[type[Sampler]], type[Sampler]]:
    """Make a sampler known as `name`, built with `options`."""

    def _register(kind: type[Sampler]) -> type[Sampler]:
        SAMPLERS[name] = functools.partial(kind, **options)
        return kind

    return _register


class Sampler:
    """Base of all samplers. A subclass supplies `step`."""

    supports_eta = (
        False  # whether the rule adds as much noise as it is told; the others add none, or as much as they do
    )
    default_schedule: Choice = "even"
    sequential_guidance = False  # evaluate the two conditions one after the other, which takes less memory
    ddim_eta = 0.0  # of the schedule, once there is one
    cfg_pp = False  # whether the rule goes on along the eps that `predict` gives, as CFG++ needs
    published = False  # whether masks and image to image are as the public code has them, for its numbers to come out

    def __init__(self, model: Any, schedule: str = "linear", device: Any = None) -> None:
        """`schedule` and `device` are accepted as published; both are the model's."""
        self.model = model
        self.parameterization = model.parameterization
        self.ddpm_num_timesteps = int(model.num_timesteps)

    # ---- schedule ----

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: Choice | None = None,
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Lay out `ddim_num_steps` steps with noise `ddim_eta` (0: none, 1: as much as DDPM).

        ddim_discretize: a name in `schedules.SCHEDULES` or a list of timesteps; None is the sampler's own.
        """
        if not self.supports_eta and ddim_eta != 0:
            raise ValueError(f"{type(self).__name__} has no eta to set: eta must be 0, not {ddim_eta}")
        choice = self.default_schedule if ddim_discretize is None else ddim_discretize
        self.levels = Levels(self._alphas_cumprod())
        self.schedule = lay_out(choice, ddim_num_steps, self.levels.a, ddim_eta)
        self.ddim_eta = ddim_eta

    def _alphas_cumprod(self) -> np.ndarray:
        return np.asarray(self.model.alphas_cumprod.detach().cpu().double())  # MPS has no float64

    @functools.cached_property
    def levels(self) -> Levels:
        """The model's levels, between timesteps too."""
        return Levels(self._alphas_cumprod())

    def _original_schedule(self) -> Schedule:
        """Every timestep of the model, ending at the data itself."""
        a = np.maximum(self._alphas_cumprod(), TINY)
        a_prev = np.append(1.0, a[:-1])
        return Schedule(np.arange(len(a)), a, a_prev, ddim_sigmas(a, a_prev, self.ddim_eta))

    def _select(self, use_original_steps: bool) -> Schedule:
        if use_original_steps:
            return self._original_schedule()
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
        """(eps, x0) that the guided network sees in x (B, ...) at timestep t and cumulative alpha a.

        The two make up x, but under CFG++, where eps is the unconditional one, to go on along.
        """
        batch_t = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long if t == int(t) else torch.float32)
        output, onward = run.guidance(Branches(run.network, x, batch_t, float(a)), run.step)
        if run.correct is not None:
            output = run.correct(output, x, batch_t)
        eps, x0 = eps_and_x0(output, x, a, self.parameterization)
        x0 = run.quantize(x0) if run.quantize else x0
        if onward is not None:
            eps, _ = eps_and_x0(onward, x, a, self.parameterization)
        if run.keep and not self.published:  # of a mask, the public rules see x alone, and end in what they predict
            x0 = run.keep(x0)
            eps = run.keep(eps, (x - float(np.sqrt(a)) * x0) / float(np.sqrt(1 - a)))
        return eps, x0

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
        *,
        schedule: Choice | None = None,
        guidance: Guidance | None = None,
        noise: NoiseSource = global_noise,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Draw `batch_size` latents of `shape` (C, H, W) in S steps.

        conditioning, unconditional_conditioning, unconditional_guidance_scale: see `guidance`. x_T: start from this
        latent instead of noise. eta: noise of the update, where the rule has any. mask, x0: keep x0 where mask
        (B, 1, H, W) is 1. ucg_schedule: a guidance scale for every step. callback(i), img_callback(x0, i): called
        after every step. log_every_t: keep an intermediate every so many steps. quantize_x0, temperature,
        noise_dropout, score_corrector, corrector_kwargs: as in the public code. normals_sequence, dynamic_threshold:
        in the public signature, and of no effect there; anything but None is refused.

        schedule: see `make_schedule`. guidance: instead of a scale, whatever `Guidance` can do. noise: where random
        numbers come from, see `ldm.models.diffusion.noise`.

        Returns latents (batch_size, C, H, W) and {"x_inter": [...], "pred_x0": [...]}.
        """
        size = condition_batch_size(conditioning)
        if size is not None and size != batch_size:
            logger.warning("%d conditionings for a batch of %d", size, batch_size)
        if normals_sequence is not None or dynamic_threshold is not None:
            raise ValueError("normals_sequence and dynamic_threshold are not supported: leave them out")
        keep = self._pasting(mask, x0)
        self.make_schedule(S, schedule, ddim_eta=eta, verbose=verbose)
        if ucg_schedule is not None and len(ucg_schedule) != len(self.schedule):
            raise ValueError(f"ucg_schedule has {len(ucg_schedule)} scales for {len(self.schedule)} steps")
        guidance = guidance or Guidance(unconditional_guidance_scale if ucg_schedule is None else ucg_schedule)
        run = self._run(
            self.schedule,
            conditioning,
            unconditional_conditioning,
            guidance,
            noise=noise,
            temperature=temperature,
            noise_dropout=noise_dropout,
            quantize=self._quantize if quantize_x0 else None,
            keep=keep,
            correct=self._corrector(score_corrector, conditioning, corrector_kwargs),
        )
        x = noise((batch_size, *shape), self.model.device) if x_T is None else x_T
        intermediates: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}

        def after(x: Tensor, pred_x0: Tensor, i: int, index: int) -> None:
            """What comes after every step: callbacks, and an intermediate every `log_every_t` steps."""
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)
            if index % log_every_t == 0 or i == 0:
                intermediates["x_inter"].append(x)
                intermediates["pred_x0"].append(pred_x0)

        return self._walk(run, x, x0, after, verbose), intermediates

    def _walk(
        self,
        run: Run,
        x: Tensor,
        known: Tensor | None = None,
        after: Callable[[Tensor, Tensor, int, int], None] | None = None,
        verbose: bool = True,
    ) -> Tensor:
        total, noise = len(run.schedule), None
        for i in tqdm(range(total), desc=type(self).__name__, disable=not verbose, leave=None):
            index, run.step = total - 1 - i, i
            if run.keep and known is not None:  # without known data there is no mask
                # new noise at every step, as published, would not go together with what a rule remembers of it
                noise = run.fresh(known) if noise is None or self.published else noise
                x = run.keep(x, transfer(known, noise, run.schedule.a[index]))
            x, pred_x0 = self.step(run, x, index)
            if after:
                after(x, pred_x0, i, index)
        return x

    # ---- image to image ----

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor | int, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise x0 (B, ...) to where `decode(..., t)` starts: t steps from the end, one number for all or one each.

        DDIM and PLMS noise it by one step more, as published: to entry t of the schedule, where decode starts at t - 1.
        A t beyond the schedule's beginning, which full strength asks them for, means the beginning.
        """
        noise = torch.randn_like(x0) if noise is None else noise
        schedule = self._select(use_original_steps)
        levels = schedule.a if self.published else np.append(schedule.a_prev[0], schedule.a)
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
        *,
        guidance: Guidance | None = None,
        noise: NoiseSource = global_noise,
        img_callback: Callable[[Tensor, int], None] | None = None,
    ) -> Tensor:
        """Walk the last `t_start` steps of the schedule from x_latent (B, C, H, W) to the data.

        mask, x0, guidance, noise, img_callback: as in `sample`.
        """
        schedule = self._select(use_original_steps).until(t_start)
        guidance = guidance or Guidance(unconditional_guidance_scale)
        keep = self._pasting(mask, x0)
        run = self._run(schedule, cond, unconditional_conditioning, guidance, keep=keep, noise=noise)

        def after(x: Tensor, pred_x0: Tensor, i: int, index: int) -> None:
            """What comes after every step: callbacks."""
            if callback:
                callback(i)
            if img_callback:
                img_callback(pred_x0, i)

        return self._walk(run, x_latent, x0, after, verbose)

    # ---- parts of a run ----

    def _run(self, schedule: Schedule, cond: Condition, uncond: Condition, guidance: Guidance, **options: Any) -> Run:
        if guidance.cfg_pp and not self.cfg_pp:
            able = ", ".join(name for name, make in SAMPLERS.items() if getattr(make.func, "cfg_pp", False))
            raise ValueError(f"CFG++ is for samplers that go on along eps ({able}), not for {type(self).__name__}")
        perturbed = getattr(self.model, "perturbed_attention", None)
        one_by_one = self.sequential_guidance or getattr(self.model, "one_by_one", False)
        network = Network(self.model.apply_model, cond, uncond, self.parameterization, perturbed, one_by_one)
        return Run(schedule, network, guidance.over(len(schedule)), **options)

    def _quantize(self, x0: Tensor) -> Tensor:
        quantized: Tensor = self.model.first_stage_model.quantize(x0)[0]
        return quantized

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
