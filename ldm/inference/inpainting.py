"""Fill holes in images, with inpainting models or with any text-to-image model by masking its sampling loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images import blend, check_mask, feathered, fit_mask, image_to_tensor
from ldm.inference.conditioning import MASK, TEXT, TEXT_AND_MASK, Conditioning, require, task_of
from ldm.inference.options import SamplingOptions
from ldm.inference.pipeline import (
    SIZE_MULTIPLE,
    OnStep,
    Pipeline,
    check_strength,
    first_stage_dtype,
    resize_to_multiple,
)
from ldm.inference.tiling import padded
from ldm.models.diffusion.noise import NoiseSource

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.special_models import LatentInpaintDiffusion

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
    options: SamplingOptions | None = None,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
    **overrides: Any,
) -> list[Image.Image]:
    """Fill the hole in `image`, once per prompt.

    Args:
        model: An inpainting model, with text or without; or a text-to-image model, which keeps the rest of the image
            by blending it in at every step.
        image: The image. With text, or with `height` and `width`, it is resized as `img2img` does.
        mask: (1, 1, H, W) from 0 to 1, of the image's proportions: fill where it is at least one half.
        prompts: Empty ones for models without text.
        strength: Below 1, start from `image` under that much noise, so that the result resembles what it replaces.
        feather: Width in pixels over which the result fades into `image` outside the mask.
        keep_unmasked: Keep the pixels of `image` outside the mask, bit for bit.
        options, noise, on_step, progress, **overrides: See `txt2img`; without text there is no guidance.

    Raises:
        ValueError: for what the model cannot do, and for masks of other proportions.
    """
    with_text = takes_text(model)
    check_strength(strength)
    check_mask(mask, image)
    if feather and not keep_unmasked:
        raise ValueError("feather blends with the pixels that keep_unmasked would keep: leave one of the two out")
    given = SamplingOptions.of(options, **overrides)
    if not with_text:
        _refuse_text(prompts, given)
    pipe = Pipeline(model)
    options = pipe.resolve(given, default_scale=7.5 if with_text else 1.0)
    noise = noise or options.noise(len(prompts))

    resized = with_text or given.height is not None or given.width is not None
    working = resize_to_multiple(model, image, given.height, given.width) if resized else image
    hole = fit_mask(mask, working.height, working.width)
    if not hole.any():
        logger.warning("the mask has no white in it, so there is nothing to fill")
    pixels, covered = image_to_tensor(working), hole
    if not with_text:
        multiple = math.lcm(SIZE_MULTIPLE, model.first_stage_model.downsampling_factor)
        pixels, covered = padded(pixels, multiple), padded(hole, multiple)
    with pipe.inference_mode(options):
        cond = _condition(pipe, pixels, covered, prompts, options, noise)
        cond = _with_init(pipe, cond, pixels, covered, len(prompts), strength, noise)
        images = pipe.decode(pipe.sample(cond, options, noise, on_step=on_step, progress=progress))
    images = [filled.crop((0, 0, *working.size)) for filled in images]
    soft = feathered(hole, feather)
    return [blend(working, filled, soft) for filled in images] if keep_unmasked else images


def takes_text(model: LatentDiffusion) -> bool:
    """Whether `model` fills holes according to a text; ValueError if it cannot fill any."""
    return require(model, TEXT, MASK, TEXT_AND_MASK) is not MASK


def _refuse_text(prompts: Sequence[str], options: SamplingOptions) -> None:
    plain = SamplingOptions()
    if (
        any(prompts)
        or any(options.negative_prompt)
        or options.scale not in (None, 1.0)
        or options.prompt_options != plain.prompt_options
    ):
        raise ValueError("this model fills holes without a text or guidance: leave prompts and scale out")


def _condition(
    pipe: Pipeline,
    pixels: Tensor,
    mask: Tensor,
    prompts: Sequence[str],
    options: SamplingOptions,
    noise: NoiseSource,
) -> Conditioning:
    """The condition for pixels (1, 3, H, W) in [-1, 1] and a mask (1, 1, H, W) of 0 and 1."""
    task, size = task_of(pipe.model), pipe.model.latent_size(*mask.shape[2:])
    shape = (len(prompts), pipe.model.channels, *size)
    if task is MASK:
        masked = _masked_latent(pipe.model, pixels, mask)
        return Conditioning(masked.expand(len(prompts), -1, -1, -1), shape=shape)
    cond = replace(pipe.encode_prompts(prompts, options), shape=shape)
    if task is TEXT:
        return cond
    model = cast("LatentInpaintDiffusion", pipe.model)
    parts = {
        model.masked_image_key: lambda: pipe.encode_pixels(pixels * (1 - mask), 1, noise),  # holes are mid gray
        "mask": lambda: F.interpolate(mask, size=size).to(model.device),
    }
    concat = torch.cat([parts[key]() for key in model.concat_keys], dim=1)
    return cond.with_parts(c_concat=concat.expand(len(prompts), -1, -1, -1))


def _masked_latent(model: LatentDiffusion, pixels: Tensor, mask: Tensor) -> Tensor:
    """The condition (1, C + 1, h, w) of models without text: the latent of the image with black holes, and the mask.

    As published, the mask is from -1 to 1, and the latent is not scaled.
    """
    masked = torch.where(mask > 0, -1.0, pixels).to(model.device, first_stage_dtype(model))
    latent = model.get_learned_conditioning(masked).float()
    return torch.cat([latent, F.interpolate(2 * mask - 1, latent.shape[2:]).to(latent.device)], dim=1)


def _with_init(
    pipe: Pipeline,
    cond: Conditioning,
    pixels: Tensor,
    mask: Tensor,
    batch: int,
    strength: float,
    noise: NoiseSource,
) -> Conditioning:
    """Add what sampling starts from at a strength below 1, and what a text-to-image model keeps outside the mask."""
    blended = task_of(pipe.model) is TEXT
    if not blended and strength == 1:
        return cond
    cond = replace(cond, init=pipe.encode_pixels(pixels, batch, noise), strength=strength)
    if not blended:
        return cond
    # Every latent that the mask touches is sampled. A soft edge belongs to the pixels alone: a blend of two noises
    # would have less variance than the network expects.
    free = F.adaptive_max_pool2d(mask, pipe.model.latent_size(*mask.shape[2:])).to(pipe.model.device)
    return replace(cond, mask=1 - free)
