"""Drawing: from text, from a picture and text, and the parts that every other way of drawing is made of."""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.images import fit_to_multiple, image_to_tensor, tensor_to_images
from ldm.inference.loading import sampling_plan
from ldm.inference.prompts import AS_PUBLISHED, Reading, negative_prompts, text_contexts
from ldm.inference.seamless import seamless
from ldm.inference.tasks import TEXT, TEXT_AND_DEPTH, require, task_of
from ldm.models.diffusion.gaussian import square
from ldm.models.diffusion.guidance import Condition, Guidance
from ldm.models.diffusion.noise import Noise, PerImage, shared
from ldm.models.diffusion.sampler import Choice
from ldm.models.diffusion.samplers import make_sampler
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

OnStep = Callable[[Tensor, int, int], None]  # (latents expected to come out, step from 1, of how many)


def seed_everything(seed: int) -> None:
    """Start all random numbers (Python's, numpy's, torch's on every device) at `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- sizes ----


def default_size(model: LatentDiffusion) -> int:
    """The side in pixels that a model was made for."""
    if "size" in getattr(model, "sampling", {}):
        return model.sampling["size"]  # Stable Diffusion v2's config of 768 pixels has the image_size of 512
    return square(model.image_size)[0] * model.first_stage_model.downsampling_factor


def resolve_size(model: LatentDiffusion, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """(height, width) with the model's own where None; ValueError, naming the nearest sizes, if it cannot take them."""
    side = default_size(model)
    size = (side if height is None else height, side if width is None else width)
    model.latent_size(*size)
    return size


def fit(model: LatentDiffusion, image: Image.Image, height: int | None = None, width: int | None = None) -> Image.Image:
    """`image` at a size that the model can take: the one asked for, or its own, floored to a multiple of 32.

    A model of one scale (`one_scale: true` in its config, as the bundled one's) has pictures brought to that.
    """
    factor = model.first_stage_model.downsampling_factor
    if height is not None or width is not None:
        model.latent_size(height or factor, width or factor)
        return fit_to_multiple(image, factor, height=height, width=width)
    ratio = default_size(model) / min(image.size) if getattr(model, "one_scale", False) else 1.0
    height, width = round(image.height * ratio), round(image.width * ratio)
    if ratio != 1.0 and max(height, width) > 8 * default_size(model):
        raise ValueError(f"a picture of {image.width}x{image.height} would become {width}x{height}: crop it first")
    return fit_to_multiple(image, math.lcm(32, factor), height, width)  # 32 as in the public script


# ---- drawing ----


