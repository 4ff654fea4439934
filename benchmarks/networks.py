"""Ours: networks of a config's shapes with random weights, and how they are made ready to draw."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ldm.checkpoint import build_on_meta

if TYPE_CHECKING:
    from ldm.models.autoencoder import AutoencoderKL
    from ldm.models.diffusion.ddpm import LatentDiffusion

N = TypeVar("N", bound=nn.Module)

POOL = 4_194_301  # random numbers that weights are made of; a prime, so that no two channels get the same


class Unavailable(ValueError):
    """A way of making networks ready that this version or this machine does not have."""


def build_ours(network: N, way: str, device: torch.device) -> N:
    """A network with weights, made ready by one of `settings.WAYS` as the library's loading does it.

    The one place that knows how. What is given stays as it is and shares its weights with what is returned. Raises
    Unavailable for what cannot be done here.
    """
    network = sharing_copy(network)
    if device.type == "cpu":
        _library("ldm.modules.layout", "lay_out")(network)
    else:
        network = in_channels_last(network)
    if way == "int8":
        quantize = _library("ldm.modules.int8", "quantize")
        try:
            quantize(network)
        except ValueError as error:
            raise Unavailable(str(error)) from error
    elif way == "compile":
        compile_network = _library("ldm.inference.compiling", "compile_network")
        if not compile_network(SimpleNamespace(device=device, model=network)):  # of a model it asks for no more
            raise Unavailable("it has no effect here")
    return network


def in_channels_last(network: N) -> N:
    """The network itself, its convolutions' weights in channels-last order."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch declares it nowhere


def decode_ours(first_stage: AutoencoderKL, z: Tensor) -> Tensor:
    """Latents (B, C, h, w) to pictures, as drawing does it with large ones, too."""
    return first_stage.decode(z)


def encode_ours(first_stage: AutoencoderKL, x: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) to latents, the posterior's means."""
    return first_stage.encode(x).mean


def _library(module: str, name: str) -> Callable[..., Any]:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise Unavailable(f"this version has no {module}.{name}") from None


def sharing_copy(network: N) -> N:
    """Modules and parameters of their own over the same memory, so that another order of one's weights is its own."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, memo | {id(buffer): buffer for buffer in network.buffers()})


def on_meta(model_config: dict[str, Any]) -> LatentDiffusion:
    """The whole model of a config without weights, to count operations and to take networks from."""
    return cast("LatentDiffusion", build_on_meta(model_config)).eval().requires_grad_(False)


@torch.no_grad()
def with_weights(network: N, device: torch.device, dtype: torch.dtype = torch.float32) -> N:
    """A copy of a network from `on_meta` with random weights: normal ones that keep the size of what goes through.

    Norms do nothing and biases are 0. What is no weight (schedules, positions) stays as the config makes it.
    """
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0), device="cpu")
    weights = {name: _weight(name, p, pool).to(dtype) for name, p in network.named_parameters()}
    network = copy.deepcopy(network)
    network.load_state_dict(weights, strict=False, assign=True)
    return network.to(device).eval().requires_grad_(False)


def _weight(name: str, like: Tensor, pool: Tensor) -> Tensor:
    if like.ndim < 2:
        return torch.full(like.shape, float(name.endswith("weight")), device="cpu")  # norms', and biases
    weight = torch.empty(like.numel(), device="cpu")
    scale = like[0].numel() ** -0.5
    for start in range(0, len(weight), POOL):
        part = weight[start : start + POOL]
        torch.mul(pool[: len(part)], scale, out=part)
    return weight.view(like.shape)
