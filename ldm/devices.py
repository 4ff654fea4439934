"""Where to compute, and in which precision: the only place that chooses."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ldm.distributed import environment

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PRECISIONS = ("full", "autocast", "fp16", "bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")


def choose_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA if there is one, then MPS, then the CPU.

    Of several processes that a launcher started on a machine, each takes the GPU of its own number.
    Raises ValueError if the device is unknown or this machine, or this build of torch, does not have it.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in available.items() if present)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r} is not one of {', '.join(DEVICES)}") from None
    if not available.get(device.type, False):
        raise ValueError(
            f"device {name!r} is not available with this machine and torch {torch.__version__}: use 'cpu' or 'auto'"
        )
    _, world, local = environment()
    if world == 1 or device != torch.device("cuda"):
        return device
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"there is no GPU for process {local + 1} on this machine, which has {torch.cuda.device_count()}: "
            f"start as many as it has, or use 'cpu'"
        )
    return torch.device("cuda", local)


def choose_precision(name: str, device: torch.device) -> str:
    """The precision to use on `device` when `name` (one of PRECISIONS) is asked for: on a CPU, autocast means full.

    What the device cannot do gives way to what comes nearest, with a warning. Raises ValueError if the name is unknown.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r} is not one of {', '.join(PRECISIONS)}")
    if device.type == "cpu":
        if name == "autocast":
            return "full"
        if name == "fp16":  # which many operations lack there
            logger.warning("precision fp16 does not work on a CPU: using full; bf16 needs less memory")
            return "full"
        if name == "bf16":
            logger.warning("bf16 on a CPU saves memory but is usually slower than --precision full")
    elif name == "bf16" and not _has_bf16(device):
        logger.warning("this %s has no bf16: using fp16", device.type.upper())
        return "fp16"
    return name


def _has_bf16(device: torch.device) -> bool:
    """Whether a device that is no CPU computes in bfloat16 by itself."""
    import torch

    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.cuda.is_bf16_supported(including_emulation=False)