@torch.no_grad()
def txt2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    *,
    negative_prompt: str | Sequence[str] = "",
    reading: Reading = AS_PUBLISHED,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    scale: float | Sequence[float] | None = None,
    schedule: Choice | None = None,
    guidance: Mapping[str, Any] | None = None,
    seed: int | Sequence[int] | None = None,
    noise: Noise = shared,
    start_code: Tensor | None = None,
    tiling: str | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """One picture a prompt, as one batch.

    negative_prompt: one for all, or one a prompt. reading: emphasis, long prompts and clip_skip (see `Reading`).
    height, width: pixels, by default the model's own. sampler: a name in `SAMPLERS`. eta: noise of a DDIM step. scale:
    guidance; 1 is none, and more follows the prompt and avoids `negative_prompt`; several are gone through evenly, from
    the first step to the last. steps, sampler and scale are by default the model's own, else 50, "ddim" and 7.5.
    schedule: a name in `SCHEDULES` or a list of timesteps, by default the model's own, else the sampler's. guidance:
    what else there is to `Guidance`, such as {"terms": {"rescale": 0.7}}. seed: start of the random numbers; None goes
    on where they are, and one a prompt makes every picture the same alone or in any batch (see `noise.PerImage`).
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
    how, guidance = sampling_plan(model, 7.5, steps, sampler, scale, eta, schedule, guidance)
    how |= {"noise": _noise_of(seed, noise), "on_step": on_step, "progress": progress}
    with drawing(model), seamless(model, tiling):
        guided = text_condition(model, prompts, negative_prompt, guidance, reading)
        return decode(model, draw(model, guided, shape, len(prompts), **how, x_T=start_code))


@torch.no_grad()
def skip_txt2img(model: LatentDiffusion, prompts: Sequence[str], **options: Any) -> None:
    """Draw the random numbers of a call of `txt2img`, without its work: what is drawn next is as after the call.

    `options` are those of `txt2img` but `seed`. Processes that share a run skip each other's batches.
    """
    height, width = resolve_size(model, options.get("height"), options.get("width"))
    taken = {name: options[name] for name in ("steps", "sampler", "eta", "schedule") if name in options}
    how, _ = sampling_plan(model, 7.5, **taken)
    # Which numbers a sampler draws does not depend on what the network answers, nor on guidance.
    names = ("alphas_cumprod", "num_timesteps", "parameterization", "device")
    idle = SimpleNamespace(**{name: getattr(model, name) for name in names})
    idle.apply_model = lambda x, t, cond: torch.zeros_like(x)
    shape = (model.channels, *model.latent_size(height, width))
    how |= {"noise": options.get("noise", shared), "progress": False}
    draw(idle, Guided(None), shape, len(prompts), **how, x_T=options.get("start_code"))


@torch.no_grad()
def img2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    init: Image.Image | Tensor,
    *,
    strength: float = 0.75,
    depth: Tensor | None = None,
    negative_prompt: str | Sequence[str] = "",
    reading: Reading = AS_PUBLISHED,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    scale: float | Sequence[float] | None = None,
    schedule: Choice | None = None,
    guidance: Mapping[str, Any] | None = None,
    seed: int | Sequence[int] | None = None,
    noise: Noise = shared,
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
    how, guidance = sampling_plan(model, 5.0, steps, sampler, scale, eta, schedule, guidance)
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
        guided = text_condition(model, prompts, negative_prompt, guidance, reading)
        if task is TEXT_AND_DEPTH:
            guided = guided.beside(c_concat=depth.expand(len(prompts), -1, -1, -1))
        elif depth is not None:
            raise ValueError("a depth map has no effect on this model: leave it out, or use a depth-to-image model")
        return decode(model, redraw(model, guided, latents, strength, **how))


def _noise_of(seed: int | Sequence[int] | None, noise: Noise) -> Noise:
    """Where random numbers come from: seeds of one an image, or `noise`, at whose start one seed puts it."""
    if seed is None or isinstance(seed, int):
        if seed is not None:
            seed_everything(seed)
        return noise
    return PerImage(seed)


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
    if size is None:
        fitted = fit(model, image)
        size = model.latent_size(fitted.height, fitted.width)
    if depth is None:
        depth = model.estimate_depth(image_to_tensor(image).to(model.device))
    return model.depth_condition(depth.to(model.device), size)


def check_strength(strength: float) -> None:
    """ValueError unless `strength` is from 0 to 1."""
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be from 0 to 1, not {strength}")


@torch.no_grad()
def encode_image(
    model: LatentDiffusion,
    image: Image.Image,
    batch: int = 1,
    height: int | None = None,
    width: int | None = None,
    noise: Noise = shared,
) -> Tensor:
    """`batch` latents (batch, C, h, w) of one picture, each a draw of its own from the first stage's posterior.

    The posterior's noise is drawn on the CPU.
    """
    image = fit(model, image, height, width)
    logger.info("Picture size: %dx%d", image.width, image.height)
    return encode_pixels(model, image_to_tensor(image), batch, noise)


@torch.no_grad()
def encode_pixels(model: LatentDiffusion, pixels: Tensor, batch: int = 1, noise: Noise = shared) -> Tensor:
    """The same of pixels (1, 3, H, W) from -1 to 1, whose size the model can take."""
    posterior = model.encode_first_stage(pixels.to(model.device, first_stage_dtype(model)))
    if isinstance(posterior, DiagonalGaussianDistribution):  # encoded once, drawn from `batch` times
        posterior = DiagonalGaussianDistribution(posterior.parameters.expand(batch, -1, -1, -1))
        drawn = posterior.sample(noise(posterior.mean.shape, torch.device("cpu")))
        return model.get_first_stage_encoding(drawn).float()
    return model.get_first_stage_encoding(posterior).float().expand(batch, -1, -1, -1)


def start_latent(model: LatentDiffusion, batch: int, height: int, width: int, noise: Noise = shared) -> Tensor:
    """Noise (batch, C, h, w) to start several batches from, for pictures of height x width pixels."""
    return noise((batch, model.channels, *model.latent_size(height, width)), model.device)


# ---- the parts ----


@dataclass(frozen=True)
class Guided:
    """What to draw under: a condition, the one that guidance leads away from (None: no such), and the guidance."""

    cond: Condition
    uncond: Condition = None
    guidance: Guidance = Guidance()

    def beside(self, c_concat: Tensor | None = None, c_adm: Tensor | None = None, uncond_adm: Tensor | None = None):
        """The same, of a context, with what else a hybrid network takes: it is the same with and without condition.

        uncond_adm: what stands in place of `c_adm` without condition, if that differs.
        """
        without = c_adm if uncond_adm is None else uncond_adm
        uncond = None if self.uncond is None else _parts(self.uncond, c_concat, without)
        return replace(self, cond=_parts(self.cond, c_concat, c_adm), uncond=uncond)


def _parts(context: Tensor, c_concat: Tensor | None, c_adm: Tensor | None) -> dict[str, Any]:
    parts = {"c_crossattn": [context], "c_concat": None if c_concat is None else [c_concat], "c_adm": c_adm}
    return {name: part for name, part in parts.items() if part is not None}


@contextlib.contextmanager
def drawing(model: LatentDiffusion) -> Iterator[None]:
    """How a model computes while it draws: in its precision, with its averaged weights, without gradients."""
    dtype = getattr(model, "autocast_dtype", None)
    precision = torch.autocast(model.device.type, dtype=dtype) if dtype else contextlib.nullcontext()
    with torch.no_grad(), precision, model.ema_scope():
        yield


def text_condition(
    model: LatentDiffusion,
    prompts: Sequence[str],
    negative_prompt: str | Sequence[str],
    guidance: Guidance,
    reading: Reading = AS_PUBLISHED,
) -> Guided:
    """The prompts' encodings (B, L, D), and those of the negative prompts, if guidance is to lead away from them.

    negative_prompt: one for all, or one a prompt. reading: other ways to read both (see `Reading`).
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one text")
    negatives = negative_prompts(negative_prompt, len(prompts))
    if not guidance.needs_uncond and any(negatives):
        logger.warning("the negative prompt has no effect at scale 1, which is without guidance")
    cond, uncond = text_contexts(model, prompts, negatives if guidance.needs_uncond else None, reading)
    return Guided(cond, uncond, guidance)


