"""The steps of every task: encode the condition, sample latents, decode them to images."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ldm.acceleration import OffloadHook, cache_contexts, refresh, unload_afterwards
from ldm.checkpoint import check_unchanged
from ldm.images import fit_to_multiple, image_to_tensor, tensor_to_images
from ldm.inference.conditioning import TEXT, Conditioning, require, text_condition
from ldm.inference.options import DEFAULT_STEPS, SamplingOptions
from ldm.inference.tiling import seamless
from ldm.models.diffusion.batches import image_sides
from ldm.models.diffusion.noise import NoiseSource, global_noise
from ldm.models.diffusion.sampler import MODEL_ATTRIBUTES, Sampler
from ldm.models.diffusion.samplers import make_sampler
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

SIZE_MULTIPLE = 32  # img2img floors the sides of images to multiples of this, as the public script does

OnStep = Callable[[Tensor, int, int], None]  # (predicted x0, step from 1, number of steps)

_LOCKS: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


class Pipeline:
    """Text to image with a loaded model, and the steps that other tasks are made of.

    Calls on one model from several threads run one after the other, because weights and layers change for the time of a
    call (averaged weights, offloading, caches). With a seed they give the images of sequential calls.

    Args:
        model: From `load_model`.
    """

    def __init__(self, model: LatentDiffusion) -> None:
        self.model = model
        self.sampling_model: Any = model  # what the sampler calls; upscaling puts a tiled model here
        with _LOCKS_LOCK:
            self.lock = _LOCKS.setdefault(model, threading.RLock())

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        options: SamplingOptions | None = None,
        *,
        noise: NoiseSource | None = None,
        start_code: Tensor | None = None,
        on_step: OnStep | None = None,
        progress: bool = True,
        **overrides: Any,
    ) -> list[Image.Image]:
        """Generate one image per prompt, as one batch. The arguments are those of `txt2img`."""
        require(self.model, TEXT)
        options = self.resolve(options, **overrides)
        noise = noise or options.noise(len(prompts))
        shape = self.latent_shape(len(prompts), options)
        if start_code is not None and start_code.shape != shape:
            raise ValueError(f"start_code is {tuple(start_code.shape)}, but these prompts and this size need {shape}")
        with self.inference_mode(options):
            cond = replace(self.encode_prompts(prompts, options), start=start_code)
            latents = self.sample(cond, options, noise, on_step=on_step, progress=progress)
            return self.decode(latents)

    def resolve(
        self,
        options: SamplingOptions | None = None,
        *,
        default_scale: float = 7.5,
        default_steps: int = DEFAULT_STEPS,
        **overrides: Any,
    ) -> SamplingOptions:
        """`options` with `overrides`, and the model's defaults where neither says anything.

        Raises:
            ValueError: for unknown names, and for guidance options that do not go together.
        """
        options = SamplingOptions.of(options, **overrides)
        resolved = options.resolve(
            getattr(self.model, "info", None), default_scale=default_scale, default_steps=default_steps
        )
        resolved.guidance  # noqa: B018  # raises for what does not go together, before any work
        return resolved

    @contextlib.contextmanager
    def inference_mode(self, options: SamplingOptions) -> Iterator[None]:
        """Lock the model and set it up for one batch: no gradients, autocast, EMA weights, acceleration, tiling."""
        model, info = self.model, getattr(self.model, "info", None)
        network, dtype = model.model.diffusion_model, info.autocast_dtype if info else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.lock)
            check_unchanged(model)
            refresh(model)
            stack.enter_context(torch.no_grad())
            if dtype is not None:
                stack.enter_context(torch.autocast(model.device.type, dtype=dtype))
            stack.enter_context(model.ema_scope())
            stack.enter_context(unload_afterwards(model))  # before averaged weights are swapped back
            stack.enter_context(options.acceleration.attach(network))
            stack.enter_context(cache_contexts(network))
            stack.enter_context(seamless(model, options.tiling))
            yield
        check_unchanged(model)  # an image made with half of a new file is not returned

    def encode_prompts(self, prompts: Sequence[str], options: SamplingOptions) -> Conditioning:
        """Encode prompts, and negative prompts if guidance needs them."""
        guided = options.guidance.needs_uncond
        return text_condition(self.model, prompts, options.negative_prompt, guided, options.prompt_options)

    def latent_shape(self, count: int, options: SamplingOptions) -> tuple[int, ...]:
        """(B, C, h, w) of latents of the options' size; ValueError, naming the nearest sizes, if it does not fit."""
        height, width = resolve_size(self.model, options.height, options.width)
        return (count, self.model.channels, *self.model.latent_size(height, width))

    def sample(
        self,
        cond: Conditioning,
        options: SamplingOptions,
        noise: NoiseSource,
        *,
        on_step: OnStep | None = None,
        progress: bool = True,
    ) -> Tensor:
        """Sample latents (B, C, h, w): from noise, or from `cond.init` under noise of `cond.strength` (SDEdit).

        Args:
            cond: The condition.
            options: Resolved options.
            noise: Where random numbers come from.
            on_step: Called after every step with (predicted x0, step from 1, number of steps).
            progress: Show a progress bar.
        """
        offloaded = any(isinstance(handle, OffloadHook) for handle in getattr(self.model, "acceleration", ()))
        steps, name = options.steps, options.sampler
        if steps is None or name is None:
            raise ValueError("the steps and the sampler are not known yet: resolve the options first")
        sampler = make_sampler(self.sampling_model, name, sequential_guidance=offloaded)
        if cond.init is not None and (cond.mask is None or cond.strength < 1):
            return self._from_init(sampler, steps, cond, options, noise, on_step, progress)
        return self._from_noise(sampler, steps, cond, options, noise, on_step, progress)

    def _from_noise(
        self,
        sampler: Sampler,
        steps: int,
        cond: Conditioning,
        options: SamplingOptions,
        noise: NoiseSource,
        on_step: OnStep | None,
        progress: bool,
    ) -> Tensor:
        """Sample from noise, over the complete schedule."""
        shape = cond.shape or (self.latent_shape(cond.batch_size, options) if cond.init is None else cond.init.shape)
        latents, _ = sampler.sample(
            S=steps,
            batch_size=shape[0],
            shape=shape[1:],
            conditioning=cond.cond,
            unconditional_conditioning=cond.uncond,
            guidance=options.guidance,
            eta=options.eta,
            schedule=options.schedule,
            noise=noise,
            x_T=cond.start,
            mask=cond.mask,
            x0=cond.init,
            img_callback=on_step and (lambda x0, i: on_step(x0, i + 1, len(sampler.sampling_schedule))),
            verbose=progress,
        )
        return latents

    @staticmethod
    def _from_init(
        sampler: Sampler,
        steps: int,
        cond: Conditioning,
        options: SamplingOptions,
        noise: NoiseSource,
        on_step: OnStep | None,
        progress: bool,
    ) -> Tensor:
        """Add noise of `cond.strength` to `cond.init`, and sample from there (SDEdit, Meng et al. 2022)."""
        assert cond.init is not None
        sampler.make_schedule(steps, options.schedule, ddim_eta=options.eta, verbose=False)
        count = int(cond.strength * steps)
        if count == 0:
            return cond.init
        total = len(sampler.sampling_schedule.until(count))
        noised = sampler.stochastic_encode(cond.init, count, noise=noise(cond.init.shape, cond.init.device))
        return sampler.decode(
            noised,
            cond.cond,
            count,
            unconditional_conditioning=cond.uncond,
            guidance=options.guidance,
            noise=noise,
            mask=cond.mask,
            x0=None if cond.mask is None else cond.init,
            img_callback=on_step and (lambda x0, i: on_step(x0, i + 1, total)),
            verbose=progress,
        )

    def skip_noise(self, cond: Conditioning, options: SamplingOptions, noise: NoiseSource) -> None:
        """Advance the random generator as `sample` would, with a network that returns zeros.

        Random numbers depend neither on the network's outputs nor on guidance, so processes that divide a run's batches
        among them skip each other's batches this way.
        """
        idle = Pipeline(self.model)
        idle.sampling_model = _ZeroNetwork(self.model)
        unguided = replace(options, scale=1.0, terms={}, interval=None, cfg_pp=False)
        idle.sample(cond, unguided, noise, progress=False)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Decode latents (B, C, h, w) to images, one by one, because memory peaks here."""
        check_finite(latents, "the latents")
        images: list[Image.Image] = []
        for latent in torch.split(latents.to(first_stage_dtype(self.model)), 1):
            pixels = self.sampling_model.decode_first_stage(latent).float()  # (1, 3, H, W)
            check_finite(pixels, "the image")
            images += tensor_to_images(pixels)
        return images

    @torch.no_grad()
    def encode_image(
        self, image: Image.Image, batch: int, options: SamplingOptions, noise: NoiseSource = global_noise
    ) -> Tensor:
        """Latents (batch, C, h, w) of one image fitted to the options' size, each its own posterior sample."""
        image = resize_to_multiple(self.model, image, options.height, options.width)
        logger.info("Image size: %dx%d", image.width, image.height)
        with self.lock, seamless(self.model, options.tiling):
            return self.encode_pixels(image_to_tensor(image), batch, noise)

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor, batch: int = 1, noise: NoiseSource = global_noise) -> Tensor:
        """Latents (batch, C, h, w) of pixels (1, 3, H, W) in [-1, 1]. The posterior's noise is generated on the CPU."""
        model = self.model
        posterior = model.encode_first_stage(pixels.to(model.device, first_stage_dtype(model)))
        if isinstance(posterior, DiagonalGaussianDistribution):  # encoded once, sampled `batch` times
            posterior = DiagonalGaussianDistribution(posterior.parameters.expand(batch, -1, -1, -1))
            sample = posterior.sample(noise(posterior.mean.shape, torch.device("cpu")))
            return model.get_first_stage_encoding(sample).float()
        return model.get_first_stage_encoding(posterior).float().expand(batch, -1, -1, -1)


