"""Scaled dot-product attention: the one place where it is computed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.modules.layout import PLAIN, can_draw, has_kernels

SHORT = 128  # keys up to which the CPU's fused kernel loses in bfloat16
LONG = 2048  # keys from which on oneDNN's products and a softmax in the cache are quicker than the CPU's fused kernel
CACHED = 2**20  # scores that are made at a time: four megabytes
EXACT = ("cpu", "cuda")  # devices on which torch's own attention keeps scores in float32 whatever its inputs are


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (..., N, d) and k, v (..., M, d).

    mask (..., N, M): True where a key counts. causal: a query sees the keys up to its own place.

    Scores are float32 in every precision and on every device, also under autocast: Stable Diffusion 2's reach beyond
    65,504, where float16 ends, and one infinite score makes a picture black. Where torch's kernels do not see to that,
    float16 is widened first.

    On a CPU the backward pass of torch's fused kernel is slow in bfloat16: for few keys the formula as it stands is 1.5
    to 14 times as quick, forward and backward, and no less exact, as scores are float32 there too. For 256 keys and
    more its larger intermediate results take away the gain. Very many keys, as large pictures have, are multiplied
    by oneDNN where nothing is trained: 1.1 to 1.8 times as quick.
    """
    if q.dtype == torch.float16 and q.device.type not in EXACT:
        with torch.autocast(q.device.type, enabled=False):  # it would narrow them again
            wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal)
        return wide.to(v.dtype)
    if mask is None and not causal and k.shape[-2] >= LONG and q.ndim == 4 and can_draw(q, k) and has_kernels():
        return _attend_to_many(q, k, v)
    if mask is not None or q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)  # (..., N, M)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cpu").triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return scores.softmax(dim=-1).to(v.dtype) @ v


def _attend_to_many(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` of q (B, H, N, d) to k, v (B, H, M, d) on a CPU; few queries at a time, so that scores stay in cache."""
    product, laid_out = torch.ops.mkldnn._linear_pointwise, torch.ops.mkldnn._reorder_linear_weight
    batch, heads, queries, _ = q.shape
    keys = k.shape[-2]
    rows = max(CACHED // keys, 16)
    out = q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2)  # as a CrossAttention goes on with it
    weights = q.new_empty(rows, keys)
    k = k * q.shape[-1] ** -0.5
    for item in range(batch):
        for head in range(heads):
            to_scores = laid_out(k[item, head].contiguous())
            to_values = laid_out(v[item, head].t().contiguous())
            for some, result in zip(q[item, head].split(rows), out[item, head].split(rows)):
                scores = product(some.contiguous(), to_scores, None, *PLAIN)  # (rows, M)
                shares = torch.softmax(scores, dim=-1, out=weights[: len(some)])
                result.copy_(product(shares, to_values, None, *PLAIN))
    return out
