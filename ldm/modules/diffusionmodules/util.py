"""Small pieces of the UNet, and the public home of names whose code lives in `schedule`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ldm.modules.diffusionmodules.schedule import (
    extract_into_tensor,
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    timestep_embedding,
)
from ldm.modules.layout import Kept

__all__ = [
    "GroupNorm32",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "extract_into_tensor",
    "linear",
    "make_beta_schedule",
    "make_ddim_sampling_parameters",
    "make_ddim_timesteps",
    "noise_like",
    "normalization",
    "timestep_embedding",
    "zero_module",
]


class GroupNorm32(nn.GroupNorm):
    """Group norm that works in float32 whatever its input's dtype, and answers in the input's dtype."""

    _kept: tuple[Kept, ...] = ()

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...) -> same
        if x.dtype == torch.float32:
            return super().forward(x)
        weight, bias = self._in_float32()
        return nn.functional.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)

    def _in_float32(self) -> tuple[Tensor, Tensor]:
        """Weight and bias, kept from one call to the next while nothing trains or compiles.

        torch's kernel takes them in half precision, too, but would round what it normalises by to that.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.weight.float(), self.bias.float()
        own = (self.weight, self.bias)
        if not self._kept or not all(kept and kept.is_of(tensor) for kept, tensor in zip(self._kept, own)):
            self._kept = tuple(Kept(tensor, tensor.float()) for tensor in own)
        weight, bias = (kept.value for kept in self._kept)
        return weight, bias


def normalization(channels: int) -> GroupNorm32:
    """The UNet's norm: 32 groups, eps 1e-5. Fewer groups only where 32 do not divide a small model's channels."""
    return GroupNorm32(math.gcd(32, channels), channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-, 2- or 3-dimensional convolution."""
    if dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3, not {dims}")
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """1-, 2- or 3-dimensional average pooling."""
    if dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3, not {dims}")
    return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1](*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """`nn.Linear`, under its public name."""
    return nn.Linear(*args, **kwargs)


@torch.no_grad()
def zero_module(module: nn.Module) -> nn.Module:
    """`module` with all its parameters set to zero, so that a residual branch starts as nothing."""
    for parameter in module.parameters():
        parameter.zero_()
    return module


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Any], flag: bool) -> Any:
    """`func(*inputs)`; with `flag` and gradients on, recomputed in the backward pass to save memory.

    `params` is accepted for the public signature; torch's own checkpointing finds them itself.
    """
    if flag and torch.is_grad_enabled():
        return torch_checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Standard normal noise of `shape`; with `repeat` the same noise for every item of the batch."""
    if repeat:
        return torch.randn((1, *shape[1:]), device=device).expand(*shape)
    return torch.randn(tuple(shape), device=device)
