"""Layers in int8: as near to the exact ones as their steps allow, and only where that was asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ldm.acceleration import accelerate, int8
from ldm.acceleration import attention as accelerated_attention
from ldm.acceleration.attention import LongAttentionBF16
from ldm.acceleration.int8 import Int8Conv2d, Int8Linear, quantize_input, quantize_int8, quantize_weight
from ldm.modules.attention import GEGLU, CrossAttention, FeedForward

needs_int8 = pytest.mark.skipif(not int8.has_int8(), reason="this CPU, or this build of torch, has no quick int8")


def count(handle) -> int:
    """How many layers are in int8."""
    return sum(isinstance(override, (Int8Linear, Int8Conv2d)) for override in handle.overrides)


def by_hand(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What `layer` makes of x in float64, with its weight and x at their steps."""
    values, step, zero = quantize_input(x)
    weight, steps = quantize_weight(layer.weight)
    exact = copy.deepcopy(layer).double()
    exact.weight.copy_(weight.double() * steps.double().view(-1, *(1,) * (weight.ndim - 1)))
    return exact((values.double() - zero) * step).float()


@torch.no_grad()
@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 5.0), (2.0, 3.0), (-4.0, -0.1), (0.0, 0.0), (-1e-3, 1e4)])
def test_rounding_is_within_half_a_step(low, high):
    x = torch.linspace(low, high, 1001)
    values, step, zero = quantize_input(x)
    assert values.dtype == torch.uint8
    assert ((values.float() - zero) * step - x).abs().max() <= 0.501 * step
    assert 0 <= zero <= 255  # 0 itself is a step, which padding needs
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    assert quantize_input(x)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_has_no_steps(bad):
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        quantize_input(torch.tensor([0.0, bad]))


@torch.no_grad()
def test_weights_are_rounded_for_each_channel():
    weight = torch.randn(6, 4, 3, 3) * 10.0 ** torch.arange(-3, 3)[:, None, None, None]
    weight[5] = 0
    values, steps = quantize_weight(weight)
    assert values.dtype == torch.int8
    assert values[:5].flatten(1).abs().amax(1).eq(127).all()
    error = (values * steps[:, None, None, None] - weight).abs().flatten(1).amax(1)
    assert (error <= 0.501 * steps).all()


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("offset", [0.0, 3.0])  # 3: a zero step far from the middle
def test_layers_do_their_rounded_sums_exactly(offset):
    torch.manual_seed(0)
    linear, conv = nn.Linear(64, 96), nn.Conv2d(64, 48, 3, stride=2, padding=1)
    for layer, x in ((linear, torch.randn(2, 150, 64)), (conv, torch.randn(2, 64, 9, 7))):
        x += offset
        wanted = by_hand(layer, x)
        exact = layer(x)
        quantize_int8(layer)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
        assert 1e-4 < (layer(x) - exact).norm() / exact.norm() < 0.03
        layer.weight.mul_(2)
        layer.bias.zero_()
        torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=1e-4, atol=1e-4)  # the weight that is there now


