"""What every way of drawing is made of: seeds, sizes, conditions, a run of a sampler, decoding."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.acceleration import cache_contexts, refresh, unloading
from ldm.checkpoint import check_unchanged
from ldm.images import fit_to_multiple, tensor_to_images
from ldm.inference.prompts import DEFAULT_PROMPT_OPTIONS, PromptOptions, negative_prompts, text_contexts
from ldm.inference.shortcuts import Shortcuts
from ldm.models.diffusion.gaussian import square
from ldm.models.diffusion.guidance import Condition, Guidance
from ldm.models.diffusion.noise import NoiseSource, global_noise
from ldm.models.diffusion.samplers import make_sampler
from ldm.models.diffusion.schedules import ScheduleChoice

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

OnStep = Callable[[Tensor, int, int], None]  # (latents expected to come out, step from 1, of how many)


def seed_everything(seed: int) -> None:
    """Start all random numbers (Python's, numpy's, torch's on every device) at `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- sizes ----


def default_size(model: LatentDiffusion) -> int:
    """The side in pixels that a model was made for."""
    info = getattr(model, "info", None)
    if info and info.sampling.size:
        return int(info.sampling.size)  # Stable Diffusion v2's config of 768 pixels has the image_size of 512
    factor: int = model.first_stage_model.downsampling_factor
    return square(model.image_size)[0] * factor


def resolve_size(model: LatentDiffusion, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """(height, width) with the model's own where None; ValueError, naming the nearest sizes, if it cannot take them."""
    side = default_size(model)
    size = (side if height is None else height, side if width is None else width)
    model.latent_size(*size)
    return size


def fit(model: LatentDiffusion, image: Image.Image, height: int | None = None, width: int | None = None) -> Image.Image:
    """`image` at a size that the model can take: the one asked for, or its own, floored to a multiple of 32.

    A model of one scale (`one_scale: true` in its config, as the bundled one's) has pictures brought to that.
    """
    factor = model.first_stage_model.downsampling_factor
    if height is not None or width is not None:
        model.latent_size(height or factor, width or factor)
        return fit_to_multiple(image, factor, height=height, width=width)
    ratio = default_size(model) / min(image.size) if model.info and model.info.one_scale else 1.0
    height, width = round(image.height * ratio), round(image.width * ratio)
    if ratio != 1.0 and max(height, width) > 8 * default_size(model):
        raise ValueError(f"a picture of {image.width}x{image.height} would become {width}x{height}: crop it first")
    return fit_to_multiple(image, math.lcm(32, factor), height, width)  # 32 as in the public script


def check_strength(strength: float) -> None:
    """ValueError unless `strength` is from 0 to 1."""
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be from 0 to 1, not {strength}")


@dataclass(frozen=True)
class Guided:
    """What to draw under: a condition, the one that guidance leads away from (None: no such), and the guidance."""

    cond: Condition
    uncond: Condition = None
    guidance: Guidance = Guidance()

    def beside(
        self, c_concat: Tensor | None = None, c_adm: Tensor | None = None, uncond_adm: Tensor | None = None
    ) -> Guided:
        """The same, of a context, with what else a hybrid network takes: it is the same with and without condition.

        uncond_adm: what stands in place of `c_adm` without condition, if that differs.
        """
        without = c_adm if uncond_adm is None else uncond_adm
        uncond = None if self.uncond is None else _parts(self.uncond, c_concat, without)
        return replace(self, cond=_parts(self.cond, c_concat, c_adm), uncond=uncond)


def _parts(context: Condition, c_concat: Tensor | None, c_adm: Tensor | None) -> dict[str, Any]:
    parts = {"c_crossattn": [context], "c_concat": None if c_concat is None else [c_concat], "c_adm": c_adm}
    return {name: part for name, part in parts.items() if part is not None}


@contextlib.contextmanager
def drawing(model: LatentDiffusion) -> Iterator[None]:
    """How a model computes while it draws one batch: in its precision, with its averaged weights, without gradients,
    and with such shortcuts as `model.shortcuts` says (see `Shortcuts`)."""
    check_unchanged(model)
    dtype = model.info.autocast_dtype if model.info else None
    precision = torch.autocast(model.device.type, dtype=dtype) if dtype else contextlib.nullcontext()
    shortcuts, network = getattr(model, "shortcuts", Shortcuts()), model.model.diffusion_model
    refresh(model)
    with (
        torch.no_grad(),
        precision,
        model.ema_scope(),
        unloading(model),  # before averaged weights are changed back
        shortcuts.taken(network),
        cache_contexts(network),
    ):
        yield
    check_unchanged(model)  # what was drawn with half of a new file is not shown


def text_condition(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str],
    guidance: Guidance,
    reading: PromptOptions = DEFAULT_PROMPT_OPTIONS,
) -> Guided:
    """The prompts' encodings (B, L, D), and those of the negative prompts, if guidance is to lead away from them.

    negative_prompt: one for all, or one a prompt. reading: other ways to read both (see `PromptOptions`).
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one text")
    negatives = negative_prompts(negative_prompt, len(prompts))
    if not guidance.needs_uncond and any(negatives):
        logger.warning("the negative prompt has no effect at scale 1, which is without guidance")
    cond, uncond = text_contexts(model, prompts, negatives if guidance.needs_uncond else None, reading)
    return Guided(cond, uncond, guidance)


def draw(
    model: LatentDiffusion | Any,
    guided: Guided,
    shape: Sequence[int],
    batch_size: int,
    *,
    steps: int,
    sampler: str,
    eta: float = 0.0,
    on_step: OnStep | None = None,
    progress: bool = True,
    **options: Any,
) -> Tensor:
    """Latents (batch_size, *shape) from noise. `options` are others of `Sampler.sample`: schedule, x_T, mask ...

    model: a LatentDiffusion, or what looks like one to a sampler. on_step: see `txt2img`.
    """
    solver = make_sampler(model, sampler)
    if on_step is not None:
        options["img_callback"] = lambda x0, i: on_step(x0, i + 1, len(solver.steps))
    latents, _ = solver.sample(
        S=steps,
        batch_size=batch_size,
        shape=shape,
        conditioning=guided.cond,
        unconditional_conditioning=guided.uncond,
        guidance=guided.guidance,
        eta=eta,
        verbose=progress,
        **options,
    )
    return latents


def redraw(
    model: LatentDiffusion,
    guided: Guided,
    latents: Tensor,
    strength: float,
    *,
    steps: int,
    sampler: str,
    eta: float = 0.0,
    schedule: ScheduleChoice | None = None,
    noise: NoiseSource = global_noise,
    on_step: OnStep | None = None,
    progress: bool = True,
    **options: Any,
) -> Tensor:
    """Latents (B, C, h, w) noised by `strength` of the schedule, and drawn anew from there (SDEdit).

    `options` are further ones of `Sampler.decode`: mask, x0. on_step: see `txt2img`.
    """
    solver = make_sampler(model, sampler)
    solver.make_schedule(steps, schedule, ddim_eta=eta, verbose=False)
    count = int(strength * steps)
    if count == 0:
        return latents
    if on_step is not None:
        total = len(solver.steps.until(count))
        options["img_callback"] = lambda x0, i: on_step(x0, i + 1, total)
    noised = solver.stochastic_encode(latents, count, noise=noise(latents.shape, latents.device))
    return solver.decode(
        noised,
        guided.cond,
        count,
        unconditional_conditioning=guided.uncond,
        guidance=guided.guidance,
        noise=noise,
        verbose=progress,
        **options,
    )


def decode(model: LatentDiffusion | Any, latents: Tensor) -> list[Image.Image]:
    """Pictures of latents (B, C, h, w), decoded one by one, since that is where memory peaks."""
    check_finite(latents, "the latents")
    images: list[Image.Image] = []
    for latent in torch.split(latents.to(first_stage_dtype(model)), 1):
        pixels = model.decode_first_stage(latent).float()  # (1, 3, H, W)
        check_finite(pixels, "the picture")
        images += tensor_to_images(pixels)
    return images


def first_stage_dtype(model: LatentDiffusion) -> torch.dtype:
    """The precision of the first stage's weights."""
    return next((parameter.dtype for parameter in model.first_stage_model.parameters()), torch.float32)


def check_finite(x: Tensor, what: str) -> None:
    """ArithmeticError, saying what to try, unless all of `x`, which is `what` in words, is finite."""
    if not torch.isfinite(x).all():
        raise ArithmeticError(
            f"{what} came out as NaN or infinite, and would be black: try --precision full, or another checkpoint"
        )
