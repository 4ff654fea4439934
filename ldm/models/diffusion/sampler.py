"""The sampling loop of all samplers but two. An update rule is a subclass of `Sampler` with a `step`.

DDIM and PLMS keep the loops and steps of the public code, which research code overrides (see `public_sampler`).

A sampler needs little of its model: `apply_model`, `alphas_cumprod`, `num_timesteps`, `parameterization` and `device`;
perturbed-attention guidance needs `model.diffusion_model`, too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ldm.models.diffusion.guidance import Condition, ConditionalModel, Guidance, ModelOutputs, condition_batch_size
from ldm.models.diffusion.noise import NoiseSource, global_noise
from ldm.models.diffusion.schedules import NoiseLevels, Schedule, ScheduleChoice, Step, make_schedule, original_schedule
from ldm.modules.diffusionmodules.schedule import eps_and_x0, sqrt

logger = logging.getLogger(__name__)

SAMPLERS: dict[str, functools.partial[Sampler]] = {}

MODEL_ATTRIBUTES = ("alphas_cumprod", "num_timesteps", "parameterization", "device")  # that samplers read


def register(name: str, **options: Any) -> Callable[[type[Sampler]], type[Sampler]]:
    """Register a sampler as `name`, built with `options`."""

    def _register(kind: type[Sampler]) -> type[Sampler]:
        SAMPLERS[name] = functools.partial(kind, **options)
        return kind

    return _register


def cfg_pp_samplers() -> list[str]:
    """Names of the samplers that support CFG++."""
    return [name for name, make in SAMPLERS.items() if getattr(make.func, "cfg_pp", False)]


@dataclass
class SamplerState:
    """The state of one sampling run: its model, guidance and schedule, and what the update rule remembers."""

    schedule: Schedule
    model: ConditionalModel
    guidance: Guidance
    noise: NoiseSource = global_noise
    temperature: float = 1.0
    noise_dropout: float = 0.0
    quantize_x0: Callable[[Tensor], Tensor] | None = None
    score_corrector: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    mask: Tensor | None = None
    known_x0: Tensor | None = None  # the latent to keep where the mask is 1
    history: list[Any] = field(default_factory=list)  # the update rule's own
    step: int = 0  # steps taken so far

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal noise like x (B, ...)."""
        return self.noise(x.shape, x.device).to(x.dtype)

    def scaled_noise(self, x: Tensor, sigma: float) -> Tensor:
        """Noise of standard deviation sigma like x (B, ...), after temperature and dropout.

        Sampled even where sigma is 0, as in the public code: the random numbers of the whole run depend on it.
        """
        noise = sigma * self.temperature * self.randn_like(x)
        return F.dropout(noise, p=self.noise_dropout) if self.noise_dropout > 0.0 else noise


def add_noise(x0: Tensor, eps: Tensor, alpha_bar: float) -> Tensor:
    """x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps."""
    x: Tensor = sqrt(alpha_bar) * x0 + sqrt(1 - alpha_bar) * eps
    return x


def ddim_step(x: Tensor, eps: Tensor, alpha_bar: float, alpha_bar_prev: float) -> Tensor:
    """A deterministic DDIM step of x (B, ...) along eps (Song et al. 2021, eq. 13); up or down."""
    return add_noise((x - sqrt(1 - alpha_bar) * eps) / sqrt(alpha_bar), eps, alpha_bar_prev)


def blend(mask: Tensor, known: Tensor, x: Tensor) -> Tensor:
    """`known` where the mask is 1, x where it is 0."""
    return mask * known + (1.0 - mask) * x


class Intermediates:
    """The intermediates of a run, and its callbacks after every step."""

    def __init__(
        self,
        x: Tensor,
        callback: Callable[[int], None] | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        log_every_t: int = 100,
    ) -> None:
        self.callback, self.img_callback, self.log_every_t = callback, img_callback, log_every_t
        self.images: dict[str, list[Tensor]] = {"x_inter": [x], "pred_x0": [x]}

    def record(self, x: Tensor, pred_x0: Tensor, i: int, index: int) -> None:
        """Record step i of a run, which `index` more steps follow."""
        if self.callback:
            self.callback(i)
        if self.img_callback:
            self.img_callback(pred_x0, i)
        if index % self.log_every_t == 0 or i == 0:
            self.images["x_inter"].append(x)
            self.images["pred_x0"].append(pred_x0)


