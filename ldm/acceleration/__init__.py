"""Faster inference, attached to a model from outside and removed by a handle (see `ldm.attach`).

    handle = accelerate(model)           # exact CPU kernels; `ldm.inference` attaches them by default
    with cache_features(network, 3):     # these change the image
        ...
    handle.remove()

Several may be attached together, in any order: each has a `Priority`, and a call goes through them from the highest to
the lowest (`compile_network`, `cache_features`, `merge_tokens`, `cache_contexts`, `quantize_int8`, `accelerate`).
Class names, parameters and state dicts stay. Hooks, a `forward` set on an instance, replaced children, subclasses and
replaced class methods take effect as without acceleration: a kernel that would bypass them is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ldm.acceleration.attention import KINDS as ATTENTION
from ldm.acceleration.attention import LongAttention
from ldm.acceleration.chunked import ChunkedOutput, ChunkedResnetBlock
from ldm.acceleration.compile import compile_network
from ldm.acceleration.context_cache import cache_contexts
from ldm.acceleration.feature_cache import cache_features
from ldm.acceleration.int8 import has_int8, quantize_int8
from ldm.acceleration.offload import OffloadHook, offload, unload_afterwards
from ldm.acceleration.onednn import (
    ChannelsLast,
    ChunkedFeedForward,
    FusedGEGLU,
    FusedUpsample,
    PackedConv2d,
    PackedLinear,
    has_kernels,
    refresh,
)
from ldm.acceleration.token_merging import MAX_RATIO, merge_tokens
from ldm.attach import Handle, Override, override_chain
from ldm.modules.attention import GEGLU, FeedForward
from ldm.modules.diffusionmodules import model as first_stage
from ldm.modules.diffusionmodules import openaimodel

__all__ = [
    "AccelerationOptions",
    "Handle",
    "OffloadHook",
    "accelerate",
    "cache_contexts",
    "cache_features",
    "compile_network",
    "has_int8",
    "merge_tokens",
    "offload",
    "quantize_int8",
    "refresh",
    "unload_afterwards",
]

LAYERS: dict[type[nn.Module], type[Override]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    GEGLU: FusedGEGLU,
    FeedForward: ChunkedFeedForward,
    first_stage.Upsample: FusedUpsample,
    openaimodel.Upsample: FusedUpsample,
    first_stage.ResnetBlock: ChunkedResnetBlock,
}
NETWORKS = (openaimodel.UNetModel, openaimodel.EncoderUNetModel, first_stage.Encoder, first_stage.Decoder)


def accelerate(module: nn.Module) -> Handle:
    """Attach exact CPU kernels to every layer of `module` that has one: packed weights, fused and chunked layers.

    They compute without gradients in float32 on a CPU; any other call goes on as before. Weights are packed at the
    first call, which takes as much memory again, and followed when they change (see `onednn.PackedWeight` and
    `refresh`). Layers with a `forward` of somebody else's are left alone, and so are layers that have kernels already.
    """
    overrides: list[Override] = []
    for part in module.modules() if has_kernels() else ():
        kind = LAYERS.get(type(part))
        candidates: list[Override] = [] if kind is None else [kind(part)]
        if isinstance(part, ATTENTION):
            candidates.append(LongAttention(part))
        if isinstance(part, NETWORKS):
            candidates.append(ChannelsLast(part))
        if type(part) in (first_stage.Encoder, first_stage.Decoder):
            candidates.append(ChunkedOutput(part, "_output"))
        for override in candidates:
            attached = override_chain(part, override.attribute)
            if attached is not None and not any(type(other) is type(override) for other in attached):
                overrides.append(override.attach())
    return Handle("cpu kernels", overrides)


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
        if not isinstance(self.cache_features, int) or self.cache_features < 1:
            raise ValueError(f"cache_features must be a whole number from 1 (every step), not {self.cache_features}")
        if not 0 <= self.merge_tokens <= MAX_RATIO:
            raise ValueError(f"merge_tokens must be from 0 to {MAX_RATIO}, not {self.merge_tokens}")
        if self.quantize not in (None, "int8"):
            raise ValueError(f'quantize must be "int8" or None, not {self.quantize!r}')

    def attach(self, network: nn.Module) -> Handle:
        """Attach feature caching and token merging to `network`, for one run of a sampler in the calling thread.

        int8 layers are not attached here: weights are quantized once, not for every run.

        Raises:
            ValueError: for a network without the parts that they need.
        """
        overrides = cache_features(network, self.cache_features).overrides if self.cache_features > 1 else []
        try:
            merging = merge_tokens(network, self.merge_tokens).overrides if self.merge_tokens > 0 else []
        except ValueError:
            Handle("", overrides).remove()
            raise
        return Handle("feature cache and token merging", [*overrides, *merging])
