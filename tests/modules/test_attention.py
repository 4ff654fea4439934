"""`attend`: the two ways to compute attention are one function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.modules import attention
from ldm.modules.attention import CrossAttention, attend


def inputs(keys: int, dtype: torch.dtype, queries: int = 24) -> list[torch.Tensor]:
    """q, k, v of 2 items with 3 heads 8 wide, in the layout that CrossAttention gives them."""
    torch.manual_seed(0)
    return [torch.randn(2, length, 3, 8).to(dtype).transpose(1, 2).requires_grad_() for length in (queries, keys, keys)]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """The formula in float64."""
    scores = q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return scores.softmax(-1) @ v.double()


def never(*_: object, **__: object) -> None:
    raise AssertionError("the fused kernel was called")


@pytest.mark.parametrize("causal", [False, True])
def test_short_bfloat16_on_a_cpu_is_the_formula_as_exact_as_the_fused_kernel(monkeypatch, causal):
    q, k, v = inputs(24, torch.bfloat16)
    truth = exact(q, k, v, causal)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    monkeypatch.setattr(F, "scaled_dot_product_attention", never)
    ours = attend(q, k, v, causal=causal)
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).abs().max() <= 1.5 * (fused - truth).abs().max()
    for x in (q, k, v):
        (gradient,) = torch.autograd.grad(ours.square().sum(), x, retain_graph=True)
        (wanted,) = torch.autograd.grad(truth.square().sum(), x, retain_graph=True)
        assert (gradient - wanted).abs().max() <= 0.01 * wanted.abs().max()


def test_autocast_does_not_round_the_scores():
    q, k, v = (x.detach() * 4 for x in inputs(64, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        within = attend(q, k, v)
    assert torch.equal(within, attend(q, k, v))


@pytest.mark.parametrize("keys, dtype", [(24, torch.float32), (attention.SHORT + 1, torch.bfloat16)])
def test_all_else_is_the_fused_kernel(keys, dtype):
    q, k, v = inputs(keys, dtype)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_masked_keys_do_not_count_in_bfloat16():
    torch.manual_seed(0)
    layer = CrossAttention(16, 8, heads=2, dim_head=8).bfloat16()
    x, context = torch.randn(2, 5, 16).bfloat16(), torch.randn(2, 6, 8).bfloat16()
    mask = torch.arange(6).expand(2, -1) < 4
    torch.testing.assert_close(layer(x, context, mask), layer(x, context[:, :4]), rtol=0.02, atol=0.01)
