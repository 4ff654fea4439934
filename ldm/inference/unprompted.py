"""Drawing without text: from nothing but noise, from class labels, from layouts and from segmentation maps.

All four take these options. steps, sampler: by default the model's own, else 50 of "ddim"; beside the samplers of
`txt2img` there is "ancestral", which walks all timesteps (Ho et al. 2020, algorithm 2). eta, schedule, guidance: as in
`txt2img`, but without classes `pag` is the only guidance. seed: start of the random numbers; None goes on where they
are. progress: show a bar. They raise ValueError for models that draw from something else and ArithmeticError if a
picture is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.data.layouts import Box, LayoutTokens
from ldm.data.segmentation import one_hot_map
from ldm.inference.conditioning import CLASSES, LAYOUT, NOTHING, SEGMENTATION, require
from ldm.inference.loading import sampling_plan
from ldm.inference.pipeline import Guided, decode, draw, drawing, seed_everything
from ldm.models.diffusion.gaussian import square
from ldm.models.diffusion.guidance import Condition
from ldm.models.diffusion.schedules import ScheduleChoice

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

ANCESTRAL = "ancestral"


def noise2img(model: LatentDiffusion, count: int, **options: Any) -> list[Image.Image]:
    """`count` pictures of an unconditional model, as one batch."""
    require(model, NOTHING)
    with drawing(model):
        return _drawn(model, None, count, **options)


def class2img(
    model: LatentDiffusion,
    labels: Sequence[int],
    *,
    scale: float | Sequence[float] | None = None,
    null_class: int | None = None,
    **options: Any,
) -> list[Image.Image]:
    """One picture a class label, as one batch.

    scale: guidance towards the class, by default the model's own, else 1, which is none; ImageNet's cin256-v2 is best
    known at 3 with 20 steps. null_class: the class that means none; by default the one that training dropped labels to
    (`ucg_training`), or class 1000 of ImageNet models with 1001. ValueError if guidance needs one and there is none.
    """
    check_labels(model, labels if null_class is None else [*labels, null_class])
    with drawing(model):
        cond = model.get_learned_conditioning({model.cond_stage_key: torch.tensor(labels, device=model.device)})
        without = partial(model.get_unconditional_conditioning, len(labels), null_class)
        return _drawn(model, cond, len(labels), scale=scale, without=without, **options)


def check_labels(model: LatentDiffusion, labels: Sequence[int]) -> None:
    """ValueError unless `model` draws from classes, and has these."""
    require(model, CLASSES)
    count = getattr(model.cond_stage_model, "n_classes", None) or model.model.diffusion_model.num_classes
    if wrong := [label for label in labels if not 0 <= label < count]:
        raise ValueError(f"this model's classes are 0 to {count - 1}; there is no class {wrong[0]}")


def layout2img(model: LatentDiffusion, tokens: Tensor, **options: Any) -> list[Image.Image]:
    """One picture a layout, as one batch. tokens: (B, L), what `layout_tokens` makes of the layouts."""
    require(model, LAYOUT)
    with drawing(model):
        return _drawn(model, model.get_learned_conditioning(tokens.to(model.device)), len(tokens), **options)


def layout_tokens(model: LatentDiffusion, layouts: Sequence[Sequence[Box]]) -> Tensor:
    """Layouts as the tokens (B, L) of this model; ValueError, saying why, for one that it cannot take."""
    require(model, LAYOUT)
    transformer = model.cond_stage_model.transformer
    return LayoutTokens(transformer.token_emb.num_embeddings, transformer.max_seq_len).tensor(layouts)


def segmentation2img(model: LatentDiffusion, ids: Tensor, count: int = 1, **options: Any) -> list[Image.Image]:
    """`count` pictures of one segmentation map, as one batch, at the map's size floored to what the model can take.

    ids: the class of every pixel (H, W), whole numbers from 0.
    """
    require(model, SEGMENTATION)
    network, mapper = model.model.diffusion_model, model.cond_stage_model.channel_mapper
    classes = network.in_channels - model.channels if mapper is None else mapper.in_channels
    planes = one_hot_map(ids, classes, model.first_stage_model.downsampling_factor)
    planes = planes.to(model.device, next(network.parameters()).dtype)
    with drawing(model):
        cond = model.get_learned_conditioning(planes)  # (1, C, h, w)
        size = model.latent_size(*planes.shape[2:])
        return _drawn(model, cond.expand(count, -1, -1, -1), count, size, **options)


def _drawn(
    model: LatentDiffusion,
    cond: Condition,
    count: int,
    size: tuple[int, int] | None = None,
    *,
    without: Callable[[], Condition] | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    scale: float | Sequence[float] | None = None,
    schedule: ScheduleChoice | None = None,
    guidance: Mapping[str, Any] | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """`count` pictures under a condition. size: (h, w) of the latents, by default the model's own.

    without: what makes the condition that guidance leads away from; models that have none know no scale.
    """
    if without is None and scale not in (None, 1.0):
        raise ValueError(f"guidance leads towards a class, and this model has none: leave scale={scale} out")
    how, guided_by = sampling_plan(model, 1.0, steps, sampler, scale if without else 1.0, eta, schedule, guidance)
    if seed is not None:
        seed_everything(seed)
    shape = (model.channels, *(size or square(model.image_size)))
    if how["sampler"] != ANCESTRAL:
        guided = Guided(cond, without() if without and guided_by.needs_uncond else None, guided_by)
        return decode(model, draw(model, guided, shape, count, **how, progress=progress))
    if guided_by.needs_uncond or guidance or schedule is not None:
        raise ValueError(
            "ancestral sampling has no guidance: use scale 1, or DDIM, with eta 1 for its noise; nor another schedule"
        )
    latents = model.p_sample_loop(cond, (count, *shape), verbose=progress)
    return decode(model, latents)
