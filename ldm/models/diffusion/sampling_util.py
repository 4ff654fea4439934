"""Thresholding of predicted x_0 by its norm, as in the public code."""

from __future__ import annotations

from torch import Tensor


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """x with dimensions of size 1 appended until it has `target_dims`."""
    if x.ndim > target_dims:
        raise ValueError(f"x has {x.ndim} dimensions, more than target_dims {target_dims}")
    return x[(...,) + (None,) * (target_dims - x.ndim)]


def norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """Scale each item of x0 (B, ...) whose root mean square exceeds `value` down to it."""
    rms = append_dims(x0.pow(2).flatten(1).mean(1).sqrt().clamp(min=value), x0.ndim)
    return x0 * (value / rms)


def spatial_norm_thresholding(x0: Tensor, value: float) -> Tensor:
    """`norm_thresholding` of the channels of x0 (B, C, H, W) at each position."""
    rms = x0.pow(2).mean(1, keepdim=True).sqrt().clamp(min=value)
    return x0 * (value / rms)
