"""Choose the device and the precision."""

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
    """Return the device called `name`; "auto" is CUDA if available, then MPS, then the CPU.

    Under a launcher, "cuda" is the GPU of the process's local rank.

    Raises:
        ValueError: the device is unknown, or not available here.
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
    _, world_size, local_rank = environment()
    if world_size == 1 or device != torch.device("cuda"):
        return device
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"there is no GPU for process {local_rank + 1} on this machine, which has {torch.cuda.device_count()}: "
            "start at most as many processes as GPUs, or use 'cpu'"
        )
    return torch.device("cuda", local_rank)


def choose_precision(name: str, device: torch.device) -> str:
    """Return the precision to use on `device`: on a CPU, autocast means full precision.

    A precision that the device lacks is replaced by the nearest, with a warning.

    Raises:
        ValueError: `name` is not one of `PRECISIONS`.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r} is not one of {', '.join(PRECISIONS)}")
    if device.type == "cpu":
        if name == "autocast":
            return "full"
        if name == "fp16":
            logger.warning("precision fp16 does not work on a CPU: using full; bf16 needs less memory")
            return "full"
        if name == "bf16":
            logger.warning("bf16 on a CPU saves memory but is usually slower than --precision full")
    elif name == "bf16" and not _has_bf16(device):
        logger.warning("this %s device has no bf16: using fp16", device.type.upper())
        return "fp16"
    return name


def _has_bf16(device: torch.device) -> bool:
    """Return whether a CUDA or MPS device computes in bfloat16 without emulation."""
    import torch

    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.cuda.is_bf16_supported(including_emulation=False)
