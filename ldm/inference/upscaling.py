"""Upscale images by the first stage's factor (4), in overlapping tiles where they are large."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ldm.images import image_to_tensor
from ldm.inference.conditioning import SMALL_IMAGE, SMALL_IMAGE_AND_TEXT, Conditioning, require
from ldm.inference.options import SamplingOptions
from ldm.inference.pipeline import OnStep, Pipeline, first_stage_dtype
from ldm.inference.tiling import padded, tiled
from ldm.models.diffusion.batches import image_sides
from ldm.models.diffusion.guidance import Condition
from ldm.models.diffusion.noise import NoiseSource
from ldm.models.diffusion.sampler import MODEL_ATTRIBUTES

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.special_models import LatentUpscaleDiffusion

MULTIPLE = 8  # both networks downsample three times, and were trained on sizes that divide evenly
NOISE_LEVEL = 20  # the public default


@torch.no_grad()
def upscale(
    model: LatentDiffusion,
    images: Sequence[Image.Image],
    prompts: Sequence[str] | None = None,
    *,
    noise_level: int | None = None,
    tile: int | None = None,
    options: SamplingOptions | None = None,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
    **overrides: Any,
) -> list[Image.Image]:
    """Upscale images of one size, as one batch.

    Args:
        model: The Stable Diffusion x4 upscaler, or a super-resolution model without text (bsr_sr).
        images: The small images.
        prompts: What each image shows; None for nothing in particular.
        noise_level: Noise added to the small images, from 0 (trust them) to the model's `max_noise_level`; default 20.
        tile: Longest side, in small pixels, to sample at once; default twice the model's own, 0 for no tiles. Larger
            images are sampled in overlapping tiles (see `TiledModel`).
        options, noise, on_step, progress, **overrides: See `txt2img`; the default scale is 9.

    Raises:
        ValueError: for what the model cannot do, such as text for bsr_sr.
        ArithmeticError: if latents or images are not finite.
    """
    with_text = takes_prompt(model)
    if not images or len({image.size for image in images}) > 1:
        raise ValueError(f"upscale takes images of one size, not of {[image.size for image in images]}")
    given = SamplingOptions.of(options, **overrides)
    if with_text:
        noise_level = NOISE_LEVEL if noise_level is None else noise_level
    else:
        _refuse(
            prompt=prompts, negative_prompt=given.negative_prompt or None, noise_level=noise_level, scale=given.scale
        )
    pipe = Pipeline(model)
    options = pipe.resolve(given, default_scale=9.0 if with_text else 1.0)
    noise = noise or options.noise(len(images))
    pipe.sampling_model = TiledModel(model, 2 * max(image_sides(model.image_size)) if tile is None else tile, progress)
    x = padded(torch.cat([image_to_tensor(image) for image in images]), MULTIPLE).to(model.device)  # (B, 3, h, w)
    with pipe.lock:
        with pipe.inference_mode(options):
            cond = _condition(pipe, x, prompts, noise_level, options, noise)
            cond = replace(cond, shape=(len(images), model.channels, *x.shape[2:]))
            latents = pipe.sample(cond, options, noise, on_step=on_step, progress=progress)
        if first_stage_dtype(model) == torch.float16:
            model.first_stage_model.float()  # the published one overflows half precision
        decoded = pipe.decode(latents)
    factor = model.first_stage_model.downsampling_factor
    size = (images[0].width * factor, images[0].height * factor)
    return [image.crop((0, 0, *size)) for image in decoded]


def takes_prompt(model: LatentDiffusion) -> bool:
    """Whether an upscaling model takes text, and so guidance and noise levels; ValueError for other models."""
    return require(model, SMALL_IMAGE_AND_TEXT, SMALL_IMAGE) is SMALL_IMAGE_AND_TEXT


def _refuse(**options: Any) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"this model is conditioned on a small image alone: leave out {', '.join(given)}")


def _condition(
    pipe: Pipeline,
    x: Tensor,
    prompts: Sequence[str] | None,
    noise_level: int | None,
    options: SamplingOptions,
    noise: NoiseSource,
) -> Conditioning:
    """The condition for small images x (B, 3, h, w)."""
    if noise_level is None:
        return Conditioning({"c_concat": [pipe.model.get_learned_conditioning(x)]})
    prompts = [""] * len(x) if prompts is None else prompts
    if len(prompts) != len(x):
        raise ValueError(f"every image needs its prompt: there are {len(x)} images and {len(prompts)} prompts")
    noised, level = cast("LatentUpscaleDiffusion", pipe.model).low_scale_condition(x, noise_level, noise)
    return pipe.encode_prompts(prompts, options).with_parts(c_concat=noised, c_adm=level)


class TiledModel:
    """A model whose network sees large latents in overlapping tiles, as samplers and `Pipeline.decode` use it.

    At every step the network sees each tile of the one noisy latent with that tile's part of `c_concat`, and its
    predictions are blended before the sampler goes on, so tiles never drift apart. MultiDiffusion (Bar-Tal et al. 2023,
    arXiv:2302.08113) blends the results of the step, which is the same for steps that are linear in the predictions.

    Args:
        model: A model conditioned on `c_concat`.
        tile: Longest side of a tile in latents; 0 for no tiles.
        progress: Show a progress bar while decoding.
    """

    def __init__(self, model: LatentDiffusion, tile: int, progress: bool = True) -> None:
        for name in (*MODEL_ATTRIBUTES, "first_stage_model"):
            setattr(self, name, getattr(model, name))
        self._model = model
        self._tile = tile
        self._progress = progress

    @property
    def model(self) -> Any:
        """The model's network, for perturbed-attention guidance."""
        return self._model.model

    def apply_model(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The model's prediction for x (B, C, h, w) with a condition dict that has `c_concat`."""
        channels = x.shape[1]

        def predict(part: Tensor) -> Tensor:
            tile_cond = {**cond, "c_concat": [part[:, channels:]]}
            prediction: Tensor = self._model.apply_model(part[:, :channels], t, tile_cond)
            return prediction

        return tiled(predict, torch.cat([x, *cond["c_concat"]], dim=1), self._tile, multiple=MULTIPLE)

    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Decode z (B, C, h, w) to images (B, 3, f h, f w)."""
        progress = "Decoding" if self._progress else None
        return tiled(self._model.decode_first_stage, z, self._tile, progress=progress)
