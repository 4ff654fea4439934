"""Scaled dot-product attention: the one place where it is computed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 128  # keys up to which the CPU's fused kernel loses in bfloat16
EXACT = ("cpu", "cuda")  # devices on which torch's own attention keeps scores in float32 whatever its inputs are


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q (..., N, d) and k, v (..., M, d).

    mask (..., N, M): True where a key counts. causal: a query sees the keys up to its own place.

    Scores are float32 in every precision and on every device, also under autocast: Stable Diffusion 2's reach beyond
    65,504, where float16 ends, and one infinite score makes a picture black. Where torch's kernels do not see to that,
    float16 is widened first.

    On a CPU the backward pass of torch's fused kernel is slow in bfloat16: for few keys the formula as it stands is 1.5
    to 14 times as quick, forward and backward, and no less exact, as scores are float32 there too. For 256 keys and
    more its larger intermediate results take away the gain.
    """
    if q.dtype == torch.float16 and q.device.type not in EXACT:
        with torch.autocast(q.device.type, enabled=False):  # it would narrow them again
            wide = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, is_causal=causal)
        return wide.to(v.dtype)
    if mask is not None or q.device.type != "cpu" or q.dtype != torch.bfloat16 or k.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    with torch.autocast("cpu", enabled=False):
        scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)  # (..., N, M)
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cpu").triu(1)
            scores = scores.masked_fill(later, -math.inf)
        return scores.softmax(dim=-1).to(v.dtype) @ v
