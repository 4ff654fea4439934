"""Variations of an image with Stable unCLIP, which is conditioned on its CLIP embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ldm.images import image_to_tensor
from ldm.inference.conditioning import IMAGE, require
from ldm.inference.options import SamplingOptions
from ldm.inference.pipeline import OnStep, Pipeline
from ldm.models.diffusion.noise import NoiseSource

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.special_models import ImageEmbeddingConditionedLatentDiffusion


@torch.no_grad()
def image_embedding(
    model: LatentDiffusion, images: Sequence[Image.Image], weights: Sequence[float] | None = None
) -> Tensor:
    """The CLIP embedding (1, D) of an image, or the weighted mean of several; weights need not add up to 1.

    Raises:
        ValueError: for no image, or weights that are not one per image, at least 0 and not all 0.
    """
    require(model, IMAGE)
    if not images:
        raise ValueError("variations need at least one image")
    check_weights(weights, len(images))
    unclip = cast("ImageEmbeddingConditionedLatentDiffusion", model)
    with Pipeline(model).inference_mode(SamplingOptions()):
        embeddings = torch.cat([unclip.embed_images(image_to_tensor(image).to(model.device)) for image in images])
    w = embeddings.new_tensor([1.0] * len(images) if weights is None else weights)
    return (w[:, None] * embeddings).sum(dim=0, keepdim=True) / w.sum()


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """Raise ValueError unless `weights` can weigh `count` images."""
    if weights is not None and (len(weights) != count or min(weights) < 0 or not sum(weights)):
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"{count} images need {count} weights of at least 0, not all 0; they are {given}")


@torch.no_grad()
def variations(
    model: LatentDiffusion,
    images: Sequence[Image.Image] | Tensor,
    prompts: Sequence[str],
    *,
    noise_level: int = 0,
    options: SamplingOptions | None = None,
    noise: NoiseSource | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
    **overrides: Any,
) -> list[Image.Image]:
    """Generate one variation of `images` per prompt, as one batch.

    Args:
        model: A Stable unCLIP model.
        images: Images, or an `image_embedding` (1, D) of them.
        prompts: May be empty texts.
        noise_level: Noise added to the embedding, from 0 to 999 for the public models: how freely to vary.
        options, noise, on_step, progress, **overrides: See `txt2img`; the default scale is 10. Guidance leads away from
            the negative prompt without an image.
    """
    require(model, IMAGE)
    pipe = Pipeline(model)
    options = pipe.resolve(options, default_scale=10.0, **overrides)
    noise = noise or options.noise(len(prompts))
    pipe.latent_shape(len(prompts), options)
    embedding = images if isinstance(images, Tensor) else image_embedding(model, images)
    unclip = cast("ImageEmbeddingConditionedLatentDiffusion", model)
    with pipe.inference_mode(options):
        c_adm = unclip.embedding_condition(embedding.expand(len(prompts), -1), noise_level, noise)
        cond = pipe.encode_prompts(prompts, options).with_parts(c_adm=c_adm, uncond_adm=torch.zeros_like(c_adm))
        return pipe.decode(pipe.sample(cond, options, noise, on_step=on_step, progress=progress))