def draw(
    model: LatentDiffusion,
    guided: Guided,
    shape: Sequence[int],
    batch_size: int,
    *,
    steps: int,
    sampler: str,
    eta: float = 0.0,
    on_step: OnStep | None = None,
    progress: bool = True,
    **options: Any,
) -> Tensor:
    """Latents (batch_size, *shape) from noise. `options` are others of `Sampler.sample`: schedule, x_T, mask ...

    on_step: see `txt2img`.
    """
    solver = make_sampler(model, sampler)
    if on_step is not None:
        options["img_callback"] = lambda x0, i: on_step(x0, i + 1, len(solver.schedule))
    latents, _ = solver.sample(
        S=steps,
        batch_size=batch_size,
        shape=shape,
        conditioning=guided.cond,
        unconditional_conditioning=guided.uncond,
        guidance=guided.guidance,
        eta=eta,
        verbose=progress,
        **options,
    )
    return latents


def redraw(
    model: LatentDiffusion,
    guided: Guided,
    latents: Tensor,
    strength: float,
    *,
    steps: int,
    sampler: str,
    eta: float = 0.0,
    schedule: Choice | None = None,
    noise: Noise = shared,
    on_step: OnStep | None = None,
    progress: bool = True,
    **options: Any,
) -> Tensor:
    """Latents (B, C, h, w) noised by `strength` of the schedule, and drawn anew from there (SDEdit).

    `options` are further ones of `Sampler.decode`: mask, x0. on_step: see `txt2img`.
    """
    solver = make_sampler(model, sampler)
    solver.make_schedule(steps, schedule, ddim_eta=eta, verbose=False)
    count = int(strength * steps)
    if count == 0:
        return latents
    if on_step is not None:
        total = len(solver.schedule.until(count))
        options["img_callback"] = lambda x0, i: on_step(x0, i + 1, total)
    noised = solver.stochastic_encode(latents, count, noise=noise(latents.shape, latents.device))
    return solver.decode(
        noised,
        guided.cond,
        count,
        unconditional_conditioning=guided.uncond,
        guidance=guided.guidance,
        noise=noise,
        verbose=progress,
        **options,
    )


def decode(model: LatentDiffusion, latents: Tensor) -> list[Image.Image]:
    """Pictures of latents (B, C, h, w), decoded one by one, since that is where memory peaks."""
    check_finite(latents, "the latents")
    images: list[Image.Image] = []
    for latent in latents.to(first_stage_dtype(model)).split(1):
        pixels = model.decode_first_stage(latent).float()  # (1, 3, H, W)
        check_finite(pixels, "the picture")
        images += tensor_to_images(pixels)
    return images


def first_stage_dtype(model: LatentDiffusion) -> torch.dtype:
    """The precision of the first stage's weights."""
    return next((parameter.dtype for parameter in model.first_stage_model.parameters()), torch.float32)


def check_finite(x: Tensor, what: str) -> None:
    """ArithmeticError, saying what to try, unless all of `x`, which is `what` in words, is finite."""
    if not torch.isfinite(x).all():
        raise ArithmeticError(
            f"{what} came out as NaN or infinite, and would be black: try --precision full, or another checkpoint"
        )
