"""Scaled dot-product attention: the one place where it is computed."""

from __future__ import annotations

import math
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules.layout import PLAIN, can_draw, has_kernels
from ldm.modules.workers import can_part, side_by_side

SHORT = 128  # keys up to which the CPU's fused kernel loses in bfloat16
LONG = 2048  # keys from which on oneDNN's products and a softmax in the cache are quicker than the CPU's fused kernel
LN2 = math.log(2)
LEAST, MOST = 2.0**-60, 2.0**90  # sums of powers of two in which neither shares nor their products with values are lost
CACHED = 2**19  # scores that a thread makes at a time: two megabytes
EXACT = ("cpu", "cuda")  # devices on which torch's own attention keeps scores in float32 whatever its inputs are


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, coarse: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (..., N, d) and k, v (..., M, d).

    mask (..., N, M): True where a key counts. causal: a query sees the keys up to its own place. coarse: bfloat16 will
    do, where it is quicker.

    But for that, scores are float32 in every precision and on every device, also under autocast: Stable Diffusion 2's
    reach beyond 65,504, where float16 ends, and one infinite score makes a picture black. Where torch's kernels do not
    see to that, float16 is widened first.

    On a CPU the backward pass of torch's fused kernel is slow in bfloat16: for few keys the formula as it stands is 1.5
    to 14 times as quick, forward and backward, and no less exact, as scores are float32 there too. For 256 keys and
    more its larger intermediate results take away the gain. Very many keys, as large pictures have, are multiplied
    by oneDNN where nothing is trained: 1.4 to 1.7 times as quick.
    """
    if q.dtype == torch.float16 and q.device.type not in EXACT:
        with torch.autocast(q.device.type, enabled=False):  # it would narrow them again
            wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal)
        return wide.to(v.dtype)
    coarse = coarse and torch.cpu._is_avx512_bf16_supported()
    enough = LONG // 2 if coarse else LONG
    if mask is None and not causal and k.shape[-2] >= enough and q.ndim == 4 and _can_part(q, k):
        return _attend_to_many(q, k, v, torch.bfloat16 if coarse else q.dtype)
    if mask is not None or q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)  # (..., N, M)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cpu").triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return scores.softmax(dim=-1).to(v.dtype) @ v


def _can_part(q: Tensor, k: Tensor) -> bool:
    return can_draw(q, k) and has_kernels() and can_part()


def _attend_to_many(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """`attend`, in `dtype`, of q (B, H, N, d) to k, v (B, H, M, d') on a CPU: each head, or part of one, by a thread
    of its own."""
    (batch, heads, length, _), width = q.shape, v.shape[-1]
    out = q.new_empty(batch, length, heads, width).transpose(1, 2)  # as a CrossAttention goes on with it
    scale = q.shape[-1] ** -0.5 / LN2
    q, k = q.to(dtype).contiguous(), (k * scale).to(dtype).contiguous()
    v = F.pad(v.to(dtype), (0, -width % 16)).transpose(2, 3).contiguous()  # (B, H, d', M); kernels make 16 at a time
    pieces = math.ceil(torch.get_num_threads() / (batch * heads))  # of a head, where there are fewer than threads
    every = zip(*(x.flatten(0, 1) for x in (q, k, v)), chain(*out))
    if pieces == 1:
        side_by_side(_attend_head, every)
        return out
    for head, keys, values, results in every:
        laid_out = _laid_out(keys, values)  # once for all its pieces
        side_by_side(_attend_rows, ((*part, *laid_out) for part in zip(head.chunk(pieces), results.chunk(pieces))))
    return out


def _laid_out(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys (M, d) and values (d', M) in oneDNN's order, and M."""
    lay_out = torch.ops.mkldnn._reorder_linear_weight
    return lay_out(k), lay_out(v), len(k)


def _attend_head(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    _attend_rows(q, out, *_laid_out(k, v))


def _attend_rows(q: Tensor, out: Tensor, to_scores: Tensor, to_values: Tensor, keys: int) -> None:
    """The shares 2^(q k^T) of q (N, d) and so many keys, times v^T, into `out` (N, d' or less); see `_laid_out`.

    So many rows at a time as a cache holds. A power of two is quicker than a softmax, which first looks for each row's
    largest score; where scores are so large or so small that this is needed, a softmax it is.
    """
    product = torch.ops.mkldnn._linear_pointwise
    rows = max(CACHED // keys, 16)
    steep = False  # whether powers have gone beyond what numbers hold
    for some, result in zip(q.split(rows), out.split(rows)):
        shares = product(some, to_scores, None, *PLAIN)  # (rows, M)
        if not steep:
            sums = shares.exp2_().sum(-1, keepdim=True).float()
            low, high = torch.aminmax(sums)
            steep = not (low.item() > LEAST and high.item() < MOST)  # as NaN is, too
            if not steep:
                torch.div(product(shares, to_values, None, *PLAIN)[:, : out.shape[1]], sums, out=result)
                continue
            shares = product(some, to_scores, None, *PLAIN)
        shares = shares.mul_(LN2).softmax(-1)
        result.copy_(product(shares, to_values, None, *PLAIN)[:, : out.shape[1]])
