"""From prompts to pictures: load a model, then `txt2img` or `img2img`.

from ldm.inference import load_model, txt2img

model = load_model()
for image in txt2img(model, ["a red circle"], seed=42):
    image.save("circle.png")
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from ldm.checkpoint import Checkpoint, build_on_meta, config_for, detect_config, fill_model, read_checkpoint
from ldm.devices import choose_device, choose_precision
from ldm.images import fit_to_multiple, image_to_tensor, tensor_to_images
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.gaussian import square
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.sampler import Sampler
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.util import public_path

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

DEFAULT_CKPT = "models/ldm/stable-diffusion-v1/model.ckpt"
BUNDLED_CKPT = "models/ldm/shapes64/model.ckpt"

SAMPLERS = ("ddim", "plms", "dpm_solver")
DTYPES = {"full": torch.float32, "autocast": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---- loading ----


def load_model(
    config: str | Path | None = None,
    ckpt: str | Path | None = None,
    *,
    device: str = "auto",
    precision: str = "autocast",
) -> LatentDiffusion:
    """A model ready to sample from, on `device` ("auto": CUDA, else MPS, else the CPU).

    ckpt: a .ckpt or .safetensors file; None is Stable Diffusion v1 at its public place, or else the bundled model.
    config: a YAML file; None is what the checkpoint's keys and shapes tell, or a config.yaml beside it.
    precision: "full", "autocast" (half precision where that is safe; on a CPU the same as full), "fp16" or "bf16".

    Raises FileNotFoundError, CheckpointError or ValueError, each with what to do, if that does not work out.
    """
    where = choose_device(device)
    precision = choose_precision(precision, where)
    path = Path(ckpt) if ckpt is not None else _default_checkpoint()
    logger.info("Loading model from %s", path)
    checkpoint = read_checkpoint(path)
    if checkpoint.global_step is not None:
        logger.info("Global Step: %d", checkpoint.global_step)
    settings = read_config(config or _config_beside(checkpoint))
    model = build_on_meta(settings["model"])
    if not hasattr(getattr(model, "first_stage_model", None), "downsampling_factor"):
        raise ValueError(
            f"{settings['model'].get('target')} is no latent diffusion model with a first stage: fix the config"
        )
    fill_model(model, checkpoint, dtype=DTYPES[precision])
    model.checkpoint_path = str(path)
    model.autocast_dtype = torch.float16 if precision == "autocast" else None
    model.one_scale = bool(settings.get("one_scale", False))
    model.sampling = _own_sampling(settings)
    return model.to(where).eval()


def read_config(path: str | Path) -> DictConfig:
    """A model's YAML config. Raises FileNotFoundError or ValueError if it is none."""
    place = Path(path) if Path(path).is_file() else public_path(str(path))
    if place is None:
        raise FileNotFoundError(f"config {path}: there is no such file")
    try:
        config = OmegaConf.load(place)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(config, DictConfig) or "model" not in config:
        raise ValueError(f"config {path} has no `model:` section, so it does not describe a model")
    return config


def _own_sampling(config: DictConfig) -> dict[str, Any]:
    """The `sampling:` section of a config, checked: scale, sampler and steps to use where the user names none."""
    own = dict(config.get("sampling", None) or {})
    valid = {
        "scale": lambda value: isinstance(value, (int, float)) and math.isfinite(value),
        "sampler": lambda value: value in SAMPLERS,
        "steps": lambda value: isinstance(value, int) and value > 0,
    }
    for name, value in own.items():
        if name not in valid or isinstance(value, bool) or not valid[name](value):
            raise ValueError(
                f"the config's `sampling:` has {name}: {value!r}; it takes a number `scale`, a `sampler` of "
                f"{', '.join(SAMPLERS)}, and a whole number of `steps`"
            )
    return own


def sampling_settings(
    model: LatentDiffusion,
    public_scale: float,
    steps: int | None = None,
    sampler: str | None = None,
    scale: float | None = None,
    eta: float = 0.0,
) -> tuple[int, str, float]:
    """(steps, sampler, scale), each None as the model's own (`sampling:` in its config), else as the public default.

    The public defaults are 50 steps of DDIM at `public_scale`. Only DDIM adds noise, so `eta` above 0 asks for it.
    """
    if sampler is None and eta != 0:
        sampler = "ddim"
    own = {"steps": 50, "sampler": "ddim", "scale": public_scale} | getattr(model, "sampling", {})
    given = {"steps": steps, "sampler": sampler, "scale": scale}
    return tuple(own[name] if value is None else value for name, value in given.items())


