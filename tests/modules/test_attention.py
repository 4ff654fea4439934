"""`attend`: the ways to compute attention are one function, whatever the precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ldm.modules import attending, attention
from ldm.modules.attending import attend
from ldm.modules.attention import CrossAttention, FeedForward
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock


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


@pytest.mark.parametrize("keys, dtype", [(24, torch.float32), (attending.SHORT + 1, torch.bfloat16)])
def test_all_else_is_the_fused_kernel(keys, dtype):
    q, k, v = inputs(keys, dtype)
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


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
@pytest.mark.parametrize("exact_devices", [attending.EXACT, ()])  # torch's kernel as it is, and as other devices get it
@pytest.mark.parametrize("autocast", [False, True])
def test_scores_beyond_float16(monkeypatch, causal, exact_devices, autocast):
    monkeypatch.setattr(attending, "EXACT", exact_devices)
    q, k, v = large(torch.float16)
    plain = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
    assert not torch.isfinite(plain).all()
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        ours = attend(q, k, v, causal=causal)
    assert ours.dtype == torch.float16
    assert (ours - exact(q, k, v, causal)).abs().max() <= 2e-3


def test_float16_is_widened_where_kernels_are_not_known_to_do_it(monkeypatch):
    seen = []
    kernel = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.dtype, k.dtype, torch.is_autocast_enabled("cpu")))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(attending, "EXACT", ())
    for dtype in (torch.float16, torch.float32):
        with torch.autocast("cpu", torch.float16):
            attend(*inputs(24, dtype))
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
    own = Path(attending.__file__)
    others = [path for path in own.parents[1].rglob("*.py") if path != own]
    assert len(others) > 50
    assert not [path.name for path in others if "scaled_dot_product_attention" in path.read_text()]


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, 400.0, -400.0])  # of all scores: it makes no difference
@pytest.mark.parametrize("coarse", [False, True])
def test_many_keys_whatever_the_size_of_scores(monkeypatch, size, offset, coarse):
    """Beyond what powers of two hold, too; rows are taken a few at a time, and not all of them are steep."""
    if not attending.has_kernels():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(attending, "LONG", 64)
    monkeypatch.setattr(attending, "CACHED", 64 * 16)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 64, 16) for _ in range(3))
    q[:, :, 40:] *= size
    q[..., 0], k[..., 0] = 4.0, offset  # a score of q0 k0 / 4
    wanted = (q.double() @ k.double().mT / 4).softmax(-1) @ v.double()
    found = attending.attend(q, k, v, coarse=coarse)
    assert found.isfinite().all()
    if coarse and attending._can_part(q, k):
        if size <= 1 and not offset:  # else eight bits of mantissa cannot tell
            assert (found - wanted).norm() < 0.01 * wanted.norm()
    else:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-3 if size > 1 or offset else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_many_keys_hide_no_fault(monkeypatch, bad):
    monkeypatch.setattr(attending, "LONG", 64)
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    k[0, 1, 5, 3] = bad
    found = attending.attend(q, k, v)
    assert found[0, 0].isfinite().all() and found[0, 1].isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 3, 64])
def test_one_head_is_shared_by_threads(monkeypatch, queries):
    monkeypatch.setattr(attending, "LONG", 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, queries, 16), torch.randn(1, 1, 64, 16), torch.randn(1, 1, 64, 24)
    wanted = (q.double() @ k.double().mT / 4).softmax(-1) @ v.double()
    torch.testing.assert_close(attending.attend(q, k, v).double(), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("glu", [False, True])
def test_feed_forward_some_tokens_at_a_time(monkeypatch, glu):
    torch.manual_seed(0)
    layer, x = FeedForward(16, dim_out=8, glu=glu), torch.randn(2, 30, 16)
    wanted = layer(x)
    monkeypatch.setattr(attention, "AT_ONCE", 128 * 7)
    monkeypatch.setattr(attention, "FEWEST", 1)
    calls: list[int] = []
    layer.net[-1].register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-6)
    assert calls == ([8] * 4 + [7] * 4 if glu else [15] * 4)  # of alike sizes: what is left over would be few
    with torch.enable_grad():
        calls.clear()
        layer(x)
    assert calls == [2]


@torch.no_grad()
def test_int8_sees_to_all_tokens_of_a_feed_forward_network():
    """At 512x512 Stable Diffusion 1 has 2 x 4096 of them, which goes into pieces of 16 MB with a rest."""
    int8 = pytest.importorskip("ldm.modules.int8")
    if not int8.has_int8():
        pytest.skip("this CPU has no int8 to speak of")
    torch.manual_seed(0)
    layer, x = FeedForward(320, glu=True), torch.randn(2, 4096, 320)
    wanted = layer(x)
    int8.quantize(layer)
    difference = (layer(x) - wanted).abs().mean(-1)  # of each token
    assert difference.min() > 0.2 * difference.mean()
    assert layer.net[-1]._kept is None and layer.net[0].proj._halves is None  # no layer has laid out float32, too
