"""Load models for sampling: find the config of a checkpoint, and check what its weights say about that config."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm.acceleration import accelerate, offload
from ldm.checkpoint import Checkpoint, build_on_meta, config_for, fill_model, read_checkpoint
from ldm.checkpoint.families import describe, family_of
from ldm.configs import merge_configs, parse_overrides, read_yaml
from ldm.devices import choose_device, choose_precision
from ldm.inference.conditioning import TEXT, Task, require, task_of
from ldm.inference.pipeline import Pipeline
from ldm.models.diffusion.samplers import SAMPLERS as SAMPLERS
from ldm.models.diffusion.schedules import SCHEDULES
from ldm.models.model_info import ModelInfo, SamplingDefaults
from ldm.util import public_path, warn_about_other_distributions

if TYPE_CHECKING:
    from ldm.models.autoencoder import FirstStage
    from ldm.models.diffusion.ddpm import LatentDiffusion

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
    """Load a model that is ready to sample from.

    On a CPU, kernels are attached that give the same images faster (`ldm.acceleration.accelerate`);
    `model.acceleration` lists what is attached. `model.info` tells the file and the model's own sampling defaults.

    Args:
        config: A YAML file. By default the one that the checkpoint's keys and shapes tell, or a config.yaml beside it.
            Where configs of noise and of v prediction fit alike (Stable Diffusion v2), one forward pass decides.
        ckpt: A .ckpt or .safetensors file. By default Stable Diffusion v1 at its public place, or the bundled model.
        device: "auto" (CUDA, else MPS, else the CPU) or a device.
        precision: "full", "autocast" (half precision where that is safe; on a CPU the same as full), "fp16" or "bf16".
        overrides: Settings on top of the config, such as `model.params.linear_end=0.02`.
        tasks: What the model must be conditioned on, one of these (see `ldm.inference.conditioning`); empty: anything.
        lowvram: Keep the model on the CPU, and its parts on `device` only while they are used.
        verify: Read the complete file first and compare it with its checksums.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: each with what to do.
    """
    warn_about_other_distributions()
    target = choose_device(device)
    precision = choose_precision(precision, target)
    checkpoint = _read(Path(ckpt) if ckpt is not None else _default_checkpoint(), verify)
    path = config or _find_config(checkpoint)
    model = _load(read_config(path, overrides), checkpoint, target, precision, lowvram)
    if tasks:
        require(model, *tasks)  # before the forward pass, which takes seconds
    if _is_only_config(path, checkpoint):
        _CheckAtFirstStep(model, checkpoint.path, path)
        return model
    predicted = predicts(model)
    if predicted is not None and predicted != model.parameterization:
        other = None if config else _config_with(predicted, checkpoint)
        if other is not None:
            logger.info("%s predicts %s: using %s", checkpoint.path, predicted, other)
            return _load(read_config(other, overrides), checkpoint, target, precision, lowvram)
        _warn_about(predicted, model.parameterization, checkpoint.path, path)
    return model


def load_pipeline(config: str | Path | None = None, ckpt: str | Path | None = None, **options: Any) -> Pipeline:
    """Load a model as a `Pipeline`. The arguments are those of `load_model`."""
    return Pipeline(load_model(config, ckpt, **options))


def load_first_stage(
    config: str | Path | None = None,
    ckpt: str | Path | None = None,
    *,
    device: str = "auto",
    precision: str = "full",
    verify: bool = False,
) -> FirstStage:
    """Load an autoencoder: that of an autoencoder's own file, or of a latent diffusion model's.

    The arguments and errors are those of `load_model`.
    """
    target = choose_device(device)
    precision = choose_precision(precision, target)
    checkpoint = _read(Path(ckpt) if ckpt is not None else _default_checkpoint(), verify)
    settings = read_config(config or _find_config(checkpoint, complete=False))
    model: Any = _build(settings)
    fill_model(model, checkpoint, dtype=DTYPES[precision])
    stage: Any = getattr(model, "first_stage_model", model)
    if not hasattr(stage, "downsampling_factor"):
        raise ValueError(f"{settings['model'].get('target')} has no first stage: fix the config")
    stage.info = _info(settings, checkpoint, precision)
    ready: FirstStage = stage.to(target).eval()
    _accelerate(ready)
    return ready


def _read(path: Path, verify: bool) -> Checkpoint:
    logger.info("Loading model from %s", path)
    checkpoint = read_checkpoint(path, verify=verify)
    if checkpoint.global_step is not None:
        logger.info("Global Step: %d", checkpoint.global_step)
    return checkpoint


def _load(
    settings: DictConfig, checkpoint: Checkpoint, device: torch.device, precision: str, lowvram: bool
) -> LatentDiffusion:
    """Build the model of a config, and load a checkpoint's weights into it."""
    model: Any = _build(settings)
    if hasattr(model, "downsampling_factor"):
        raise ValueError(f"{checkpoint.path} is an autoencoder alone, not a complete model: use scripts/reconstruct.py")
    if not hasattr(getattr(model, "first_stage_model", None), "downsampling_factor"):
        raise ValueError(
            f"{settings['model'].get('target')} is no latent diffusion model with a first stage: fix the config"
        )
    fill_model(model, checkpoint, dtype=DTYPES[precision])
    model.info = _info(settings, checkpoint, precision)
    if lowvram:
        offload(model, device).list_on(model)
    ready: LatentDiffusion = (model if lowvram else model.to(device)).eval()
    _accelerate(ready)
    return ready


