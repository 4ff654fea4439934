"""Images from noise alone, from class labels, from layouts and from segmentation maps.

All four functions take `options, noise, on_step, progress, **overrides` as `txt2img` does; without classes the only
guidance is `pag`. Besides the samplers of `txt2img` there is "ancestral": all timesteps (Ho et al. 2020, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.data.layouts import Box, LayoutTokens
from ldm.data.segmentation import one_hot_map
from ldm.inference.conditioning import CLASSES, LAYOUT, NOTHING, SEGMENTATION, Conditioning, require
from ldm.inference.options import SamplingOptions
from ldm.inference.pipeline import OnStep, Pipeline
from ldm.models.diffusion.batches import image_sides
from ldm.models.diffusion.guidance import Condition
from ldm.models.diffusion.noise import NoiseSource

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

ANCESTRAL = "ancestral"


def noise2img(model: LatentDiffusion, count: int, **options: Any) -> list[Image.Image]:
    """Generate `count` images with an unconditional model, as one batch."""
    require(model, NOTHING)
    return _generate(model, lambda: None, count, **options)


def class2img(
    model: LatentDiffusion, labels: Sequence[int], *, null_class: int | None = None, **options: Any
) -> list[Image.Image]:
    """Generate one image per class label, as one batch.

    Args:
        model: A class-conditional model.
        labels: Class numbers.
        null_class: The class that means none, for guidance; by default the one that training dropped labels to
            (`ucg_training`), or class 1000 of ImageNet models with 1001.
        **options: As in `txt2img`; the default scale is 1. ImageNet's cin256-v2 works well at scale 3 with 20 steps.

    Raises:
        ValueError: for classes that the model does not have, or if guidance needs a null class and there is none.
    """
    check_labels(model, labels if null_class is None else [*labels, null_class])

    def encode() -> Condition:
        return model.get_learned_conditioning({model.cond_stage_key: torch.tensor(labels, device=model.device)})

    uncond = partial(model.get_unconditional_conditioning, len(labels), null_class)
    return _generate(model, encode, len(labels), uncond=uncond, **options)


def check_labels(model: LatentDiffusion, labels: Sequence[int]) -> None:
    """Raise ValueError unless `model` is class-conditional and has these classes."""
    require(model, CLASSES)
    count = getattr(model.cond_stage_model, "n_classes", None) or model.model.diffusion_model.num_classes
    if wrong := [label for label in labels if not 0 <= label < count]:
        raise ValueError(f"this model's classes are 0 to {count - 1}; there is no class {wrong[0]}")


def layout2img(model: LatentDiffusion, tokens: Tensor, **options: Any) -> list[Image.Image]:
    """Generate one image per layout, as one batch. tokens: (B, L) from `layout_tokens`."""
    require(model, LAYOUT)
    return _generate(model, lambda: model.get_learned_conditioning(tokens.to(model.device)), len(tokens), **options)


def layout_tokens(model: LatentDiffusion, layouts: Sequence[Sequence[Box]]) -> Tensor:
    """Tokenize layouts to (B, L); ValueError, with the reason, for a layout that the model cannot represent."""
    require(model, LAYOUT)
    transformer = model.cond_stage_model.transformer
    return LayoutTokens(transformer.token_emb.num_embeddings, transformer.max_seq_len).tensor(layouts)


def segmentation2img(model: LatentDiffusion, ids: Tensor, count: int = 1, **options: Any) -> list[Image.Image]:
    """Generate `count` images of one segmentation map, as one batch, at the map's size floored to a valid one.

    Args:
        model: A model for semantic synthesis.
        ids: Class of every pixel (H, W), from 0.
        count: Number of images.
        **options: As in `txt2img`.
    """
    require(model, SEGMENTATION)
    network, mapper = model.model.diffusion_model, model.cond_stage_model.channel_mapper
    classes = network.in_channels - model.channels if mapper is None else mapper.in_channels
    planes = one_hot_map(ids, classes, model.first_stage_model.downsampling_factor)
    planes = planes.to(model.device, next(network.parameters()).dtype)

    def encode() -> Condition:
        return model.get_learned_conditioning(planes).expand(count, -1, -1, -1)  # (B, C, h, w)

    return _generate(model, encode, count, model.latent_size(*planes.shape[2:]), **options)


@torch.no_grad()
def _generate(
    model: LatentDiffusion,
    encode: Callable[[], Condition],
    count: int,
    size: tuple[int, int] | None = None,
    *,
    uncond: Callable[[], Condition] | None = None,
    options: SamplingOptions | None = None,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
    **overrides: Any,
) -> list[Image.Image]:
    """Generate `count` images. size: (h, w) of the latents, by default the model's own; uncond: None for no scale."""
    given = SamplingOptions.of(options, **overrides)
    if uncond is None:
        if given.scale not in (None, 1.0):
            raise ValueError(f"guidance leads towards a class, and this model has none: leave scale={given.scale} out")
        given = SamplingOptions.of(given, scale=1.0)
    pipe = Pipeline(model)
    options = pipe.resolve(given, default_scale=1.0)
    noise = noise or options.noise(count)
    shape = (count, model.channels, *(size or image_sides(model.image_size)))
    with pipe.inference_mode(options):
        cond = encode()
        if options.sampler == ANCESTRAL:
            return pipe.decode(_ancestral(model, cond, shape, options, noise, progress))
        guided = uncond is not None and options.guidance.needs_uncond
        conditioning = Conditioning(cond, uncond() if uncond and guided else None, shape)
        return pipe.decode(pipe.sample(conditioning, options, noise, on_step=on_step, progress=progress))


def _ancestral(
    model: LatentDiffusion,
    cond: Condition,
    shape: Sequence[int],
    options: SamplingOptions,
    noise: NoiseSource,
    progress: bool,
) -> Tensor:
    if options.scale != 1.0 or options.terms or options.interval or options.cfg_pp or options.schedule is not None:
        raise ValueError(
            "ancestral sampling has no guidance: use scale 1, or DDIM, with eta 1 for its noise; nor another schedule"
        )
    latents: Tensor = model.p_sample_loop(cond, shape, verbose=progress, noise=noise)
    return latents
