"""Variations of a picture by Stable unCLIP: what CLIP sees in it, drawn anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ldm.images import image_to_tensor
from ldm.inference.conditioning import PICTURE, require
from ldm.inference.loading import sampling_plan
from ldm.inference.pipeline import decode, draw, drawing, resolve_size, seed_everything, text_condition
from ldm.models.diffusion.schedules import ScheduleChoice

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.unclip import ImageEmbeddingConditionedLatentDiffusion


@torch.no_grad()
def picture_embedding(
    model: LatentDiffusion, images: Sequence[Image.Image], weights: Sequence[float] | None = None
) -> Tensor:
    """The embedding (1, D) of a picture, or the mean of several pictures' by `weights`, which need not add up to 1.

    Raises ValueError for no picture, or weights that are not one a picture, of at least 0 and not all 0.
    """
    require(model, PICTURE)
    if not images:
        raise ValueError("variations need at least one picture")
    check_weights(weights, len(images))
    with drawing(model):
        embeddings = torch.cat(
            [_unclip(model).embed_images(image_to_tensor(image).to(model.device)) for image in images]
        )
    share = embeddings.new_tensor([1.0] * len(images) if weights is None else weights)
    return (share[:, None] * embeddings).sum(dim=0, keepdim=True) / share.sum()


def _unclip(model: LatentDiffusion) -> ImageEmbeddingConditionedLatentDiffusion:
    return cast("ImageEmbeddingConditionedLatentDiffusion", model)  # `require` has seen to it


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """ValueError unless `weights` can weigh `count` pictures."""
    if weights is not None and (len(weights) != count or min(weights) < 0 or not sum(weights)):
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"{count} pictures need {count} weights of at least 0, not all 0; they are {given}")


@torch.no_grad()
def variations(
    model: LatentDiffusion,
    images: Sequence[Image.Image] | Tensor,
    prompts: Sequence[str],
    *,
    noise_level: int = 0,
    negative_prompt: str | Sequence[str] = "",
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
    """One picture a prompt, each a variation of what `images` show: pictures, or `picture_embedding` (1, D) of them.

    A prompt may be empty. noise_level: how freely to vary, from 0 to 999 for the public models: noise of that level is
    added to the embedding, another one for each picture drawn. Guidance leads away from the negative prompt without a
    picture. The rest as in `txt2img`, but for the public default of scale, which is 10.
    """
    require(model, PICTURE)
    height, width = resolve_size(model, height, width)
    how, guided_by = sampling_plan(model, 10.0, steps, sampler, scale, eta, schedule, guidance)
    if seed is not None:
        seed_everything(seed)
    embedding = images if isinstance(images, Tensor) else picture_embedding(model, images)
    with drawing(model):
        c_adm = _unclip(model).embedding_condition(embedding.expand(len(prompts), -1), noise_level)
        guided = text_condition(model, prompts, negative_prompt, guided_by)
        guided = guided.beside(c_adm=c_adm, uncond_adm=torch.zeros_like(c_adm))
        shape = (model.channels, *model.latent_size(height, width))
        latents = draw(model, guided, shape, len(prompts), **how, progress=progress)
        return decode(model, latents)
