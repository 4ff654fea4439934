"""Small pieces of the UNet, and the public home of names whose code lives in `schedule`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
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
from ldm.util import instantiate_from_config

__all__ = [
    "CheckpointFunction",
    "GroupNorm32",
    "HybridConditioner",
    "SiLU",
    "avg_pool_nd",
    "betas_for_alpha_bar",
    "checkpoint",
    "conv_nd",
    "extract_into_tensor",
    "linear",
    "make_beta_schedule",
    "make_ddim_sampling_parameters",
    "make_ddim_timesteps",
    "mean_flat",
    "noise_like",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "zero_module",
]


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Discretise a continuous cumulative alpha into betas: 1 - alpha_bar(t + 1/T) / alpha_bar(t).

    Args:
        num_diffusion_timesteps: T.
        alpha_bar: function of the time from 0 to 1.
        max_beta: upper limit, below 1 to prevent singularities.

    Returns:
        (T,) betas.
    """
    times = np.arange(num_diffusion_timesteps + 1) / num_diffusion_timesteps
    alphas = [alpha_bar(t) for t in times]
    return np.array([min(1 - after / before, max_beta) for before, after in zip(alphas, alphas[1:])])


# ---- layers ----


class SiLU(nn.Module):
    """x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class GroupNorm32(nn.GroupNorm):
    """Group norm that computes in float32 whatever its input's dtype, and returns the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, ...) -> same
        if x.dtype == torch.float32:
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()  # half-precision weights would round the statistics
        return nn.functional.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """Build the UNet's norm: eps 1e-5, 32 groups where 32 divides the channels."""
    return GroupNorm32(math.gcd(32, channels), channels)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Build a 1-, 2- or 3-dimensional convolution."""
    if dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3, not {dims}")
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Build 1-, 2- or 3-dimensional average pooling."""
    if dims not in (1, 2, 3):
        raise ValueError(f"dims must be 1, 2 or 3, not {dims}")
    return (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1](*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """Build a linear layer."""
    return nn.Linear(*args, **kwargs)


@torch.no_grad()
def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero and return it, so that a residual branch starts as nothing."""
    for parameter in module.parameters():
        parameter.zero_()
    return module


@torch.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters of `module` by `scale` and return it."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


class HybridConditioner(nn.Module):
    """Two conditioners in one: for what is concatenated to the input, and for cross-attention."""

    def __init__(self, c_concat_config: Mapping[str, Any], c_crossattn_config: Mapping[str, Any]) -> None:
        super().__init__()
        self.concat_conditioner = instantiate_from_config(c_concat_config)
        self.crossattn_conditioner = instantiate_from_config(c_crossattn_config)

    def forward(self, c_concat: Any, c_crossattn: Any) -> dict[str, list[Any]]:
        """Encode both conditions."""
        c_concat = self.concat_conditioner(c_concat)
        c_crossattn = self.crossattn_conditioner(c_crossattn)
        return {"c_concat": [c_concat], "c_crossattn": [c_crossattn]}


# ---- functions ----


def mean_flat(tensor: Tensor) -> Tensor:
    """Average over all dimensions but the batch: (B, ...) -> (B,)."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def checkpoint(func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Any], flag: bool) -> Any:
    """Call `func(*inputs)`; with `flag` and gradients on, recompute it in the backward pass to save memory.

    `params` is accepted for the public signature: torch's checkpointing finds the parameters itself.
    """
    if flag and torch.is_grad_enabled():
        return torch_checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)


class CheckpointFunction(torch.autograd.Function):
    """Reentrant gradient checkpointing, as published; `checkpoint` uses torch's own.

    Applied to (run_function, length, *inputs, *params), where the first `length` tensors are its inputs.
    """

    @staticmethod
    def forward(ctx: Any, run_function: Callable[..., Any], length: int, *args: Tensor) -> Any:
        """Run without recording; inputs are kept for `backward`."""
        ctx.run_function = run_function
        ctx.input_tensors, ctx.input_params = list(args[:length]), list(args[length:])
        with torch.no_grad():
            return run_function(*ctx.input_tensors)

    @staticmethod
    def backward(ctx: Any, *output_grads: Tensor) -> Any:
        """Run again with recording, and differentiate that."""
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in ctx.input_tensors]
        with torch.enable_grad():
            # views, because a function that works in place must not touch leaves
            outputs = ctx.run_function(*[x.view_as(x) for x in inputs])
        wanted = [x for x in (*inputs, *ctx.input_params) if x.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, output_grads, allow_unused=True))
        return (None, None, *(next(found) if x.requires_grad else None for x in (*inputs, *ctx.input_params)))


def noise_like(shape: Sequence[int], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Standard normal noise of `shape`; with `repeat` the same noise for every item of the batch."""
    if repeat:
        return torch.randn((1, *shape[1:]), device=device).expand(*shape)
    return torch.randn(tuple(shape), device=device)
