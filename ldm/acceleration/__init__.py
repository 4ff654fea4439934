"""Faster inference, attached to a model from outside and removed by a handle (see `ldm.attach`)."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ldm.attach import Handle

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

__all__ = [
    "AccelerationOptions",
    "Handle",
    "accelerate",
    "cache_contexts",
    "cache_features",
    "compile_network",
    "merge_tokens",
    "offload",
    "quantize_int8",
]


@dataclass(frozen=True)
class AccelerationOptions:
    """Ways to sample faster that change the image; the defaults change nothing.

    Args:
        cache_features: compute the inner part of the UNet every N steps only (see `cache_features`).
        merge_tokens: fraction of the tokens that self-attention merges, up to 0.75 (see `merge_tokens`).
        quantize: "int8" or None (see `quantize_int8`).

    Raises:
        ValueError: for other values.
    """

    cache_features: int = 1
    merge_tokens: float = 0.0
    quantize: str | None = None

    def __post_init__(self) -> None:
        if self.cache_features < 1:
            raise ValueError(f"cache_features must be at least 1 (every step), not {self.cache_features}")
        if not 0 <= self.merge_tokens <= 0.75:
            raise ValueError(f"merge_tokens must be from 0 to 0.75, not {self.merge_tokens}")
        if self.quantize not in (None, "int8"):
            raise ValueError(f'quantize must be "int8" or None, not {self.quantize!r}')

    def attach(self, network: nn.Module) -> Handle:
        """Attach feature caching and token merging to `network` for one run of a sampler.

        Raises:
            ValueError: for a network without the parts that they need.
        """
        handles = []
        if self.cache_features > 1:
            handles.append(cache_features(network, self.cache_features))
        if self.merge_tokens > 0:
            handles.append(merge_tokens(network, self.merge_tokens))
        return Handle("acceleration options", on_remove=lambda: [handle.remove() for handle in handles][:0] or None)


def _entered(name: str, context: AbstractContextManager[object]) -> Handle:
    stack = contextlib.ExitStack()
    stack.enter_context(context)
    return Handle(name, on_remove=stack.close)


def accelerate(module: nn.Module) -> Handle:
    """Attach exact CPU kernels to the layers of `module`."""
    from ldm.modules.layout import lay_out

    lay_out(module)
    return Handle("onednn")


def quantize_int8(network: nn.Module) -> Handle:
    """Let the wide layers of `network` multiply in int8 on a CPU. ValueError where that is not faster."""
    from ldm.modules.int8 import quantize

    quantize(network)
    return Handle("int8")


def cache_features(network: nn.Module, every: int) -> Handle:
    """Compute the inner part of a UNet every N steps only, for one run of a sampler (DeepCache)."""
    from ldm.modules.feature_caching import caching_features

    return _entered("feature cache", caching_features(network, every))


def merge_tokens(network: nn.Module, ratio: float) -> Handle:
    """Merge a fraction of the tokens in the self-attention of a UNet's outermost transformers (ToMe)."""
    from ldm.modules.token_merging import merging_tokens

    return _entered("token merging", merging_tokens(network, ratio))


def cache_contexts(network: nn.Module) -> Handle:
    """Compute the keys and values of an unchanged context once."""
    from ldm.modules.attention import remembering_contexts

    return _entered("context cache", remembering_contexts(network))


def compile_network(model: LatentDiffusion, backend: str = "inductor") -> Handle | None:
    """Compile the network's repeated blocks at their first call; None where that is not faster."""
    from ldm.inference.compiling import compile_network as compile_blocks

    return Handle("compile") if compile_blocks(model, backend) else None


def offload(model: LatentDiffusion, device: torch.device) -> Handle:
    """Keep `model` on the CPU and move each part to `device` only while it is used."""
    from ldm.inference.lowvram import lodge

    lodge(model, device)
    return Handle("offload", on_remove=model.lodging.leave)
