"""Inpainting: filling a hole in a picture, with models made for it, or with any model of text by masking its loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images import blend, check_mask, feathered, fit_mask, image_to_tensor
from ldm.inference.conditioning import MASK, TEXT, TEXT_AND_MASK, require, task_of
from ldm.inference.loading import sampling_plan
from ldm.inference.pipeline import (
    Guided,
    check_strength,
    decode,
    draw,
    drawing,
    first_stage_dtype,
    fit,
    redraw,
    seed_everything,
    text_condition,
)
from ldm.inference.prompts import DEFAULT_PROMPT_OPTIONS, PromptOptions
from ldm.inference.text_to_image import encode_pixels
from ldm.inference.tiling import padded
from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.schedules import ScheduleChoice

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.inpainting import LatentInpaintDiffusion

logger = logging.getLogger(__name__)


@torch.no_grad()
def inpaint(
    model: LatentDiffusion,
    image: Image.Image,
    mask: Tensor,
    prompts: Sequence[str] = ("",),
    *,
    strength: float = 1.0,
    feather: int = 0,
    keep_unmasked: bool = True,
    negative_prompt: str | Sequence[str] = "",
    reading: PromptOptions = DEFAULT_PROMPT_OPTIONS,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    scale: float | Sequence[float] | None = None,
    schedule: ScheduleChoice | None = None,
    guidance: Mapping[str, Any] | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """One picture a prompt: `image`, but for where `mask` (1, 1, H, W), from 0 to 1, is a half or more.

    `model` is one for inpainting, with text or without (prompts are then empty), or any of text to picture, which has
    the rest of the picture put before it at every step. Without text the result is as large as `image`; with text, or
    with `height` and `width`, it has the size that `img2img` would give it, and so has the `image` spoken of here.

    strength: below 1 the start is `image` under so much noise, and what is drawn resembles what it replaces.
    keep_unmasked: outside the mask the pixels are those of `image`, bit for bit, else what the first stage makes of
    them. feather: over so many pixels outside the mask, what is drawn goes over into `image`. The rest as in `txt2img`.

    Raises ValueError for what the model cannot do, and for a mask of other proportions than the picture's.
    """
    textless = not takes_text(model)
    check_strength(strength)
    check_mask(mask, image)
    if feather and not keep_unmasked:
        raise ValueError("feather blends with the pixels that keep_unmasked would keep: leave one of the two out")
    if textless and (
        any(prompts) or any(negative_prompt) or scale not in (None, 1.0) or reading != DEFAULT_PROMPT_OPTIONS
    ):
        raise ValueError("this model fills holes without a text or guidance: leave prompts and scale out")
    public_scale = 1.0 if textless else 7.5
    how, guided_by = sampling_plan(model, public_scale, steps, sampler, scale, eta, schedule, guidance)
    if seed is not None:
        seed_everything(seed)

    working = image if textless and height is None and width is None else fit(model, image, height, width)
    hole = fit_mask(mask, working.height, working.width)
    if not hole.any():
        logger.warning("the mask has no white in it, so there is nothing to fill")
    pixels, covered = image_to_tensor(working), hole
    if textless:
        multiple = math.lcm(32, model.first_stage_model.downsampling_factor)  # as in `fit`, which resizes
        pixels, covered = padded(pixels, multiple), padded(hole, multiple)
    with drawing(model):
        guided = _condition(model, pixels, covered, prompts, negative_prompt, guided_by, reading)
        latents = _latents(model, guided, pixels, covered, len(prompts), strength, **how, progress=progress)
        images = decode(model, latents)
    images = [drawn.crop((0, 0, *working.size)) for drawn in images]
    soft = feathered(hole, feather)
    return [blend(working, drawn, soft) for drawn in images] if keep_unmasked else images


def takes_text(model: LatentDiffusion) -> bool:
    """Whether `model` fills holes as a text says; ValueError if it cannot fill any."""
    return require(model, TEXT, MASK, TEXT_AND_MASK) is not MASK


def _condition(
    model: LatentDiffusion,
    pixels: Tensor,
    mask: Tensor,
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str],
    guidance: Guidance,
    reading: PromptOptions,
) -> Guided:
    """What to draw under: for pixels (1, 3, H, W) from -1 to 1, and a mask (1, 1, H, W) of 0 and 1."""
    task = task_of(model)
    if task is MASK:
        return Guided(_masked_latent(model, pixels, mask).expand(len(prompts), -1, -1, -1), guidance=guidance)
    guided = text_condition(model, prompts, negative_prompt, guidance, reading)
    if task is TEXT:
        return guided
    batch = {"mask": mask.movedim(1, -1), "masked_image": (pixels * (1 - mask)).movedim(1, -1)}  # holes are mid grey
    concat = cast("LatentInpaintDiffusion", model).concat_condition(batch, model.latent_size(*mask.shape[2:]))
    return guided.beside(c_concat=concat.expand(len(prompts), -1, -1, -1))


def _masked_latent(model: LatentDiffusion, pixels: Tensor, mask: Tensor) -> Tensor:
    """The condition (1, C + 1, h, w) of models without text: the picture with black holes as a latent, and the mask.

    As published, the mask is from -1 to 1, and the latent is not scaled.
    """
    masked = torch.where(mask > 0, -1.0, pixels).to(model.device, first_stage_dtype(model))
    latent = model.get_learned_conditioning(masked).float()
    return torch.cat([latent, F.interpolate(2 * mask - 1, latent.shape[2:]).to(latent.device)], dim=1)


def _latents(
    model: LatentDiffusion,
    guided: Guided,
    pixels: Tensor,
    mask: Tensor,
    batch: int,
    strength: float,
    **options: Any,
) -> Tensor:
    """Latents (batch, C, h, w) under `guided`: from noise, or from those of the pixels at a strength below 1."""
    size = model.latent_size(*mask.shape[2:])
    looped = task_of(model) is TEXT
    if looped or strength < 1:
        start = encode_pixels(model, pixels, batch)
    if looped:
        # Whatever latent the mask touches is drawn anew. A soft edge belongs to the pixels alone: a blend of two noises
        # would have less variance than the network expects.
        free = F.adaptive_max_pool2d(mask, size).to(model.device)
        options |= {"mask": 1 - free, "x0": start}
    if strength < 1:
        return redraw(model, guided, start, strength, **options)
    return draw(model, guided, (model.channels, *size), batch, **options)