def _default_checkpoint() -> Path:
    public = public_path(DEFAULT_CKPT)
    if public is not None:
        return public
    bundled = public_path(BUNDLED_CKPT)
    if bundled is None:
        raise FileNotFoundError(f"there is neither {DEFAULT_CKPT} nor the bundled {BUNDLED_CKPT}: name a checkpoint")
    logger.info("No --ckpt and no %s: using the small bundled model, which draws shapes at 64x64", DEFAULT_CKPT)
    return bundled


def _config_beside(checkpoint: Checkpoint) -> str | Path:
    beside = Path(checkpoint.path).with_name("config.yaml")
    if detect_config(checkpoint.shapes) is None and beside.is_file():
        return beside
    return config_for(checkpoint)


def seed_everything(seed: int) -> None:
    """Start all random numbers (Python's, numpy's, torch's on every device) at `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ---- sizes ----


def default_size(model: LatentDiffusion) -> int:
    """The side in pixels that a model was made for."""
    return square(model.image_size)[0] * model.first_stage_model.downsampling_factor


def resolve_size(model: LatentDiffusion, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """(height, width) with the model's own where None; ValueError, naming the nearest sizes, if it cannot take them."""
    side = default_size(model)
    size = (side if height is None else height, side if width is None else width)
    model.latent_size(*size)
    return size


def _fit(model: LatentDiffusion, image: Image.Image, height: int | None, width: int | None) -> Image.Image:
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
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    scale: float | None = None,
    seed: int | None = None,
    start_code: Tensor | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """One picture a prompt, as one batch.

    height, width: pixels, by default the model's own. sampler: "ddim", "plms" or "dpm_solver". eta: noise of a DDIM
    step. scale: guidance; 1 is none, and more follows the prompt and avoids `negative_prompt`. steps, sampler and scale
    are by default the model's own, else 50, "ddim" and 7.5. seed: start of the random numbers; None goes on where they
    are. start_code: the latents to start from (see `start_latent`).

    Raises ValueError for what the model cannot do, ArithmeticError if the picture is not finite.
    """
    height, width = resolve_size(model, height, width)
    shape = (model.channels, *model.latent_size(height, width))
    if start_code is not None and start_code.shape != (len(prompts), *shape):
        wanted = (len(prompts), *shape)
        raise ValueError(f"start_code is {tuple(start_code.shape)}, but these prompts and this size need {wanted}")
    steps, sampler, scale = sampling_settings(model, 7.5, steps, sampler, scale, eta)
    solver = _sampler(model, sampler)
    if seed is not None:
        seed_everything(seed)
    with _precision(model), model.ema_scope():
        guidance = _conditions(model, prompts, negative_prompt, scale)
        latents, _ = solver.sample(
            S=steps,
            batch_size=len(prompts),
            shape=shape,
            conditioning=guidance.pop("cond"),
            eta=eta,
            x_T=start_code,
            verbose=progress,
            **guidance,
        )
        return _decode(model, latents)


@torch.no_grad()
def skip_txt2img(model: LatentDiffusion, prompts: Sequence[str], **options: Any) -> None:
    """Draw the random numbers of a call of `txt2img`, without its work: what is drawn next is as after the call.

    `options` are those of `txt2img` but `seed` and `progress`. Processes that share a run skip each other's batches.
    """
    height, width = resolve_size(model, options.get("height"), options.get("width"))
    eta = options.get("eta", 0.0)
    steps, sampler, _ = sampling_settings(model, 7.5, options.get("steps"), options.get("sampler"), eta=eta)
    # Which numbers a sampler draws does not depend on what the network answers.
    names = ("alphas_cumprod", "num_timesteps", "parameterization", "device")
    idle = SimpleNamespace(**{name: getattr(model, name) for name in names})
    idle.apply_model = lambda x, t, cond: torch.zeros_like(x)
    solver = _sampler(idle, sampler)
    shape = (model.channels, *model.latent_size(height, width))
    solver.sample(steps, len(prompts), shape, eta=eta, x_T=options.get("start_code"), verbose=False)


