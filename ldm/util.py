"""Resolving a config's `target:` strings: the one place that knows public names and where they live now."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.trust import check_found, check_path, trust

__all__ = [
    "ALIASES",
    "FIRST_STAGE",
    "MARKERS",
    "UNCONDITIONAL",
    "default",
    "exists",
    "get_obj_from_str",
    "instantiate_from_config",
    "public_path",
    "trust",
]

# Where files of the public layout (configs/..., models/...) may be: here, in a clone, in an installation.
REPOSITORY = Path(__file__).resolve().parent.parent
INSTALLED = Path(sys.prefix) / "share" / "latent-diffusion"
BESIDE = REPOSITORY / "share" / "latent-diffusion"  # of `pip install --target`

UNCONDITIONAL = "__is_unconditional__"
FIRST_STAGE = "__is_first_stage__"
MARKERS = (UNCONDITIONAL, FIRST_STAGE)

# Public `target:` paths whose code has another home here. Configs and old checkpoints keep working unchanged.
ALIASES: dict[str, str] = {
    "taming.modules.vqvae.quantize.VectorQuantizer2": "ldm.modules.quantize.VectorQuantizer",
    "taming.modules.vqvae.quantize.VectorQuantizer": "ldm.modules.quantize.VectorQuantizer",
    "taming.modules.losses.DummyLoss": "ldm.modules.losses.vqperceptual.DummyLoss",
    "taming.modules.losses.vqperceptual.DummyLoss": "ldm.modules.losses.vqperceptual.DummyLoss",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": (
        "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    ),
    "taming.modules.losses.lpips.LPIPS": "ldm.modules.losses.lpips.LPIPS",
    "taming.modules.discriminator.model.NLayerDiscriminator": "ldm.modules.losses.discriminator.NLayerDiscriminator",
    "main.DataModuleFromConfig": "ldm.data.loading.DataModuleFromConfig",
    "main.WrappedDataset": "ldm.data.loading.WrappedDataset",
    "main.ImageLogger": "ldm.training.images.ImageLogger",
    "main.SetupCallback": "ldm.training.callbacks.SetupCallback",
    "main.CUDACallback": "ldm.training.callbacks.CUDACallback",
    "ldm.modules.attention.MemoryEfficientCrossAttention": "ldm.modules.attention.CrossAttention",
    "ldm.modules.diffusionmodules.model.MemoryEfficientAttnBlock": "ldm.modules.diffusionmodules.model.AttnBlock",
}


def public_path(path: str) -> Path | None:
    """Where a file of the public layout, such as "configs/x.yaml", is; None if it is nowhere."""
    return next((place / path for place in (Path(), REPOSITORY, INSTALLED, BESIDE) if (place / path).is_file()), None)


def exists(value: object) -> bool:
    """True unless `value` is None."""
    return value is not None


def default(value: Any, fallback: Any) -> Any:
    """`value`, or `fallback` (called if it is a function) when `value` is None."""
    if value is not None:
        return value
    return fallback() if callable(fallback) else fallback


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """The class a dotted path such as `ldm.models.autoencoder.AutoencoderKL` names; a function too, where trusted.

    Raises ImportError, naming the path, if it is not trusted (see `ldm.trust`), or leads to nothing that can be called.
    """
    if not isinstance(string, str):
        raise ImportError(f"target {string!r} is not a dotted path such as 'package.module.Class'")
    path = ALIASES.get(string, string)
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ImportError(f"target {string!r} is not a dotted path such as 'package.module.Class'")
    check_path(string, path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(f"target {string!r}: there is no module {error.name!r}") from error
    if reload:
        module = importlib.reload(module)
    try:
        found = getattr(module, name)
    except AttributeError as error:
        raise ImportError(f"target {string!r}: module {module_name!r} has no {name!r}") from error
    check_found(string, found)
    return found


def instantiate_from_config(config: Any, **extra: Any) -> Any:
    """Build the object that a `{target: dotted.path, params: {...}}` config describes.

    `extra` keyword arguments are added to `params` and win over them. The markers `__is_unconditional__` and
    `__is_first_stage__` stand for "nothing to build" and give None.

    Raises ValueError if `config` has no `target` or no such `params`, ImportError if the target does not resolve or is
    not trusted (see `ldm.trust`).
    """
    if config in MARKERS:
        return None
    if not isinstance(config, Mapping) and not hasattr(config, "get"):
        raise ValueError(f"a config must be a mapping with a 'target' key, not {config!r}")
    target = config.get("target")
    if target is None:
        raise ValueError(f"a config needs a 'target' key; this one has {sorted(map(str, config))}")
    params = config.get("params") or {}
    if not isinstance(params, Mapping) and not hasattr(params, "get"):
        raise ValueError(f"the params of {target} must be settings by name, not {params!r}")
    call = get_obj_from_str(target)
    try:
        return call(**{**params, **extra})
    except TypeError as error:
        # A misspelt or missing key; any other TypeError is a fault of the code and stays one.
        if re.search(r"unexpected keyword argument|missing \d+ required", str(error)):
            raise ValueError(f"the config of {target} does not fit: {error}") from error
        raise
