"""Models ready to draw with: which config a file needs, and what its weights say about that config."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.acceleration import accelerate, offload, unloading
from ldm.checkpoint import Checkpoint, build_on_meta, config_for, fill_model, read_checkpoint
from ldm.checkpoint.families import describe, family_of
from ldm.configs import merge_configs, parse_overrides, read_yaml
from ldm.devices import choose_device, choose_precision
from ldm.inference.conditioning import TEXT, Task, require, task_of
from ldm.models.diffusion.guidance import CFG_PP_SCALE, Guidance
from ldm.models.diffusion.samplers import SAMPLERS as SAMPLERS
from ldm.models.diffusion.schedules import SCHEDULES, ScheduleChoice
from ldm.models.model_info import ModelInfo, SamplingDefaults
from ldm.util import public_path, warn_about_other_distributions

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.models.first_stage import FirstStage

logger = logging.getLogger(__name__)

DEFAULT_CKPT = "models/ldm/stable-diffusion-v1/model.ckpt"
BUNDLED_CKPT = "models/ldm/shapes64/model.ckpt"

DTYPES = {"full": torch.float32, "autocast": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_model(
    config: str | Path | None = None,
    ckpt: str | Path | None = None,
    *,
    device: str = "auto",
    precision: str = "autocast",
    overrides: Sequence[str] = (),
    tasks: Sequence[Task] = (),
    lowvram: bool = False,
    verify: bool = False,
) -> LatentDiffusion:
    """A model ready to sample from, on `device` ("auto": CUDA, else MPS, else the CPU).

    ckpt: a .ckpt or .safetensors file; None is Stable Diffusion v1 at its public place, or else the bundled model.
    config: a YAML file; None is what the checkpoint's keys and shapes tell, or a config.yaml beside it. Where they fit
    models of noise and of v alike (Stable Diffusion v2), the network is asked which it is. Of a family with one
    config, what the network predicts is seen at its first step, and said if it is not what the config says.
    precision: "full", "autocast" (half precision where that is safe; on a CPU the same as full), "fp16" or "bf16".
    overrides: settings to lay over the config, as `model.params.linear_end=0.02`.
    tasks: what the model must draw from, one of these (see `ldm.inference.conditioning`); none for anything.
    lowvram: have its parts on `device` only while they are used (see `ldm.acceleration.offload`).
    verify: read the whole file first and compare it
    with its checksums (see `read_checkpoint`).

    Raises FileNotFoundError, CheckpointError or ValueError, each with what to do, if that does not work out.
    """
    warn_about_other_distributions()
    where = choose_device(device)
    precision = choose_precision(precision, where)
    checkpoint = _read(Path(ckpt) if ckpt is not None else _default_checkpoint(), verify)
    place = config or _config_beside(checkpoint)
    model = _filled(read_config(place, overrides), checkpoint, where, precision, lowvram)
    if tasks:
        require(model, *tasks)  # before the network is asked anything, which takes seconds
    if _certain(place, checkpoint):
        _AtFirstStep(model, checkpoint.path, place)
        return model
    seen = predicts(model)
    if seen is not None and seen != model.parameterization:
        other = None if config else _same_but(seen, checkpoint)
        if other is not None:
            logger.info("%s predicts %s: using %s", checkpoint.path, seen, other)
            return _filled(read_config(other, overrides), checkpoint, where, precision, lowvram)
        _warn_of(seen, model.parameterization, checkpoint.path, place)
    return model


def load_first_stage(
    config: str | Path | None = None,
    ckpt: str | Path | None = None,
    *,
    device: str = "auto",
    precision: str = "full",
    verify: bool = False,
) -> FirstStage:
    """An autoencoder ready for use: that of an autoencoder's own file, or of a latent diffusion model's.

    The options and errors are those of `load_model`.
    """
    where = choose_device(device)
    precision = choose_precision(precision, where)
    checkpoint = _read(Path(ckpt) if ckpt is not None else _default_checkpoint(), verify)
    settings = read_config(config or _config_beside(checkpoint, whole=False))
    model: Any = _built(settings)
    fill_model(model, checkpoint, dtype=DTYPES[precision])
    model = getattr(model, "first_stage_model", model)
    if not hasattr(model, "downsampling_factor"):
        raise ValueError(f"{settings['model'].get('target')} has no first stage: fix the config")
    model.checkpoint_path, model.mapped_file = str(checkpoint.path), checkpoint.mapped
    model.info = ModelInfo(
        str(checkpoint.path), describe(checkpoint.shapes), checkpoint.global_step, mapped_file=checkpoint.mapped
    )
    stage: FirstStage = model.to(where).eval()
    _accelerate(stage)
    return stage


def _accelerate(model: nn.Module) -> None:
    """Attach the exact kernels, which are for CPUs (see `ldm.acceleration`)."""
    if next(model.parameters(), torch.empty(0)).device.type == "cpu":
        accelerate(model).list_on(model)


def _read(path: Path, verify: bool) -> Checkpoint:
    logger.info("Loading model from %s", path)
    checkpoint = read_checkpoint(path, verify=verify)
    if checkpoint.global_step is not None:
        logger.info("Global Step: %d", checkpoint.global_step)
    return checkpoint


def _filled(
    settings: DictConfig, checkpoint: Checkpoint, device: torch.device, precision: str, lowvram: bool
) -> LatentDiffusion:
    """The model of a config, with a file's weights and what drawing wants to know."""
    model: Any = _built(settings)
    if hasattr(model, "downsampling_factor"):
        raise ValueError(f"{checkpoint.path} is an autoencoder alone, not a whole model: use scripts/reconstruct.py")
    if not hasattr(getattr(model, "first_stage_model", None), "downsampling_factor"):
        raise ValueError(
            f"{settings['model'].get('target')} is no latent diffusion model with a first stage: fix the config"
        )
    fill_model(model, checkpoint, dtype=DTYPES[precision])
    model.info = ModelInfo(
        checkpoint_path=str(checkpoint.path),
        family=describe(checkpoint.shapes),
        global_step=checkpoint.global_step,
        autocast_dtype=torch.float16 if precision == "autocast" else None,
        one_scale=bool(settings.get("one_scale", False)),
        sampling=_own_sampling(settings),
        mapped_file=checkpoint.mapped,
    )
    if lowvram:
        offload(model, device).list_on(model)
        model.one_by_one = True
    ready: LatentDiffusion = (model if lowvram else model.to(device)).eval()
    _accelerate(ready)
    return ready