@needs_int8
@torch.no_grad()
def test_gated_halves_share_their_quantize_input():
    torch.manual_seed(0)
    layer, x = GEGLU(64, 96), torch.randn(300, 64)
    exact, (value, gate) = layer(x), by_hand(layer.proj, x).chunk(2, dim=-1)
    quantize_int8(layer)
    torch.testing.assert_close(layer(x), value * nn.functional.gelu(gate), rtol=1e-4, atol=1e-4)
    assert 1e-4 < (layer(x) - exact).norm() / exact.norm() < 0.03
    few = layer(x[:2])
    torch.testing.assert_close(few, exact[:2], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rounding_without_the_function_that_torch_means_to_drop(monkeypatch):
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    values, *steps = quantize_input(x)
    monkeypatch.setattr(int8, "_has_quantize_per_tensor", lambda: False)
    others, *same = quantize_input(x)
    assert same == steps
    assert (values.int() - others.int()).abs().max() <= 1
    assert others.is_contiguous(memory_format=torch.channels_last)


@needs_int8
@torch.no_grad()
def test_which_layers():
    torch.manual_seed(0)
    network = nn.ModuleDict(
        {
            "wide": nn.Linear(64, 64),
            "first": nn.Conv2d(4, 64, 3),
            "last": nn.Conv2d(64, 4, 3),
            "groups": nn.Conv2d(64, 64, 3, groups=2),
            "attention": CrossAttention(64, 64, heads=2, dim_head=32),
        }
    )
    keys = list(network.state_dict())
    accelerate(network)
    assert count(quantize_int8(network)) == 5  # wide, and four in attention
    assert count(quantize_int8(nn.Sequential(nn.Conv2d(32, 32, 1)))) == 1
    assert list(network.state_dict()) == keys
    assert isinstance(network["wide"].forward, Int8Linear)
    assert not any(isinstance(network[name].forward, Int8Conv2d) for name in ("first", "last", "groups"))
    assert isinstance(network["attention"].attend, LongAttentionBF16)
    with pytest.raises(ValueError, match="already"):
        quantize_int8(network)
    few = torch.randn(2, 64)  # a timestep's embedding is not worth rounding
    torch.testing.assert_close(network["wide"](few), nn.functional.linear(few, *network["wide"].parameters()))
    with pytest.raises(ValueError, match="no layer of at least 32 channels"):
        quantize_int8(nn.Conv2d(4, 4, 3))


@needs_int8
def test_training_and_other_kinds_of_numbers_go_on_as_before():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64), torch.randn(300, 64)
    wanted = layer(x)
    quantize_int8(layer)
    assert torch.equal(layer(x), wanted)
    layer(x).sum().backward()
    with torch.no_grad():
        assert layer.double()(x.double()).dtype == torch.float64


def test_a_cpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="AVX512-VNNI"):
        quantize_int8(nn.Linear(64, 64))


@torch.no_grad()
def test_attention_in_bfloat16_is_near(monkeypatch):
    """To many keys: eight bits of mantissa, so within a percent, and never where it is not asked for."""
    monkeypatch.setattr(accelerated_attention, "LONG", 64)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    torch.manual_seed(0)
    attention = CrossAttention(24, heads=3, dim_head=8)
    q, k, v = (torch.randn(2, 3, 64, 8) for _ in range(3))
    exact = (q.double() @ k.double().transpose(-1, -2) / 8**0.5).softmax(-1) @ v.double()
    accelerate(attention)
    assert (attention.attend(q, k, v) - exact).norm() / exact.norm() < 1e-6
    override = LongAttentionBF16(attention).attach()
    rough = attention.attend(q, k, v)
    assert rough.dtype == torch.float32
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 0.01
    override.remove()
    assert (attention.attend(q, k, v) - exact).norm() / exact.norm() < 1e-6


@needs_int8
@torch.no_grad()
def test_all_tokens_of_a_feed_forward_network():
    """At 512x512 Stable Diffusion 1 has 2 x 4096 of them, which goes into chunks of 16 MB with a rest."""
    torch.manual_seed(0)
    layer, x = FeedForward(320, glu=True), torch.randn(2, 4096, 320)
    wanted = layer(x)
    accelerate(layer)
    quantize_int8(layer)
    difference = (layer(x) - wanted).abs().mean(-1)  # of each token
    assert difference.min() > 0.2 * difference.mean()
    for part in (layer.net[0], layer.net[2]):  # no layer has packed float32, too
        assert part.forward.packed is not None and part.forward.previous.packed is None


@needs_int8
@torch.no_grad()
@pytest.mark.parametrize("first", [accelerate, quantize_int8])
def test_order_and_removal(first):
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64), torch.randn(300, 64)
    plain, other = layer(x), accelerate if first is quantize_int8 else quantize_int8
    handles = {function: function(layer) for function in (first, other)}
    assert (layer(x) - plain).abs().max() > 1e-4
    handles[quantize_int8].remove()
    torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
    handles[accelerate].remove()
    assert torch.equal(layer(x), plain) and "forward" not in vars(layer)
