"""Transformer blocks of the conditional UNet (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.diffusionmodules.util import checkpoint
from ldm.modules.sdpa import scaled_dot_product_attention

_ATTN_PRECISION = "fp32"  # scores are float32 in every precision (see `sdpa`)

T = TypeVar("T")


def exists(val: object) -> bool:
    """Return whether `val` is not None."""
    return val is not None


def uniq(arr: Iterable[T]) -> list[T]:
    """Return the distinct elements in order of appearance."""
    return list(dict.fromkeys(arr))


def default(val: Any, d: Any) -> Any:
    """Return `val`, or if it is None the default `d`, called if it is a function."""
    if val is not None:
        return val
    return d() if callable(d) else d


def max_neg_value(t: Tensor) -> float:
    """Return the most negative finite number of a tensor's dtype."""
    return -torch.finfo(t.dtype).max


def init_(tensor: Tensor) -> Tensor:
    """Fill `tensor` in place, uniformly within 1 / sqrt(last dimension)."""
    bound = 1 / math.sqrt(tensor.shape[-1])
    return nn.init.uniform_(tensor, -bound, bound)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero and return it."""
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


def Normalize(in_channels: int) -> nn.GroupNorm:
    """Build the transformer's group norm: eps 1e-6, 32 groups where 32 divides the channels."""
    return nn.GroupNorm(math.gcd(32, in_channels), in_channels, eps=1e-6, affine=True)


class GEGLU(nn.Module):
    """Linear layer whose output is gated by the GELU of its second half (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim_in) -> (..., dim_out)
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers with GELU, or GEGLU if `glu`, between them."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: float = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = int(dim * mult)
        project_in = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(project_in, nn.Dropout(dropout), nn.Linear(inner, default(dim_out, dim)))

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., dim_out)
        return self.net(x)


class LinearAttention(nn.Module):
    """Attention whose cost is linear in the number of pixels (Shen et al. 2018): v softmax(k)^T applied to q."""

    def __init__(self, dim: int, heads: int = 4, dim_head: int = 32) -> None:
        super().__init__()
        self.heads = heads
        inner = dim_head * heads
        self.to_qkv = nn.Conv2d(dim, inner * 3, 1, bias=False)
        self.to_out = nn.Conv2d(inner, dim, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> same
        height, width = x.shape[2:]
        qkv = self.to_qkv(x).flatten(2).unflatten(1, (3, self.heads, -1))  # (B, 3, heads, d, N)
        q, k, v = qkv.unbind(1)
        context = k.softmax(dim=-1) @ v.transpose(-1, -2)  # (B, heads, d, d')
        out = context.transpose(-1, -2) @ q  # (B, heads, d', N)
        return self.to_out(out.flatten(1, 2).unflatten(2, (height, width)))


class SpatialSelfAttention(nn.Module):
    """Single-head self-attention over all pixels, residual."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.norm = Normalize(in_channels)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> same
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, HW, C)
        h = self.attend(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).squeeze(1)
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with q, k, v (B, 1, HW, C) -> (B, 1, HW, C)."""
        return scaled_dot_product_attention(q, k, v)


class CrossAttention(nn.Module):
    """Multi-head attention of x on `context`, or on itself without one."""

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        inner = dim_head * heads
        context_dim = default(context_dim, query_dim)
        self.heads = heads
        self.dim_head = dim_head
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Attend from x to the context.

        Args:
            x: (B, N, query_dim).
            context: (B, M, context_dim); None for x itself.
            mask: (B, M), True where a context token counts.

        Returns:
            (B, N, query_dim).
        """
        context = default(context, x)
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # (B, heads, N, dim_head)
        if mask is not None:
            mask = mask.flatten(1)[:, None, None, :].bool()  # broadcast over heads and queries
        out = self.attend(q, k, v, mask)
        return self.to_out(out.transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend with q (B, heads, N, dim_head) and k, v (B, heads, M, dim_head) -> (B, heads, N, dim_head)."""
        return scaled_dot_product_attention(q, k, v, mask)


MemoryEfficientCrossAttention = CrossAttention  # published for xFormers, which was another kernel for the same function


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention on the context, feed-forward; each after a layer norm, each residual."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool = True,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        self.disable_self_attn = disable_self_attn
        self.attn1 = CrossAttention(dim, context_dim if disable_self_attn else None, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Transform tokens x (B, N, dim) under a context (B, M, context_dim)."""
        return checkpoint(self._forward, (x, context), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x), context=context if self.disable_self_attn else None)
        x = x + self.attn2(self.norm2(x), context=context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the positions of a feature map: project in, blocks, project out, residual.

    Args:
        in_channels: channels of the map.
        n_heads, d_head: heads of attention, and the width of each.
        depth: transformer blocks.
        dropout: probability of dropout in the blocks.
        context_dim: width of the context, one for all blocks or one a block.
        disable_self_attn: attend to the context where self-attention would be.
        use_linear: project by linear layers instead of 1x1 convolutions (Stable Diffusion 2).
        use_checkpoint: recompute the blocks in the backward pass to save memory.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | Sequence[int] | None = None,
        disable_self_attn: bool = False,
        use_linear: bool = False,
        use_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        inner = n_heads * d_head
        if isinstance(context_dim, Sequence) and len(context_dim) != depth:
            raise ValueError(f"context_dim has {len(context_dim)} widths for {depth} transformer blocks")
        self.in_channels = in_channels
        self.use_linear = use_linear
        self.norm = Normalize(in_channels)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner,
                n_heads,
                d_head,
                dropout=dropout,
                context_dim=width,
                disable_self_attn=disable_self_attn,
                checkpoint=use_checkpoint,
            )
            for width in (context_dim if isinstance(context_dim, Sequence) else repeat(context_dim, depth))
        )
        self.proj_out = zero_module(nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Transform a map.

        Args:
            x: (B, C, H, W).
            context: (B, M, context_dim), or a list of one a block; None for self-attention only.

        Returns:
            (B, C, H, W).
        """
        blocks = len(self.transformer_blocks)
        contexts = list(context) if isinstance(context, (list, tuple)) else [context]
        if len(contexts) == 1:
            contexts *= blocks
        h = self.norm(x)
        if not self.use_linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, HW, C)
        if self.use_linear:
            h = self.proj_in(h)
        for block, own in zip(self.transformer_blocks, contexts, strict=True):
            h = block(h, context=own)
        if self.use_linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)
        if not self.use_linear:
            h = self.proj_out(h)
        return x + h