@torch.no_grad()
def img2img(
    model: LatentDiffusion,
    prompts: Sequence[str],
    init: Image.Image | Tensor,
    *,
    strength: float = 0.75,
    negative_prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    scale: float | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> list[Image.Image]:
    """One picture a prompt, made from `init`: a picture, or its latents (B, C, h, w) from `encode_image`.

    strength: how much of the schedule to go through: 0 gives the picture back as the first stage sees it, 1 keeps next
    to nothing of it. height, width: resize a picture to these; by default its own size, floored to a multiple of 32.
    The rest as in `txt2img`, but for the public default of scale, which is 5 (SDEdit, Meng et al. 2022).
    """
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must be from 0 to 1, not {strength}")
    steps, sampler, scale = sampling_settings(model, 5.0, steps, sampler, scale, eta)
    solver = _sampler(model, sampler)
    solver.make_schedule(steps, ddim_eta=eta, verbose=False)
    if seed is not None:
        seed_everything(seed)
    latents = init if isinstance(init, Tensor) else encode_image(model, init, len(prompts), height, width)
    if len(latents) != len(prompts):
        raise ValueError(f"init has {len(latents)} latents for {len(prompts)} prompts")
    count = int(strength * steps)
    with _precision(model), model.ema_scope():
        guidance = _conditions(model, prompts, negative_prompt, scale)
        if count > 0:
            latents = solver.stochastic_encode(latents, count)
            latents = solver.decode(latents, guidance.pop("cond"), count, verbose=progress, **guidance)
        return _decode(model, latents)


@torch.no_grad()
def encode_image(
    model: LatentDiffusion, image: Image.Image, batch: int = 1, height: int | None = None, width: int | None = None
) -> Tensor:
    """`batch` latents (batch, C, h, w) of one picture, each a draw of its own from the first stage's posterior."""
    image = _fit(model, image, height, width)
    logger.info("Picture size: %dx%d", image.width, image.height)
    posterior = model.encode_first_stage(image_to_tensor(image).to(model.device, _first_stage_dtype(model)))
    if isinstance(posterior, DiagonalGaussianDistribution):  # encoded once, drawn from `batch` times
        posterior = DiagonalGaussianDistribution(posterior.parameters.expand(batch, -1, -1, -1))
        return model.get_first_stage_encoding(posterior).float()
    return model.get_first_stage_encoding(posterior).float().expand(batch, -1, -1, -1)


def start_latent(model: LatentDiffusion, batch: int, height: int, width: int) -> Tensor:
    """Noise (batch, C, h, w) to start several batches from, for pictures of height x width pixels."""
    return torch.randn((batch, model.channels, *model.latent_size(height, width)), device=model.device)


def _sampler(model: LatentDiffusion, name: str) -> Sampler:
    if name == "ddim":
        return DDIMSampler(model)
    if name == "plms":
        return PLMSSampler(model, convert_v=True)
    if name == "dpm_solver":
        return DPMSolverSampler(model)
    raise ValueError(f"sampler {name!r} is not one of {', '.join(SAMPLERS)}")


def _conditions(model: LatentDiffusion, prompts: Sequence[str], negative_prompt: str, scale: float) -> dict[str, Any]:
    """The prompts' condition and what guidance needs beside it."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError("prompts must be a list of at least one text")
    if negative_prompt and scale == 1.0:
        logger.warning("the negative prompt has no effect at scale 1, which is without guidance")
    key = model.model.conditioning_key
    if key != "crossattn" or model.cond_stage_model is None:
        raise ValueError(f"this model is conditioned by {key!r}, not by a prompt alone: it cannot draw from text only")
    uncond = None
    if scale != 1.0:
        uncond = model.get_learned_conditioning([negative_prompt]).expand(len(prompts), -1, -1)
    cond = model.get_learned_conditioning(list(prompts))
    return {"unconditional_conditioning": uncond, "cond": cond, "unconditional_guidance_scale": scale}


def _precision(model: LatentDiffusion) -> AbstractContextManager[Any]:
    dtype = getattr(model, "autocast_dtype", None)
    return torch.autocast(model.device.type, dtype=dtype) if dtype else contextlib.nullcontext()


def _decode(model: LatentDiffusion, latents: Tensor) -> list[Image.Image]:
    """Pictures of latents (B, C, h, w), decoded one by one, since that is where memory peaks."""
    _check_finite(latents, "the latents")
    images: list[Image.Image] = []
    for latent in latents.to(_first_stage_dtype(model)).split(1):
        pixels = model.decode_first_stage(latent).float()  # (1, 3, H, W)
        _check_finite(pixels, "the picture")
        images += tensor_to_images(pixels)
    return images


def _first_stage_dtype(model: LatentDiffusion) -> torch.dtype:
    return next((parameter.dtype for parameter in model.first_stage_model.parameters()), torch.float32)


def _check_finite(x: Tensor, what: str) -> None:
    if not torch.isfinite(x).all():
        raise ArithmeticError(
            f"{what} came out as NaN or infinite, and would be black: try --precision full, or another checkpoint"
        )
