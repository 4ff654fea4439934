"""Counted operations, and how many a second this machine does at best."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import clock_of, timed

TRIES = 4  # of which the fastest counts


@torch.no_grad()
def count(call: Callable[[], object]) -> int:
    """Floating-point operations of `call` in products, convolutions and attention; a multiply-add counts as two.

    Networks and inputs on the meta device take neither time nor memory.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the faster of a large product and a large 3x3 convolution in channels-last order."""
    large = device.type != "cpu"
    side, (batch, channels, pixels) = (8192, (8, 1280, 64)) if large else (2048, (2, 320, 64))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    x = torch.randn(batch, channels, pixels, pixels, device=device).to(dtype, memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    calls = (lambda: a @ b, lambda: F.conv2d(x, kernel, padding=1))
    work = (2 * side**3, 2 * batch * pixels**2 * 9 * channels**2)
    return max(operations / _fastest(call, device) for operations, call in zip(work, calls))


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(2):
        call()
    return min(timed(call, clock_of(device)) for _ in range(TRIES))
