"""`scaled_dot_product_attention`: the ways to compute attention are one function, whatever the precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ldm.modules import sdpa
from ldm.modules.attention import CrossAttention
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock
from ldm.modules.sdpa import scaled_dot_product_attention


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
    ours = scaled_dot_product_attention(q, k, v, causal=causal)
    assert ours.dtype == torch.bfloat16
    assert (ours - truth).abs().max() <= 1.5 * (fused - truth).abs().max()
    for x in (q, k, v):
        (gradient,) = torch.autograd.grad(ours.square().sum(), x, retain_graph=True)
        (wanted,) = torch.autograd.grad(truth.square().sum(), x, retain_graph=True)
        assert (gradient - wanted).abs().max() <= 0.01 * wanted.abs().max()


def test_autocast_does_not_round_the_scores():
    q, k, v = (x.detach() * 4 for x in inputs(64, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        within = scaled_dot_product_attention(q, k, v)
    assert torch.equal(within, scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("keys, dtype", [(24, torch.float32), (sdpa.SHORT + 1, torch.bfloat16)])
def test_all_else_is_the_fused_kernel(keys, dtype):
    q, k, v = inputs(keys, dtype)
    assert torch.equal(scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_masked_keys_do_not_count_in_bfloat16():
    torch.manual_seed(0)
    layer = CrossAttention(16, 8, heads=2, dim_head=8).bfloat16()
    x, context = torch.randn(2, 5, 16).bfloat16(), torch.randn(2, 6, 8).bfloat16()
    mask = torch.arange(6).expand(2, -1) < 4
    torch.testing.assert_close(layer(x, context, mask), layer(x, context[:, :4]), rtol=0.02, atol=0.01)


def large(dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v in float16 whose scores, as Stable Diffusion 2's, are finite only in a wider type."""
    q, k, v = (x.detach().to(dtype) for x in inputs(24, torch.float32))
    return [q * 200, k * 200, v]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("exact_devices", [sdpa.FLOAT32_SCORES, ()])  # torch's kernel, and what other devices get
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_beyond_float16(monkeypatch, causal, exact_devices, autocast):
    monkeypatch.setattr(sdpa, "FLOAT32_SCORES", exact_devices)
    q, k, v = large(torch.float16)
    plain = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    assert not torch.isfinite(plain).all()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        ours = scaled_dot_product_attention(q, k, v, causal=causal)
    assert ours.dtype == torch.float16
    assert (ours - exact(q, k, v, causal)).abs().max() <= 2e-3


def test_float16_is_widened_where_kernels_are_not_known_to_do_it(monkeypatch):
    seen = []
    kernel = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.dtype, k.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(sdpa, "FLOAT32_SCORES", ())
    for dtype in (torch.float16, torch.float32):
        with torch.autocast("cpu", torch.float16):
            scaled_dot_product_attention(*inputs(24, dtype))
    assert seen == [(torch.float32, torch.float32, False), (torch.float32, torch.float32, True)]


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_in_float16_with_large_scores(autocast):
    """Queries and keys a hundred times as large as a new layer's: the layer's answer is that of float32."""
    torch.manual_seed(0)
    layer, block = CrossAttention(16, 8, heads=2, dim_head=8), AttentionBlock(32, num_heads=4)
    for weight in (layer.to_q.weight, layer.to_k.weight, block.qkv.weight[:64]):
        weight *= 300
    torch.nn.init.normal_(block.proj_out.weight)
    x, context, image = torch.randn(2, 5, 16), torch.randn(2, 6, 8), torch.randn(2, 32, 4, 4)
    wanted = layer(x, context), block(image)
    if not autocast:
        layer, block, x, context, image = (y.half() for y in (layer, block, x, context, image))
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        found = layer(x, context), block(image)
    for ours, truth in zip(found, wanted):
        assert torch.isfinite(ours).all()
        assert (ours - truth).abs().mean() <= 0.02 * truth.abs().mean()


def test_no_other_module_computes_attention():
    """So that float16 is safe, and bfloat16 quick, everywhere."""
    own = Path(sdpa.__file__)
    others = [path for path in own.parents[1].rglob("*.py") if path != own]
    assert len(others) > 50
    assert not [path.name for path in others if "F.scaled_dot_product_attention" in path.read_text()]