class Sampler:
    """Base of all samplers. A subclass supplies `step`."""

    supports_eta = False  # whether the amount of noise can be chosen
    default_schedule: ScheduleChoice = "even"
    cfg_pp = False  # whether a step renoises with the eps of `predict`, as CFG++ needs
    legacy_public = False  # one of the public samplers, whose `sample` ignores unknown arguments
    sequential_guidance = False  # evaluate the two conditions one after the other, which takes less memory
    ddim_eta = 0.0

    def __init__(self, model: Any) -> None:
        self.model = model
        self.parameterization = model.parameterization
        self.ddpm_num_timesteps = int(model.num_timesteps)

    def register_buffer(self, name: str, attr: Any) -> None:
        """Set attribute `name`; tensors move to the model's device."""
        setattr(self, name, attr.to(self.model.device) if isinstance(attr, Tensor) else attr)

    # ---- schedule ----

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: ScheduleChoice | None = None,
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        """Prepare a schedule of `ddim_num_steps` steps, `self.sampling_schedule`.

        Args:
            ddim_discretize: a name in `schedules.SCHEDULES` or a list of timesteps; None for the sampler's default.
            ddim_eta: noise of DDIM steps: 0 for none, 1 for as much as DDPM.
        """
        self._check_eta(ddim_eta)
        choice = self.default_schedule if ddim_discretize is None else ddim_discretize
        self._reset_levels()
        self.sampling_schedule = make_schedule(choice, ddim_num_steps, self.levels.alphas_cumprod, ddim_eta)
        self.ddim_eta = ddim_eta

    def _check_eta(self, eta: float) -> None:
        if eta != 0 and not self.supports_eta:
            raise ValueError(f"{type(self).__name__} does not support eta: it must be 0, not {eta}")

    @functools.cached_property
    def levels(self) -> NoiseLevels:
        """The model's noise levels."""
        return NoiseLevels(np.asarray(self.model.alphas_cumprod.detach().cpu().double()))  # MPS has no float64

    @functools.cached_property
    def _original_steps(self) -> Schedule:
        return original_schedule(self.levels.alphas_cumprod, self.ddim_eta)

    def _reset_levels(self) -> None:
        """Forget what was computed from the model's noise levels, which may have changed."""
        for name in ("levels", "_original_steps"):
            self.__dict__.pop(name, None)

    def _schedule(self, use_original_steps: bool) -> Schedule:
        if use_original_steps:
            return self._original_steps
        if not hasattr(self, "sampling_schedule"):
            raise ValueError("there is no schedule yet: call make_schedule or sample first")
        return self.sampling_schedule

    # ---- the update rule ----

    def predict(self, state: SamplerState, x: Tensor, t: float, alpha_bar: float) -> tuple[Tensor, Tensor]:
        """Evaluate the guided model on x (B, ...) at timestep t and noise level alpha_bar.

        Returns:
            (eps, x0), where x = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, except with CFG++, where eps is the
            unconditional one, to renoise x0 with.
        """
        batch_t = batch_of(t, x)
        outputs = ModelOutputs(state.model, x, batch_t, alpha_bar)
        output, uncond = state.guidance(outputs, state.guidance.scale_at(state.step))
        if state.score_corrector is not None:
            output = state.score_corrector(output, x, batch_t)
        eps, x0 = eps_and_x0(output, x, alpha_bar, self.parameterization)
        x0 = state.quantize_x0(x0) if state.quantize_x0 else x0
        if uncond is not None:
            eps, _ = eps_and_x0(uncond, x, alpha_bar, self.parameterization)
        if state.mask is not None and state.known_x0 is not None:  # the run then ends in the known data exactly
            x0 = blend(state.mask, state.known_x0, x0)
            eps = blend(state.mask, (x - sqrt(alpha_bar) * x0) / sqrt(1 - alpha_bar), eps)
        return eps, x0

    def step(self, state: SamplerState, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """One step from x (B, ...): (x at `step.alpha_bar_prev`, the predicted x0)."""
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
        schedule: ScheduleChoice | None = None,
        guidance: Guidance | None = None,
        noise: NoiseSource = global_noise,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Sample latents in S steps.

        Args:
            shape: (C, H, W) of a latent.
            conditioning, unconditional_conditioning, unconditional_guidance_scale: see `guidance`.
            callback, img_callback: called after every step as callback(i) and img_callback(pred_x0, i).
            quantize_x0: quantize each predicted x0 with the first stage's codebook.
            eta: noise of DDIM steps.
            mask, x0: keep the latents x0 (B, C, H, W) where the mask (B, 1, H, W) is 1.
            temperature, noise_dropout: scale and thin the noise that steps add.
            score_corrector, corrector_kwargs: an object whose `modify_score` changes each predicted eps.
            x_T: start from this latent instead of noise.
            log_every_t: record an intermediate every so many steps.
            ucg_schedule: a guidance scale per step.
            normals_sequence, dynamic_threshold: of the public signature; anything but None is refused.
            schedule: see `make_schedule`.
            guidance: a `Guidance` instead of a scale.
            noise: where random numbers come from, see `ldm.models.diffusion.noise`.

        Returns:
            Latents (batch_size, C, H, W), and {"x_inter": [...], "pred_x0": [...]}.
        """
        if kwargs and not self.legacy_public:
            raise TypeError(f"{type(self).__name__}.sample() got an unexpected keyword argument {next(iter(kwargs))!r}")
        size = condition_batch_size(conditioning)
        if size is not None and size != batch_size:
            logger.warning("Got %d conditionings for a batch of %d", size, batch_size)
        if normals_sequence is not None or dynamic_threshold is not None:
            raise ValueError("normals_sequence and dynamic_threshold are not supported: leave them out")
        self._check_mask(mask, x0)
        chosen = {} if schedule is None else {"ddim_discretize": schedule}
        self.make_schedule(ddim_num_steps=S, **chosen, ddim_eta=eta, verbose=verbose)
        if ucg_schedule is not None and len(ucg_schedule) != len(self.sampling_schedule):
            raise ValueError(f"ucg_schedule has {len(ucg_schedule)} scales for {len(self.sampling_schedule)} steps")
        if guidance is None:
            guidance = Guidance(unconditional_guidance_scale if ucg_schedule is None else ucg_schedule)
        return self._sample(
            conditioning,
            (batch_size, *shape),
            x_T,
            unconditional_conditioning,
            guidance,
            noise=noise,
            callback=callback,
            img_callback=img_callback,
            quantize_denoised=quantize_x0,
            mask=mask,
            x0=x0,
            log_every_t=log_every_t,
            temperature=temperature,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            verbose=verbose,
        )

    def _sample(
        self,
        cond: Condition,
        shape: Sequence[int],
        x_T: Tensor | None,
        uncond: Condition,
        guidance: Guidance,
        *,
        noise: NoiseSource,
        callback: Callable[[int], None] | None,
        img_callback: Callable[[Tensor, int], None] | None,
        quantize_denoised: bool,
        log_every_t: int,
        score_corrector: Any,
        corrector_kwargs: dict[str, Any] | None,
        verbose: bool,
        mask: Tensor | None,
        x0: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """`sample` along `self.sampling_schedule`; `options`: other fields of `SamplerState`."""
        options |= {"noise": noise, "mask": mask, "known_x0": x0}
        state = self._state(self.sampling_schedule, cond, uncond, guidance, **options)
        state.quantize_x0 = self._quantize if quantize_denoised else None
        state.score_corrector = self._corrector(score_corrector, cond, corrector_kwargs)
        x = noise(shape, self.model.device) if x_T is None else x_T
        intermediates = Intermediates(x, callback, img_callback, log_every_t)
        return self._denoise(state, x, intermediates, verbose), intermediates.images

    def _denoise(self, state: SamplerState, x: Tensor, intermediates: Intermediates, verbose: bool) -> Tensor:
        noise = None
        for i, step in enumerate(progress_bar(state.schedule.steps(), len(state.schedule), verbose)):
            state.step = i
            if state.mask is not None and state.known_x0 is not None:
                # the same noise at every step, or it would contradict what a multi-step rule remembers
                noise = state.randn_like(state.known_x0) if noise is None else noise
                x = blend(state.mask, add_noise(state.known_x0, noise, step.alpha_bar), x)
            x, pred_x0 = self.step(state, x, step)
            intermediates.record(x, pred_x0, i, step.remaining)
        return x

    # ---- image to image ----

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor | int, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        """Noise x0 (B, ...) to where `decode(..., t)` starts, t steps from the end; t is one number or (B,)."""
        noise = torch.randn_like(x0) if noise is None else noise
        schedule = self._schedule(use_original_steps)
        levels = np.append(schedule.alphas_cumprod_prev[0], schedule.alphas_cumprod)
        index = np.atleast_1d(torch.as_tensor(t).cpu().numpy()).clip(0, len(schedule))
        alpha_bar = torch.tensor(levels[index], dtype=torch.float32).to(x0.device).reshape(-1, *(1,) * (x0.ndim - 1))
        return alpha_bar.sqrt().to(x0.dtype) * x0 + (1 - alpha_bar).sqrt().to(x0.dtype) * noise

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
        """Denoise x_latent (B, C, H, W) along the last `t_start` steps of the schedule.

        mask, x0, guidance, noise, img_callback: as in `sample`.
        """
        self._check_mask(mask, x0)
        schedule = self._schedule(use_original_steps).until(t_start)
        guidance = guidance or Guidance(unconditional_guidance_scale)
        state = self._state(schedule, cond, unconditional_conditioning, guidance, noise=noise, mask=mask, known_x0=x0)
        return self._denoise(state, x_latent, Intermediates(x_latent, callback, img_callback), verbose)

    # ---- parts of a run ----

    def _state(
        self, schedule: Schedule, cond: Condition, uncond: Condition, guidance: Guidance, **options: Any
    ) -> SamplerState:
        self._check_guidance(guidance)
        return SamplerState(schedule, self._conditional(cond, uncond), guidance.over(len(schedule)), **options)

    def _check_guidance(self, guidance: Guidance) -> None:
        if guidance.cfg_pp and not self.cfg_pp:
            raise ValueError(f"CFG++ works with {', '.join(cfg_pp_samplers())}, not with {type(self).__name__}")

    @staticmethod
    def _check_mask(mask: Tensor | None, x0: Tensor | None) -> None:
        if mask is not None and x0 is None:
            raise ValueError("mask needs x0, the latents to keep where the mask is 1")

    def _conditional(self, cond: Condition, uncond: Condition) -> ConditionalModel:
        network = getattr(getattr(self.model, "model", None), "diffusion_model", None)
        middle_block = getattr(network, "middle_block", None)
        kind = self.parameterization
        return ConditionalModel(self.model.apply_model, cond, uncond, kind, middle_block, self.sequential_guidance)

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


def batch_of(t: float, x: Tensor) -> Tensor:
    """Timestep t for every item of x (B, ...): int64, or float32 where it is fractional."""
    return torch.full((x.shape[0],), t, device=x.device, dtype=torch.long if t == int(t) else torch.float32)


def progress_bar(steps: Iterable[Any], total: int, verbose: bool, desc: str = "Sampling") -> Iterable[Any]:
    """`steps` with a progress bar, if `verbose`."""
    bar: Iterable[Any] = tqdm(steps, desc=desc, total=total, disable=not verbose, leave=None)
    return bar
