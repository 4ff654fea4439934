"""Small pictures to pictures four times their size, in tiles where they are not that small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ldm.images import image_to_tensor
from ldm.inference.conditioning import SMALL_PICTURE, SMALL_PICTURE_AND_TEXT, require
from ldm.inference.loading import sampling_plan
from ldm.inference.pipeline import Guided, decode, draw, drawing, first_stage_dtype, seed_everything, text_condition
from ldm.inference.tiling import padded, tiled
from ldm.models.diffusion.gaussian import square
from ldm.models.diffusion.guidance import Condition, Guidance
from ldm.models.diffusion.schedules import ScheduleChoice

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.upscaling import LatentUpscaleDiffusion

MULTIPLE = 8  # both networks halve their maps three times, and have learnt from sizes where that leaves no rest
NOISE_LEVEL = 20  # the public default


@torch.no_grad()
def upscale(
    model: LatentDiffusion,
    images: Sequence[Image.Image],
    prompts: Sequence[str] | None = None,
    *,
    negative_prompt: str | Sequence[str] = "",
    noise_level: int | None = None,
    tile: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    scale: float | Sequence[float] | None = None,
    schedule: ScheduleChoice | None = None,
    guidance: Mapping[str, Any] | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """Each of `images`, one batch of one size, at exactly the first stage's factor (4) times that size.

    prompts: what each picture shows; None for nothing in particular. noise_level: how much noise is laid over the small
    pictures, from 0, which trusts them, to the model's `max_noise_level`; by default 20. tile: the longest side in
    small pixels that is drawn at once, by default twice the model's own, 0 for any; larger pictures go through in
    overlapping tiles (see `TiledModel`). The rest as in `txt2img`, but for the public default of scale, which is 9.

    Raises ValueError for what the model cannot do, such as text for one that draws from a small picture alone (bsr_sr),
    ArithmeticError if a picture is not finite.
    """
    with_text = takes_prompt(model)
    if not images or len({image.size for image in images}) > 1:
        raise ValueError(f"upscale takes pictures of one size, not of {[image.size for image in images]}")
    if with_text:
        noise_level = NOISE_LEVEL if noise_level is None else noise_level
    else:
        _refuse(prompt=prompts, negative_prompt=negative_prompt or None, noise_level=noise_level, scale=scale)
    public_scale = 9.0 if with_text else 1.0
    how, guided_by = sampling_plan(model, public_scale, steps, sampler, scale, eta, schedule, guidance)
    if tile is None:
        tile = 2 * max(square(model.image_size))
    looks = TiledModel(model, tile, progress)
    if seed is not None:
        seed_everything(seed)
    x = padded(torch.cat([image_to_tensor(image) for image in images]), MULTIPLE).to(model.device)  # (B, 3, h, w)
    with drawing(model):
        guided = _condition(model, x, prompts, negative_prompt, noise_level, guided_by)
        shape = (model.channels, *x.shape[2:])
        latents = draw(looks, guided, shape, len(images), **how, progress=progress)
    if first_stage_dtype(model) == torch.float16:
        model.first_stage_model.float()  # the published one's maps grow beyond half precision
    factor = model.first_stage_model.downsampling_factor
    size = (images[0].width * factor, images[0].height * factor)
    return [image.crop((0, 0, *size)) for image in decode(looks, latents)]


def takes_prompt(model: LatentDiffusion) -> bool:
    """Whether an upscaling model draws from text too, and so has guidance and noise levels; ValueError for others."""
    return require(model, SMALL_PICTURE_AND_TEXT, SMALL_PICTURE) is SMALL_PICTURE_AND_TEXT


def _refuse(**options: Any) -> None:
    """ValueError if any of `options` is given, not None."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"this model draws from a small picture alone, so leave out {', '.join(given)}")


def _condition(
    model: LatentDiffusion,
    x: Tensor,
    prompts: Sequence[str] | None,
    negative_prompt: str | Sequence[str],
    noise_level: int | None,
    guidance: Guidance,
) -> Guided:
    """What to draw under, for small pictures x (B, 3, h, w)."""
    if noise_level is None:
        return Guided({"c_concat": [model.get_learned_conditioning(x)]}, guidance=guidance)
    prompts = [""] * len(x) if prompts is None else prompts
    if len(prompts) != len(x):
        raise ValueError(f"every picture needs its prompt: there are {len(x)} pictures and {len(prompts)} prompts")
    noised, level = cast("LatentUpscaleDiffusion", model).low_scale_condition(x, noise_level)
    return text_condition(model, prompts, negative_prompt, guidance).beside(c_concat=noised, c_adm=level)


class TiledModel:
    """A model as samplers and `decode` see it, that looks at large latents in overlapping tiles.

    At every step the network sees each tile of the one noisy latent, under that tile's own part of `c_concat`, and its
    predictions are blended before the sampler goes on. MultiDiffusion (Bar-Tal et al. 2023, arXiv:2302.08113) blends
    what the step makes of the predictions, which is the same where steps are linear in them, as those of our samplers
    are. So neighbours share their noise, never drift apart and leave no seams.

    tile: the longest side of a tile in latents; 0 looks at all of them at once.
    """

    def __init__(self, model: LatentDiffusion, tile: int, progress: bool = True) -> None:
        for name in ("alphas_cumprod", "num_timesteps", "parameterization", "device", "first_stage_model"):
            setattr(self, name, getattr(model, name))
        self._model = model
        self._tile = tile
        self._progress = progress

    @property
    def model(self) -> Any:
        """The model's network, for perturbed-attention guidance."""
        return self._model.model

    def apply_model(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """As of the model, for x (B, C, h, w) under a dict with `c_concat`."""
        channels = x.shape[1]

        def look(part: Tensor) -> Tensor:
            under = {**cond, "c_concat": [part[:, channels:]]}
            return self._model.apply_model(part[:, :channels], t, under)

        return tiled(look, torch.cat([x, *cond["c_concat"]], dim=1), self._tile, multiple=MULTIPLE)

    def decode_first_stage(self, z: Tensor) -> Tensor:
        """As of the model: z (B, C, h, w) to pictures (B, 3, f h, f w)."""
        progress = "Decoding" if self._progress else None
        return tiled(self._model.decode_first_stage, z, self._tile, progress=progress)
