"""Drawing from text, from a picture and text, and from a picture, its depth and text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ldm.images import image_to_tensor
from ldm.inference.conditioning import TEXT, TEXT_AND_DEPTH, require, task_of
from ldm.inference.loading import sampling_plan
from ldm.inference.pipeline import (
    Guided,
    OnStep,
    check_strength,
    decode,
    draw,
    drawing,
    first_stage_dtype,
    fit,
    redraw,
    resolve_size,
    seed_everything,
    text_condition,
)
from ldm.inference.prompts import DEFAULT_PROMPT_OPTIONS, PromptOptions
from ldm.inference.seamless import seamless
from ldm.models.diffusion.noise import NoiseSource, PerImageNoise, global_noise
from ldm.models.diffusion.schedules import ScheduleChoice
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.diffusion.depth import LatentDepth2ImageDiffusion

logger = logging.getLogger(__name__)


@torch.no_grad()
def txt2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    *,
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
    seed: int | Sequence[int] | None = None,
    noise: NoiseSource = global_noise,
    start_code: Tensor | None = None,
    tiling: str | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """One picture a prompt, as one batch.

    negative_prompt: one for all, or one a prompt. reading: emphasis, long prompts and clip_skip (see `PromptOptions`).
    height, width: pixels, by default the model's own. sampler: a name in `SAMPLERS`. eta: noise of a DDIM step. scale:
    guidance; 1 is none, and more follows the prompt and avoids `negative_prompt`; several are gone through evenly, from
    the first step to the last. steps, sampler and scale are by default the model's own, else 50, "ddim" and 7.5.
    schedule: a name in `SCHEDULES` or a list of timesteps, by default the model's own, else the sampler's. guidance:
    what else there is to `Guidance`, such as {"terms": {"rescale": 0.7}}. seed: start of the random numbers; None goes
    on where they are, and one a prompt makes every picture the same alone or in any batch (see `noise.PerImageNoise`).
    noise: where else random numbers come from. start_code: the latents to start from (see `start_latent`). tiling: "x",
    "y" or "both", for pictures that repeat without a seam. on_step: called after every step, with the latents that are
    expected to come out, the number of the step from 1, and that of the last (see `previews`).

    Raises ValueError for what the model cannot do, ArithmeticError if the picture is not finite.
    """
    require(model, TEXT)
    height, width = resolve_size(model, height, width)
    shape = (model.channels, *model.latent_size(height, width))
    if start_code is not None and start_code.shape != (len(prompts), *shape):
        wanted = (len(prompts), *shape)
        raise ValueError(f"start_code is {tuple(start_code.shape)}, but these prompts and this size need {wanted}")
    how, guided_by = sampling_plan(model, 7.5, steps, sampler, scale, eta, schedule, guidance)
    how |= {"noise": _noise_of(seed, noise), "on_step": on_step, "progress": progress}
    with drawing(model), seamless(model, tiling):
        guided = text_condition(model, prompts, negative_prompt, guided_by, reading)
        return decode(model, draw(model, guided, shape, len(prompts), **how, x_T=start_code))


@torch.no_grad()
def skip_txt2img(model: LatentDiffusion, prompts: Sequence[str], **options: Any) -> None:
    """Draw the random numbers of a call of `txt2img`, without its work: what is drawn next is as after the call.

    `options` are those of `txt2img` but `seed`. Processes that share a run skip each other's batches.
    """
    height, width = resolve_size(model, options.get("height"), options.get("width"))
    taken = {name: options[name] for name in ("steps", "sampler", "eta", "schedule") if name in options}
    how, _ = sampling_plan(model, 7.5, **taken)
    shape = (model.channels, *model.latent_size(height, width))
    how |= {"noise": options.get("noise", global_noise), "progress": False}
    draw(_idle(model), Guided(None), shape, len(prompts), **how, x_T=options.get("start_code"))


def _idle(model: LatentDiffusion) -> Any:
    """What samplers see of `model`: which numbers they draw depends neither on a network's answers nor on guidance."""
    names = ("alphas_cumprod", "num_timesteps", "parameterization", "device")
    idle: Any = SimpleNamespace(**{name: getattr(model, name) for name in names})
    idle.apply_model = lambda x, t, cond: torch.zeros_like(x)
    return idle


