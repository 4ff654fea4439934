"""Text to image, and image to image with text (SDEdit) or with text and a depth map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ldm.images import image_to_tensor
from ldm.inference.conditioning import TEXT, TEXT_AND_DEPTH, require, task_of
from ldm.inference.options import SamplingOptions
from ldm.inference.pipeline import OnStep, Pipeline, check_strength, resize_to_multiple
from ldm.models.diffusion.noise import NoiseSource, global_noise

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.special_models import LatentDepth2ImageDiffusion


def txt2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    *,
    options: SamplingOptions | None = None,
    noise: NoiseSource | None = None,
    start_code: Tensor | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
    **overrides: Any,
) -> list[Image.Image]:
    """Generate one image per prompt, as one batch.

    Args:
        model: A text-conditional model from `load_model`.
        prompts: At least one.
        options: See `SamplingOptions`; what they leave open is the model's default, else 50 steps of "ddim" at scale
            7.5.
        noise: Where random numbers come from, instead of the options' seed.
        start_code: Latents (B, C, h, w) to start from instead of noise.
        on_step: Called after every step with (predicted latents x0, step from 1, number of steps).
        progress: Show a progress bar.
        **overrides: Fields of `SamplingOptions`, such as `seed=42, steps=20`.

    Returns:
        Images of the options' size.

    Raises:
        ValueError: for options that do not exist, do not go together, or do not suit the model.
        ArithmeticError: if latents or images are not finite.
    """
    given: dict[str, Any] = {"noise": noise, "start_code": start_code, "on_step": on_step, "progress": progress}
    return Pipeline(model)(prompts, options, **given, **overrides)


@torch.no_grad()
def img2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    init: Image.Image | Tensor,
    *,
    strength: float = 0.75,
    depth: Tensor | None = None,
    options: SamplingOptions | None = None,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
    **overrides: Any,
) -> list[Image.Image]:
    """Generate one image per prompt from an initial image (SDEdit, Meng et al. 2022).

    Args:
        model: A model conditioned on text, or on text and depth.
        prompts: At least one.
        init: An image, resized to the options' size or by default to its own floored to a multiple of 32; or its
            latents (B, C, h, w) from `encode_image`.
        strength: Fraction of the schedule to apply: 0 returns the first stage's reconstruction, 1 keeps almost nothing.
        depth: For depth-to-image models, the condition (1, 1, h, w) from `depth_map`; by default estimated.
        options, noise, on_step, progress, **overrides: See `txt2img`; the default scale is 5.
    """
    task = require(model, TEXT, TEXT_AND_DEPTH)
    check_strength(strength)
    pipe = Pipeline(model)
    options = pipe.resolve(options, default_scale=5.0, **overrides)
    noise = noise or options.noise(len(prompts))
    latents = init if isinstance(init, Tensor) else pipe.encode_image(init, len(prompts), options, noise)
    if len(latents) != len(prompts):
        raise ValueError(f"init has {len(latents)} latents for {len(prompts)} prompts")
    if depth is not None and task is not TEXT_AND_DEPTH:
        raise ValueError("a depth map has no effect on this model: leave it out, or use a depth-to-image model")
    if depth is None and task is TEXT_AND_DEPTH:
        if isinstance(init, Tensor):
            raise ValueError("depth cannot be estimated from latents: give `depth`, from depth_map")
        depth = depth_map(model, init, size=latents.shape[2:])
    with pipe.inference_mode(options):
        cond = pipe.encode_prompts(prompts, options)
        if depth is not None:
            cond = cond.with_parts(c_concat=depth.expand(len(prompts), -1, -1, -1))
        cond = replace(cond, init=latents, strength=strength)
        return pipe.decode(pipe.sample(cond, options, noise, on_step=on_step, progress=progress))


def needs_depth(model: LatentDiffusion) -> bool:
    """Whether `model` is conditioned on a depth map beside a prompt."""
    return task_of(model) is TEXT_AND_DEPTH


@torch.no_grad()
def depth_map(
    model: LatentDiffusion, image: Image.Image, depth: Tensor | None = None, size: Sequence[int] | None = None
) -> Tensor:
    """The condition (1, 1, h, w) of a depth-to-image model.

    Args:
        model: A depth-to-image model.
        image: The image to estimate depth from.
        depth: (1, 1, H, W), larger is nearer, on any scale; None: the model's estimator looks at `image`.
        size: (h, w) of the latents; by default those of the fitted image.
    """
    require(model, TEXT_AND_DEPTH)
    with_depth = cast("LatentDepth2ImageDiffusion", model)
    if size is None:
        fitted = resize_to_multiple(model, image)
        size = model.latent_size(fitted.height, fitted.width)
    with Pipeline(model).lock:
        if depth is None:
            depth = with_depth.estimate_depth(image_to_tensor(image).to(model.device))
        return with_depth.depth_condition(depth.to(model.device), size)


def encode_image(
    model: LatentDiffusion,
    image: Image.Image,
    batch: int = 1,
    options: SamplingOptions | None = None,
    noise: NoiseSource = global_noise,
    **overrides: Any,
) -> Tensor:
    """Latents (batch, C, h, w) of one image, each its own sample of the first stage's posterior.

    The image is resized as `img2img` does. The noise is generated on the CPU.
    """
    return Pipeline(model).encode_image(image, batch, SamplingOptions.of(options, **overrides), noise)
