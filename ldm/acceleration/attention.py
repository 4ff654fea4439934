"""Attention to very many keys on a CPU: each head, or part of one, by a thread of its own."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.acceleration.onednn import PLAIN, Originals, has_kernels, usable
from ldm.attach import Override, Priority, own_method
from ldm.modules import attention, sdpa
from ldm.modules.attention import CrossAttention, SpatialSelfAttention
from ldm.modules.diffusionmodules import model, openaimodel
from ldm.modules.diffusionmodules.model import AttnBlock
from ldm.modules.diffusionmodules.openaimodel import QKVAttention

LONG = 2048  # keys from which on oneDNN's products and a softmax in the cache beat the CPU's fused kernel
LN2 = math.log(2)
MIN_SUM, MAX_SUM = 2.0**-60, 2.0**90  # sums of powers of two within which no weight or product with values is lost
SCORES = 2**19  # scores that a thread computes at a time: two megabytes

KINDS = (CrossAttention, SpatialSelfAttention, AttnBlock, QKVAttention)
METHODS = [own_method(kind, "attend") for kind in KINDS]
ORIGINALS = Originals(
    *((module, "scaled_dot_product_attention") for module in (attention, model, openaimodel, sdpa, F)),
)


class LongAttention(Override):
    """`attend` of an attention module by oneDNN, 1.4 to 1.7 times as fast for as many keys as large images have."""

    exact = True
    bf16 = False  # whether bfloat16 products are allowed where the processor has them

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "attend")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend with q (B, heads, N, d), k and v (B, heads, M, d'), or fall back to the original forward."""
        bf16 = self.bf16 and torch.cpu._is_avx512_bf16_supported()
        if (
            k.shape[-2] < (LONG // 2 if bf16 else LONG)
            or mask is not None
            or q.ndim != 4
            or not usable(q, k)
            or not has_kernels()
            or not can_run_parallel()
            or not ORIGINALS.unmodified()
            or getattr(type(self._module()), "attend", None) not in METHODS
        ):
            return self.original(q, k, v) if mask is None else self.original(q, k, v, mask)
        return attend_long(q, k, v, torch.bfloat16 if bf16 else q.dtype)


class LongAttentionBF16(LongAttention):
    """The same in bfloat16 where the processor has it: less exact, as int8 layers are."""

    priority = Priority.INT8
    bf16 = True


def attend_long(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute softmax(q k^T / sqrt(d)) v in `dtype`, for q (B, H, N, d) and k, v (B, H, M, d') on a CPU."""
    (batch, heads, length, _), width = q.shape, v.shape[-1]
    out = q.new_empty(batch, length, heads, width).transpose(1, 2)  # the order in which CrossAttention goes on
    scale = q.shape[-1] ** -0.5 / LN2
    q, k = q.to(dtype).contiguous(), (k * scale).to(dtype).contiguous()
    v = F.pad(v.to(dtype), (0, -width % 16)).transpose(2, 3).contiguous()  # (B, H, d', M); kernels work in 16s
    parts = math.ceil(torch.get_num_threads() / (batch * heads))  # of a head, where there are fewer heads than threads
    every = zip(*(x.flatten(0, 1) for x in (q, k, v)), chain(*out))
    if parts == 1:
        run_parallel(_attend_head, every)
        return out
    for head, keys, values, results in every:
        packed = _pack(keys, values)  # once for all parts
        run_parallel(_attend_rows, ((*part, *packed) for part in zip(head.chunk(parts), results.chunk(parts))))
    return out


def _pack(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keys (M, d) and values (d', M) packed for oneDNN, and M."""
    pack = torch.ops.mkldnn._reorder_linear_weight
    return pack(k), pack(v), len(k)


def _attend_head(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    _attend_rows(q, out, *_pack(k, v))


def _attend_rows(q: Tensor, out: Tensor, to_scores: Tensor, to_values: Tensor, keys: int) -> None:
    """Write the weights 2^(q k^T) of q (N, d), divided by their sums, times v^T into `out` (N, d' or less).

    As many rows at a time as a cache holds. A power of two is faster than a softmax, which first looks for each row's
    largest score; where scores are so large or so small that this is needed, a softmax it is.
    """
    product = torch.ops.mkldnn._linear_pointwise
    rows = max(SCORES // keys, 16)
    overflow = False  # whether powers have left the range of float32
    for some, result in zip(q.split(rows), out.split(rows)):
        weights = product(some, to_scores, None, *PLAIN)  # (rows, M)
        if not overflow:
            sums = weights.exp2_().sum(-1, keepdim=True).float()
            low, high = torch.aminmax(sums)
            overflow = not (low.item() > MIN_SUM and high.item() < MAX_SUM)  # also for NaN
            if not overflow:
                torch.div(product(weights, to_values, None, *PLAIN)[:, : out.shape[1]], sums, out=result)
                continue
            weights = product(some, to_scores, None, *PLAIN)
        weights = weights.mul_(LN2).softmax(-1)
        result.copy_(product(weights, to_values, None, *PLAIN)[:, : out.shape[1]])


# ---- threads that each compute on one core ----


def run_parallel(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> None:
    """Call `function(*arguments)` for all of `calls`, without gradients, on as many threads as torch uses.

    For many small products: one core has done one before two cores have met.
    """
    # a forked process has no threads, but would inherit the cache's entry
    executor = _executor(torch.get_num_threads(), os.getpid())
    for call in [executor.submit(function, *call) for call in calls]:
        call.result()


@functools.cache
def can_run_parallel() -> bool:
    """Return whether a thread can be told to use one core: torch uses OpenMP, and its functions can be found."""
    return torch.backends.openmp.is_available() and _openmp() is not None


@functools.cache
def _executor(count: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="ldm-worker", initializer=_initialize_thread)


def _initialize_thread() -> None:
    torch.get_num_threads()  # torch sets each thread's number when it first asks
    openmp = _openmp()
    if openmp is not None:
        openmp.omp_set_num_threads(1)  # counts for this thread only, unlike torch.set_num_threads
    torch.set_grad_enabled(False)  # likewise


def _openmp() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except TypeError:  # Windows
        return None
    return library if hasattr(library, "omp_set_num_threads") else None