@torch.no_grad()
def img2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    init: Image.Image | Tensor,
    *,
    strength: float = 0.75,
    depth: Tensor | None = None,
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
    seed: int | Sequence[int] | None = None,
    noise: NoiseSource = global_noise,
    tiling: str | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """One picture a prompt, made from `init`: a picture, or its latents (B, C, h, w) from `encode_image`.

    strength: how much of the schedule to go through: 0 gives the picture back as the first stage sees it, 1 keeps next
    to nothing of it. depth: for depth-to-image models, what `depth_map` gives for the picture, which is estimated if
    None. height, width: resize a picture to these; by default its own size, floored to a multiple of 32.
    The rest as in `txt2img`, but for the public default of scale, which is 5 (SDEdit, Meng et al. 2022).
    """
    task = require(model, TEXT, TEXT_AND_DEPTH)
    check_strength(strength)
    how, guided_by = sampling_plan(model, 5.0, steps, sampler, scale, eta, schedule, guidance)
    noise = _noise_of(seed, noise)
    if isinstance(init, Tensor):
        latents = init
    else:
        with seamless(model, tiling):
            latents = encode_image(model, init, len(prompts), height, width, noise)
    if len(latents) != len(prompts):
        raise ValueError(f"init has {len(latents)} latents for {len(prompts)} prompts")
    if task is TEXT_AND_DEPTH and depth is None:
        if isinstance(init, Tensor):
            raise ValueError("latents say nothing of depth: give this model `depth`, what depth_map makes")
        depth = depth_map(model, init, size=latents.shape[2:])
    how |= {"noise": noise, "on_step": on_step, "progress": progress}
    with drawing(model), seamless(model, tiling):
        guided = text_condition(model, prompts, negative_prompt, guided_by, reading)
        if task is TEXT_AND_DEPTH and depth is not None:
            guided = guided.beside(c_concat=depth.expand(len(prompts), -1, -1, -1))
        elif depth is not None:
            raise ValueError("a depth map has no effect on this model: leave it out, or use a depth-to-image model")
        return decode(model, redraw(model, guided, latents, strength, **how))


@torch.no_grad()
def skip_img2img(model: LatentDiffusion, prompts: Sequence[str], init: Tensor, **options: Any) -> None:
    """The same for a call of `img2img` that starts from latents, `options` being its own."""
    taken = {name: options[name] for name in ("steps", "sampler", "eta", "schedule") if name in options}
    how, _ = sampling_plan(model, 5.0, **taken)
    how |= {"noise": options.get("noise", global_noise), "progress": False}
    redraw(_idle(model), Guided(None), init[: len(prompts)], options.get("strength", 0.75), **how)


def _noise_of(seed: int | Sequence[int] | None, noise: NoiseSource) -> NoiseSource:
    """Where random numbers come from: seeds of one an image, or `noise`, at whose start one seed puts it."""
    if seed is None or isinstance(seed, int):
        if seed is not None:
            seed_everything(seed)
        return noise
    return PerImageNoise(seed)


def needs_depth(model: LatentDiffusion) -> bool:
    """Whether `model` takes a depth map beside a prompt."""
    return task_of(model) is TEXT_AND_DEPTH


@torch.no_grad()
def depth_map(
    model: LatentDiffusion, image: Image.Image, depth: Tensor | None = None, size: Sequence[int] | None = None
) -> Tensor:
    """The condition (1, 1, h, w) of a depth-to-image model, at the size (h, w) of the latents of the fitted picture.

    depth: (1, 1, H, W), larger is nearer, on any scale; None has the model's estimator look at `image`.
    """
    require(model, TEXT_AND_DEPTH)
    with_depth = cast("LatentDepth2ImageDiffusion", model)
    if size is None:
        fitted = fit(model, image)
        size = model.latent_size(fitted.height, fitted.width)
    if depth is None:
        depth = with_depth.estimate_depth(image_to_tensor(image).to(model.device))
    return with_depth.depth_condition(depth.to(model.device), size)


@torch.no_grad()
def encode_image(
    model: LatentDiffusion,
    image: Image.Image,
    batch: int = 1,
    height: int | None = None,
    width: int | None = None,
    noise: NoiseSource = global_noise,
) -> Tensor:
    """`batch` latents (batch, C, h, w) of one picture, each a draw of its own from the first stage's posterior.

    The posterior's noise is drawn on the CPU.
    """
    image = fit(model, image, height, width)
    logger.info("Picture size: %dx%d", image.width, image.height)
    return encode_pixels(model, image_to_tensor(image), batch, noise)


@torch.no_grad()
def encode_pixels(model: LatentDiffusion, pixels: Tensor, batch: int = 1, noise: NoiseSource = global_noise) -> Tensor:
    """The same of pixels (1, 3, H, W) from -1 to 1, whose size the model can take."""
    posterior = model.encode_first_stage(pixels.to(model.device, first_stage_dtype(model)))
    if isinstance(posterior, DiagonalGaussianDistribution):  # encoded once, drawn from `batch` times
        posterior = DiagonalGaussianDistribution(posterior.parameters.expand(batch, -1, -1, -1))
        drawn = posterior.sample(noise(posterior.mean.shape, torch.device("cpu")))
        return model.get_first_stage_encoding(drawn).float()
    return model.get_first_stage_encoding(posterior).float().expand(batch, -1, -1, -1)


def start_latent(
    model: LatentDiffusion, batch: int, height: int, width: int, noise: NoiseSource = global_noise
) -> Tensor:
    """Noise (batch, C, h, w) to start several batches from, for pictures of height x width pixels."""
    return noise((batch, model.channels, *model.latent_size(height, width)), model.device)