def _built(settings: DictConfig) -> nn.Module:
    """The model of a config, without weights; ValueError for values of a type that it cannot take."""
    try:
        return build_on_meta(settings["model"])
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:  # of constructors
        raise ValueError(f"the config describes no model ({type(error).__name__}: {error}): fix its values") from error


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """A model's YAML config, with `overrides` (`key.sub=value`) laid over it.

    Raises FileNotFoundError or ValueError if it is none, or has no section of an override's name.
    """
    config = read_yaml(path)
    if "model" not in config:
        raise ValueError(f"config {path} has no `model:` section, so it does not describe a model")
    over = parse_overrides(overrides)
    if unknown := [name for name in over if name not in config]:
        raise ValueError(f"the config has no section {unknown[0]!r} to change, only {', '.join(map(str, config))}")
    return merge_configs([config, over], path)


def _own_sampling(config: DictConfig) -> SamplingDefaults:
    """The `sampling:` section of a config, checked: what counts where the user names nothing else."""
    section: Any = OmegaConf.to_container(config.get("sampling", None) or OmegaConf.create())
    own: dict[str, Any] = section
    valid = {
        "scale": lambda value: isinstance(value, (int, float)) and math.isfinite(value),
        "sampler": lambda value: value in SAMPLERS,
        "schedule": lambda value: value in SCHEDULES if isinstance(value, str) else _timesteps(value),
        "steps": lambda value: isinstance(value, int) and value > 0,
        "size": lambda value: isinstance(value, int) and value > 0,
    }
    for name, value in own.items():
        if name not in valid or isinstance(value, bool) or not valid[name](value):
            raise ValueError(
                f"the config's `sampling:` has {name}: {value!r}; it takes a number `scale`, a `sampler` of "
                f"{', '.join(SAMPLERS)}, a whole number of `steps`, a `schedule` of {', '.join(SCHEDULES)} or "
                "timesteps in a list, and a `size` in pixels"
            )
    return SamplingDefaults(**own)


def _timesteps(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(t, (int, float)) for t in value)


def sampling_settings(
    model: LatentDiffusion,
    public_scale: float,
    steps: int | None = None,
    sampler: str | None = None,
    scale: float | Sequence[float] | None = None,
    eta: float = 0.0,
    public_steps: int = 50,
    cfg_pp: bool = False,
) -> tuple[int, str, float | Sequence[float]]:
    """(steps, sampler, scale), each None as the model's own (`sampling:` in its config), else as the public default.

    The public defaults are `public_steps` of DDIM at `public_scale`. An `eta` above 0 asks for DDIM. `cfg_pp` has a
    scale of its own, since CFG++ counts otherwise.
    """
    if sampler is None and eta != 0:
        sampler = "ddim"
    if scale is None and cfg_pp:
        scale = CFG_PP_SCALE
    own = sampling_defaults(model)
    steps = (own.steps or public_steps) if steps is None else steps
    sampler = (own.sampler or "ddim") if sampler is None else sampler
    if scale is None:
        scale = public_scale if own.scale is None else own.scale
    return steps, sampler, scale


def sampling_defaults(model: LatentDiffusion) -> SamplingDefaults:
    """The sampling defaults of a loaded model; empty for others."""
    info = getattr(model, "info", None)
    return info.sampling if info else SamplingDefaults()


