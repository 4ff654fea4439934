"""Transformer blocks of the conditional UNet (Rombach et al. 2022, section 3.3)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.limits import check_number
from ldm.modules.attending import attend
from ldm.modules.diffusionmodules.util import checkpoint, zero_module
from ldm.modules.layout import LaidOutLinear, can_draw
from ldm.modules.token_merging import Merging

AT_ONCE = 2**22  # numbers between its two layers that a feed-forward network makes at a time: 16 MB
FEWEST = 512  # tokens that it takes at a time, so that products pay, in int8, too
MOST_CONTEXTS = 3  # that attention remembers: guidance asks under one condition, under another, and under both


class GEGLU(nn.Module):
    """Linear layer whose output is gated by the GELU of its second half (Shazeer 2020)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:  # (..., dim_in) -> (..., dim_out)
        gated = self.proj.gated(x) if isinstance(self.proj, LaidOutLinear) else None
        if gated is not None:
            return gated
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers with GELU, or GEGLU if `glu`, between them."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner = int(dim * mult)
        project = GEGLU(dim, inner) if glu else nn.Sequential(nn.Linear(dim, inner), nn.GELU())
        self.net = nn.Sequential(project, nn.Dropout(dropout), nn.Linear(inner, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, N, dim) -> (B, N, dim_out)
        first = next(self.net.parameters())
        pieces = x[..., 0].numel() // max(AT_ONCE // first.shape[0], FEWEST)
        if pieces < 2 or not can_draw(x, first):
            return self.net(x)
        # what lies between is four to eight times as wide as x: some tokens at a time, it stays in the cache
        parts = x.flatten(0, -2).tensor_split(pieces)
        return torch.cat([self.net(some) for some in parts]).view(*x.shape[:-1], -1)


class CrossAttention(nn.Module):
    """Multi-head attention of x on `context`, or on itself without one."""

    coarse = False  # whether bfloat16 will do, as beside layers in int8

    kept: list[tuple[Any, list[Any], tuple[Tensor, Tensor]]] | None = None  # while `remembering_contexts`

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
        context_dim = context_dim or query_dim
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_q = nn.Linear(query_dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim), nn.Dropout(dropout))

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, N, query_dim), context (B, M, context_dim), mask (B, M) True where a context token counts."""
        q = self._split(self.to_q(x))  # (B, heads, N, dim_head)
        k, v = self._keys_and_values(x) if context is None else self._kept_keys_and_values(context, q.dtype)
        if mask is not None:
            mask = mask.flatten(1)[:, None, None, :].bool()  # broadcast over heads and queries
        out = attend(q, k, v, mask, coarse=self.coarse)
        return self.to_out(out.transpose(1, 2).flatten(2))  # (B, N, query_dim)

    def _keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:  # (B, M, D) -> (B, heads, M, dim_head) each
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def _split(self, y: Tensor) -> Tensor:  # (B, N, inner) -> (B, heads, N, dim_head)
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _kept_keys_and_values(self, context: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Those of a context that came before, where nothing has changed since (see `remembering_contexts`).

        dtype: that of the queries, which is another one once autocast is switched.
        """
        made_of = (context, *self.to_k.parameters(), *self.to_v.parameters())
        changes = torch.is_grad_enabled() or any(tensor.is_inference() for tensor in made_of)  # or may, unseen
        if self.kept is None or changes or torch.compiler.is_compiling():
            return self._keys_and_values(context)
        state = [dtype, *((id(tensor), tensor.data_ptr(), tensor._version) for tensor in made_of)]
        for _, then, answer in self.kept:
            if then == state:
                return answer
        answer = self._keys_and_values(context)
        self.kept = [*self.kept[1 - MOST_CONTEXTS :], (made_of, state, answer)]  # holding on to what has these ids
        return answer

    def values(self, x: Tensor) -> Tensor:
        """What comes out for x (B, N, query_dim) if each place attends to itself alone."""
        return self.to_out(self.to_v(x))