class _ZeroNetwork:
    """The attributes of a model that samplers read, with a network that returns zeros."""

    def __init__(self, model: LatentDiffusion) -> None:
        for name in MODEL_ATTRIBUTES:
            setattr(self, name, getattr(model, name))

    def apply_model(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Zeros of x's shape."""
        return torch.zeros_like(x)


# ---- sizes ----


def default_size(model: LatentDiffusion) -> int:
    """Side in pixels of the images that a model was made for."""
    info = getattr(model, "info", None)
    if info and info.sampling.size:
        return int(info.sampling.size)  # Stable Diffusion v2's config of 768 pixels has the image_size of 512
    factor: int = model.first_stage_model.downsampling_factor
    return image_sides(model.image_size)[0] * factor


def resolve_size(model: LatentDiffusion, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """(height, width), by default the model's own; ValueError, naming the nearest sizes, if they do not fit."""
    side = default_size(model)
    size = (side if height is None else height, side if width is None else width)
    model.latent_size(*size)
    return size


def resize_to_multiple(
    model: LatentDiffusion, image: Image.Image, height: int | None = None, width: int | None = None
) -> Image.Image:
    """Resize `image` to the given size, or to its own floored to a multiple of `SIZE_MULTIPLE`.

    Models trained at one scale (`one_scale: true` in the config, as the bundled one) have images resized to that.
    """
    factor = model.first_stage_model.downsampling_factor
    if height is not None or width is not None:
        model.latent_size(height or factor, width or factor)
        return fit_to_multiple(image, factor, height=height, width=width)
    info = getattr(model, "info", None)
    ratio = default_size(model) / min(image.size) if info and info.one_scale else 1.0
    height, width = round(image.height * ratio), round(image.width * ratio)
    if ratio != 1.0 and max(height, width) > 8 * default_size(model):
        raise ValueError(f"an image of {image.width}x{image.height} would become {width}x{height}: crop it first")
    return fit_to_multiple(image, math.lcm(SIZE_MULTIPLE, factor), height, width)


# ---- helpers ----


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch, as the public scripts do. The library does not use them
    where a call has a seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def first_stage_dtype(model: LatentDiffusion) -> torch.dtype:
    """Dtype of the first stage's weights."""
    return next((parameter.dtype for parameter in model.first_stage_model.parameters()), torch.float32)


def check_finite(x: Tensor, what: str) -> None:
    """Raise ArithmeticError, with what to try, unless all of `x` is finite."""
    if not torch.isfinite(x).all():
        raise ArithmeticError(
            f"{what} came out as NaN or infinite, and would be black: try full precision (precision='full', or "
            "--precision full), or another checkpoint"
        )


def check_strength(strength: float) -> None:
    """Raise ValueError unless `strength` is from 0 to 1."""
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be from 0 to 1, not {strength}")