def _accelerate(model: nn.Module) -> None:
    """Attach the exact kernels, which are for CPUs."""
    if next(model.parameters(), torch.empty(0)).device.type == "cpu":
        accelerate(model).list_on(model)


def _build(settings: DictConfig) -> nn.Module:
    """Build the model of a config without weights; ValueError for values of a type that it cannot take."""
    try:
        return build_on_meta(settings["model"])
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:  # of constructors
        raise ValueError(f"the config describes no model ({type(error).__name__}: {error}): fix its values") from error


def _info(settings: DictConfig, checkpoint: Checkpoint, precision: str) -> ModelInfo:
    return ModelInfo(
        checkpoint_path=str(checkpoint.path),
        family=describe(checkpoint.shapes),
        global_step=checkpoint.global_step,
        autocast_dtype=torch.float16 if precision == "autocast" else None,
        one_scale=bool(settings.get("one_scale", False)),
        sampling=_sampling_defaults(settings),
        mapped_file=checkpoint.mapped,
    )


# ---- configs ----


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a model's YAML config, with `overrides` (`key.sub=value`) on top.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it has no section of an override's name.
    """
    config = read_yaml(path)
    if "model" not in config:
        raise ValueError(f"config {path} has no `model:` section, so it does not describe a model")
    over = parse_overrides(overrides)
    if unknown := [name for name in over if name not in config]:
        raise ValueError(f"the config has no section {unknown[0]!r} to change, only {', '.join(map(str, config))}")
    return merge_configs([config, over], path)


def _sampling_defaults(config: DictConfig) -> SamplingDefaults:
    """The `sampling:` section of a config, checked."""
    section: Any = OmegaConf.to_container(config.get("sampling", None) or OmegaConf.create())
    valid = {
        "scale": lambda value: isinstance(value, (int, float)) and math.isfinite(value),
        "sampler": lambda value: value in SAMPLERS,
        "schedule": lambda value: value in SCHEDULES if isinstance(value, str) else _are_timesteps(value),
        "steps": lambda value: isinstance(value, int) and value > 0,
        "size": lambda value: isinstance(value, int) and value > 0,
    }
    for name, value in section.items():
        if name not in valid or isinstance(value, bool) or not valid[name](value):
            raise ValueError(
                f"the config's `sampling:` has {name}: {value!r}; it takes a number `scale`, a `sampler` of "
                f"{', '.join(SAMPLERS)}, a whole number of `steps`, a `schedule` of {', '.join(SCHEDULES)} or "
                "timesteps in a list, and a `size` in pixels"
            )
    return SamplingDefaults(**section)


def _are_timesteps(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(t, (int, float)) for t in value)


def _default_checkpoint() -> Path:
    public = public_path(DEFAULT_CKPT)
    if public is not None:
        return public
    bundled = public_path(BUNDLED_CKPT)
    if bundled is None:
        raise FileNotFoundError(f"there is neither {DEFAULT_CKPT} nor the bundled {BUNDLED_CKPT}: name a checkpoint")
    logger.info("No --ckpt and no %s: using the small bundled model, which generates shapes at 64x64", DEFAULT_CKPT)
    return bundled


def _find_config(checkpoint: Checkpoint, *, complete: bool = True) -> str | Path:
    """The one config that the weights' shapes tell; the config.yaml beside the file, if they tell none or several."""
    beside, family = Path(checkpoint.path).with_name("config.yaml"), family_of(checkpoint.shapes)
    if (family is None or len(family.configs) != 1) and beside.is_file():
        return beside
    return config_for(checkpoint, complete=complete)


