"""Where to compute, and in which precision: the only place that chooses."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ldm.processes import environment

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

    Raises ValueError if the name is unknown, and for fp16 on a CPU, where many operations lack it.
    """
    if name not in PRECISIONS:
        raise ValueError(f"precision {name!r} is not one of {', '.join(PRECISIONS)}")
    if device.type == "cpu":
        if name == "autocast":
            return "full"
        if name == "fp16":
            raise ValueError("precision fp16 does not work on a CPU: use full, or bf16 for less memory")
        if name == "bf16":
            logger.warning("bf16 on a CPU saves memory but is usually slower than --precision full")
    return name