def sampling_plan(
    model: LatentDiffusion,
    public_scale: float,
    steps: int | None = None,
    sampler: str | None = None,
    scale: float | Sequence[float] | None = None,
    eta: float = 0.0,
    schedule: ScheduleChoice | None = None,
    guidance: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Guidance]:
    """What `draw` and `redraw` take of these options, and the guidance that they ask for.

    steps, sampler, scale: see `sampling_settings`. schedule: by default the model's own, else the sampler's. guidance:
    what else there is to `Guidance`. ValueError for what does not go together.
    """
    guidance = dict(guidance or {})
    steps, sampler, scale = sampling_settings(
        model, public_scale, steps, sampler, scale, eta, cfg_pp=guidance.get("cfg_pp", False)
    )
    schedule = sampling_defaults(model).schedule if schedule is None else schedule
    how = {"steps": steps, "sampler": sampler, "eta": eta, "schedule": schedule}
    return how, Guidance(scale, **guidance)


def _default_checkpoint() -> Path:
    public = public_path(DEFAULT_CKPT)
    if public is not None:
        return public
    bundled = public_path(BUNDLED_CKPT)
    if bundled is None:
        raise FileNotFoundError(f"there is neither {DEFAULT_CKPT} nor the bundled {BUNDLED_CKPT}: name a checkpoint")
    logger.info("No --ckpt and no %s: using the small bundled model, which draws shapes at 64x64", DEFAULT_CKPT)
    return bundled


def _config_beside(checkpoint: Checkpoint, *, whole: bool = True) -> str | Path:
    """The one config that shapes tell; the config.yaml in the file's folder, if they tell none or several."""
    beside, family = Path(checkpoint.path).with_name("config.yaml"), family_of(checkpoint.shapes)
    if (family is None or len(family.configs) != 1) and beside.is_file():
        return beside
    return config_for(checkpoint, complete=whole)


# ---- what a network predicts ----


def _certain(place: str | Path, checkpoint: Checkpoint) -> bool:
    """Whether this is the only public config for files of this family, so that no other could be chosen instead."""
    family = family_of(checkpoint.shapes)
    return family is not None and family.configs == (str(place),)


def _warn_of(seen: str, said: str, path: Path, place: str | Path) -> None:
    logger.warning(
        "%s looks like a model of %s, or like one that is not trained, but %s says parameterization: %s; "
        "if the pictures are noise or flat colours, change that in a config of your own",
        *(path, seen, place, said),
    )


class _AtFirstStep:
    """Sees at a network's first call, if that is with little but noise, whether it predicts what its config says.

    That costs one comparison, where a call for the purpose, as `predicts` makes it, reads all weights.
    """

    def __init__(self, model: LatentDiffusion, path: Path, place: str | Path) -> None:
        self.early, self.said = 0.9 * model.num_timesteps, model.parameterization
        self.path, self.place = path, place
        self.hook = model.model.register_forward_hook(self, with_kwargs=True) if _tells(model) else None

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        if self.hook is not None:  # it is what called
            self.hook.remove()
        x, t = args[:2]
        if t.min() >= self.early and (seen := _seen(output.detach(), x.detach())) != self.said:
            _warn_of(seen, self.said, self.path, self.place)


def _same_but(parameterization: str, checkpoint: Checkpoint) -> str | None:
    """Another public config for a file of this family, one with this `parameterization`."""
    family = family_of(checkpoint.shapes)
    for place in family.configs if family else ():
        if read_config(place)["model"]["params"].get("parameterization", "eps") == parameterization:
            return place
    return None


@torch.no_grad()
def predicts(model: LatentDiffusion) -> str | None:
    """What a text-to-image network seems to predict, "eps" or "v", from one small forward pass; None if it cannot tell.

    At the last timestep there is nothing but noise: a network that predicts noise gives its input back, while
    v = sqrt(abar) eps - sqrt(1 - abar) x0 (Salimans and Ho 2022) hardly depends on it. Untrained networks look like v.
    """
    if not _tells(model):
        return None
    try:
        nothing = model.get_learned_conditioning([""])
    except FileNotFoundError:  # a tokenizer without its vocabulary, which is for drawing to complain about
        return None
    noise = torch.randn((1, model.channels, 16, 16), generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(
        model.device
    )
    last = torch.full((1,), model.num_timesteps - 1, device=model.device)
    autocast = model.info.autocast_dtype if model.info else None
    precision = torch.autocast(model.device.type, dtype=autocast, enabled=autocast is not None)
    with precision, model.ema_scope(), unloading(model):
        output = model.apply_model(noise, last, nothing)
    return _seen(output, noise)


def _tells(model: LatentDiffusion) -> bool:
    return task_of(model) is TEXT and model.parameterization in ("eps", "v")


def _seen(output: Tensor, noise: Tensor) -> str:
    return "eps" if _correlation(output.float(), noise.float()) > 0.5 else "v"


def _correlation(a: Tensor, b: Tensor) -> float:
    return nn.functional.cosine_similarity(a.flatten() - a.mean(), b.flatten() - b.mean(), dim=0).item()