@contextlib.contextmanager
def remembering_contexts(network: nn.Module) -> Iterator[None]:
    """While this lasts, attention in `network` computes keys and values of a context once, not at every step.

    That is of the same tensor, unchanged and under the same weights, without gradients; compiled code does not.
    """
    found = [part for part in network.modules() if isinstance(part, CrossAttention)]
    try:
        for part in found:
            part.kept = []
        yield
    finally:
        for part in found:
            part.kept = None


class SelfAttending(nn.Module):
    """A module with self-attention that can be put out of the way (see `seeing_themselves_alone`)."""

    attends_to_itself = True
    alone = False  # each place has its own value, as if it attended to itself alone


@contextlib.contextmanager
def seeing_themselves_alone(network: nn.Module) -> Iterator[None]:
    """While this lasts, all self-attention in `network` is the identity on the values (Ahn et al. 2024, section 4.2).

    ValueError if it has none.
    """
    found = [part for part in network.modules() if isinstance(part, SelfAttending) and part.attends_to_itself]
    if not found:
        raise ValueError("perturbed-attention guidance needs self-attention in the middle of the network: it has none")
    try:
        for part in found:
            part.alone = True
        yield
    finally:
        for part in found:
            part.alone = False


class BasicTransformerBlock(SelfAttending):
    """Self-attention, cross-attention on the context, feed-forward; each after a layer norm, each residual."""

    merged_share = 0.0  # of the tokens, in self-attention (see `merging_tokens`)

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
        self.attends_to_itself = not disable_self_attn
        self.attn1 = CrossAttention(dim, context_dim if disable_self_attn else None, n_heads, d_head, dropout)
        self.ff = FeedForward(dim, glu=gated_ff, dropout=dropout)
        self.attn2 = CrossAttention(dim, context_dim, n_heads, d_head, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor, context: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """x (B, N, dim), context (B, M, context_dim); size: (H, W) of the N = H W places, needed to merge tokens."""
        return checkpoint(self._forward, (x, context, size), self.parameters(), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None, size: tuple[int, int] | None) -> Tensor:
        x = x + self._attended(self.norm1(x), context, size)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))

    def _attended(self, h: Tensor, context: Tensor | None, size: tuple[int, int] | None) -> Tensor:
        if self.alone:
            return self.attn1.values(h)
        if self.disable_self_attn:
            return self.attn1(h, context)
        if not self.merged_share:
            return self.attn1(h)
        if size is None:
            raise ValueError("merging tokens needs the size of the map that they are of: give `size`")
        merging = Merging(h, size, self.merged_share)
        return merging.unmerge(self.attn1(merging.merge(h)))


class SpatialTransformer(nn.Module):
    """Transformer over the positions of a feature map: project in, blocks, project out, residual.

    use_linear: project by linear layers instead of 1x1 convolutions (Stable Diffusion 2).
    context_dim: one width for all blocks, or one a block.
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
        contexts = (
            list(context_dim)
            if isinstance(context_dim, Iterable)
            else [context_dim] * check_number(depth, "transformer_depth")
        )
        if len(contexts) != depth:
            raise ValueError(f"context_dim gives {len(contexts)} widths for {depth} transformer blocks")
        self.use_linear = use_linear
        self.norm = nn.GroupNorm(math.gcd(32, in_channels), in_channels, eps=1e-6)
        self.proj_in = nn.Linear(in_channels, inner) if use_linear else nn.Conv2d(in_channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner,
                n_heads,
                d_head,
                dropout,
                width,
                disable_self_attn=disable_self_attn,
                checkpoint=use_checkpoint,
            )
            for width in contexts
        )
        self.proj_out = zero_module(nn.Linear(inner, in_channels) if use_linear else nn.Conv2d(inner, in_channels, 1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), context (B, M, context_dim) or None for self-attention only."""
        _, _, height, width = x.shape
        h = self.norm(x)
        if not self.use_linear:
            h = self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, HW, C)
        if self.use_linear:
            h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context, (height, width))
        if self.use_linear:
            h = self.proj_out(h)
        h = h.transpose(1, 2).unflatten(2, (height, width))  # (B, C, H, W)
        if not self.use_linear:
            h = self.proj_out(h)
        return x + h