def _is_only_config(path: str | Path, checkpoint: Checkpoint) -> bool:
    """Whether this is the only public config for files of this family, so that no other could be chosen instead."""
    family = family_of(checkpoint.shapes)
    return family is not None and family.configs == (str(path),)


def _config_with(parameterization: str, checkpoint: Checkpoint) -> str | None:
    """The public config for a file of this family with this `parameterization`."""
    family = family_of(checkpoint.shapes)
    for path in family.configs if family else ():
        if read_config(path)["model"]["params"].get("parameterization", "eps") == parameterization:
            return path
    return None


# ---- what a network predicts ----


@torch.no_grad()
def predicts(model: LatentDiffusion) -> str | None:
    """Tell "eps" or "v" prediction of a text-to-image network by one small forward pass; None if that is impossible.

    At the last timestep there is nothing but noise: a network that predicts noise returns its input, while
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0 (Salimans and Ho 2022) hardly depends on it. Untrained networks
    look like v.
    """
    if not _is_testable(model):
        return None
    try:
        empty = model.get_learned_conditioning([""])
    except FileNotFoundError:  # a tokenizer without its vocabulary; sampling complains about that
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn((1, model.channels, 16, 16), generator=generator, device="cpu").to(model.device)
    last = torch.full((1,), model.num_timesteps - 1, device=model.device)
    pipe = Pipeline(model)
    with pipe.inference_mode(pipe.resolve()):
        output = model.apply_model(noise, last, empty)
    return _classify(output, noise)


def _is_testable(model: LatentDiffusion) -> bool:
    return task_of(model) is TEXT and model.parameterization in ("eps", "v")


def _classify(output: Tensor, noise: Tensor) -> str:
    a, b = output.float().flatten(), noise.float().flatten()
    correlation = nn.functional.cosine_similarity(a - a.mean(), b - b.mean(), dim=0).item()
    return "eps" if correlation > 0.5 else "v"


def _warn_about(predicted: str, configured: str, path: Path, config: str | Path) -> None:
    logger.warning(
        "%s seems to use %s-prediction (or is untrained), but %s says parameterization: %s; "
        "if the images are noise or flat colors, change that in a config of your own",
        *(path, predicted, config, configured),
    )


class _CheckAtFirstStep:
    """Compare prediction and config at a network's first call, if its input is almost pure noise.

    That costs one comparison, where a forward pass for the purpose (`predicts`) reads all weights.
    """

    def __init__(self, model: LatentDiffusion, path: Path, config: str | Path) -> None:
        self.early, self.configured = 0.9 * model.num_timesteps, model.parameterization
        self.path, self.config = path, config
        self.hook = model.model.register_forward_hook(self, with_kwargs=True) if _is_testable(model) else None

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        if self.hook is not None:  # the caller
            self.hook.remove()
        x, t = args[:2]
        if t.min() >= self.early and (predicted := _classify(output.detach(), x.detach())) != self.configured:
            _warn_about(predicted, self.configured, self.path, self.config)
