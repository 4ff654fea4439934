"""Self-attention among fewer tokens (Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.attach import Handle, Override, Priority
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import Downsample, Upsample

MAX_RATIO = 0.75  # of four neighbors one stays


def merge_tokens(network: nn.Module, ratio: float) -> Handle:
    """Merge a fraction of the tokens in the self-attention of a UNet's outermost transformers.

    Only attention is spared the merged tokens: all else sees every position. Applies in the calling thread.

    Args:
        network: a UNet with spatial transformers.
        ratio: fraction of all tokens that are merged into others, from 0 to 0.75.

    Raises:
        ValueError: for another ratio, or a network without such transformers.
    """
    if not 0 <= ratio <= MAX_RATIO:
        raise ValueError(f"the ratio of tokens to merge must be from 0 to {MAX_RATIO}, not {ratio}")
    overrides: list[Override] = []
    for transformer in outermost_transformers(network):
        blocks: list[Any] = [block for block in transformer.transformer_blocks if not block.disable_self_attn]
        size = _MapSize(transformer)
        overrides += [size, *(_MergedAttention(block.attn1, size, ratio) for block in blocks)] if blocks else []
    if not overrides:
        raise ValueError("merging tokens needs a UNet whose transformers have self-attention: this network has none")
    return Handle("token merging", [override.attach() for override in overrides])


def outermost_transformers(network: Any) -> list[SpatialTransformer]:
    """Return the transformers at the largest of the sizes that have any; none for what is no UNet."""
    if not all(hasattr(network, name) for name in ("input_blocks", "output_blocks")):
        return []
    inward = (layer for block in network.input_blocks for layer in block.children())
    outward = (layer for block in reversed(network.output_blocks) for layer in reversed(list(block.children())))
    return [layer for layers in (inward, outward) for layer in _before_resampling(layers)]


def _before_resampling(layers: Iterable[nn.Module]) -> list[SpatialTransformer]:
    """Of layers from the outside in, the first transformers, up to where the size changes after them."""
    found: list[SpatialTransformer] = []
    for layer in layers:
        if isinstance(layer, SpatialTransformer):
            found.append(layer)
        elif found and (isinstance(layer, (Upsample, Downsample)) or getattr(layer, "updown", False)):
            break
    return found


class _MapSize(Override):
    """Override of `SpatialTransformer` that knows the size of the map whose tokens its blocks see."""

    priority = Priority.TOKEN_MERGING
    thread_local = True
    size: Sequence[int] = ()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.is_active():
            self.size = x.shape[2:]
        return self.original(x, *args, **kwargs)


class _MergedAttention(Override):
    """Override of self-attention that merges the tokens it attends with."""

    priority = Priority.TOKEN_MERGING
    thread_local = True
    state = ("size", "ratio")

    def __init__(self, attention: nn.Module, size: _MapSize, ratio: float) -> None:
        super().__init__(attention)
        self.size, self.ratio = size, ratio

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        among_themselves = all(value is None for value in (*args, *kwargs.values()))  # no context, no mask
        if not self.is_active() or not among_themselves or not self.ratio:
            return self.original(x, *args, **kwargs)
        merging = Merging(x, self.size.size, self.ratio)
        return merging.unmerge(self.original(merging.merge(x), *args, **kwargs))


class Merging:
    """Which of the tokens h (B, H W, C) of a feature map of `size` (H, W) are merged: a `ratio` of them all.

    In every 2x2 positions the first is a destination, dst (the paper chooses one at random). Of the others, src, those
    are merged that are most like a dst, by the cosine (section 3). Nothing is random, and no sum is taken in an order
    that could change: the same h always gives the same result.
    """

    def __init__(self, h: Tensor, size: Sequence[int], ratio: float) -> None:
        height, width = size
        positions = torch.arange(height * width, device=h.device).view(height, width)
        self._dst = positions[::2, ::2].flatten()
        self._src = torch.cat([positions[::2, 1::2].flatten(), positions[1::2].flatten()])
        dst_count, src_count = len(self._dst), len(self._src)
        merged = min(int(ratio * height * width), src_count)
        unit = F.normalize(h, dim=-1, eps=1e-6)  # which float16 can represent
        cosine, dst_index = (unit[:, self._src] @ unit[:, self._dst].transpose(1, 2)).max(dim=-1)  # (B, src)
        ranked = cosine.argsort(dim=-1, descending=True, stable=True)
        self._merged, self._unmerged = ranked[:, :merged], ranked[:, merged:]  # (B, .), indices into src
        dst_index = dst_index.gather(1, self._merged)  # (B, merged), indices into dst
        after_dst = torch.arange(dst_count, dst_count + src_count - merged, device=h.device)
        src_index = torch.empty_like(ranked).scatter(1, self._merged, dst_index)
        src_index = src_index.scatter(1, self._unmerged, after_dst.expand_as(self._unmerged))  # (B, src)
        self._index = torch.empty_like(positions.flatten()).expand(len(h), -1).clone()  # into the result of `merge`
        self._index[:, self._dst] = torch.arange(dst_count, device=h.device)
        self._index[:, self._src] = src_index
        self._add = h.new_zeros(len(h), dst_count, merged).scatter(1, dst_index[:, None], 1.0)  # of 0 and 1

    def merge(self, h: Tensor) -> Tensor:
        """Return dst, each the mean of itself and the src merged into it, and the unmerged src: (B, M, C)."""
        dst, src = h[:, self._dst], h[:, self._src]
        means = (dst + self._add @ gather_tokens(src, self._merged)) / (1 + self._add.sum(dim=-1, keepdim=True))
        return torch.cat([means, gather_tokens(src, self._unmerged)], dim=1)

    def unmerge(self, h: Tensor) -> Tensor:
        """Return (B, M, C) as (B, H W, C): each token has what it became part of."""
        return gather_tokens(h, self._index)


def gather_tokens(h: Tensor, positions: Tensor) -> Tensor:
    """The tokens of h (B, N, C) at positions (B, M): (B, M, C)."""
    return h.gather(1, positions[..., None].expand(-1, -1, h.shape[-1]))
