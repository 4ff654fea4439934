"""Layers in int8: as near to the exact ones as their steps allow, and only where that was asked for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ldm.modules import int8
from ldm.modules.attention import GEGLU, CrossAttention
from ldm.modules.int8 import Int8Conv2d, Int8Linear, quantize, rounded, rounded_input
from ldm.modules.layout import lay_out

needs_int8 = pytest.mark.skipif(not int8.has_int8(), reason="this CPU, or this build of torch, has no quick int8")


def by_hand(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What `layer` makes of x in float64, with its weight and x at their steps."""
    values, step, zero = rounded_input(x)
    weight, steps = rounded(layer.weight)
    exact = copy.deepcopy(layer).double()
    exact.weight.copy_(weight.double() * steps.double().view(-1, *(1,) * (weight.ndim - 1)))
    return exact((values.double() - zero) * step).float()


@torch.no_grad()
@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.0, 5.0), (2.0, 3.0), (-4.0, -0.1), (0.0, 0.0), (-1e-3, 1e4)])
def test_rounding_is_within_half_a_step(low, high):
    x = torch.linspace(low, high, 1001)
    values, step, zero = rounded_input(x)
    assert values.dtype == torch.uint8
    assert ((values.float() - zero) * step - x).abs().max() <= 0.501 * step
    assert 0 <= zero <= 255  # 0 itself is a step, which padding needs
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    assert rounded_input(x)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_has_no_steps(bad):
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        rounded_input(torch.tensor([0.0, bad]))


@torch.no_grad()
def test_weights_are_rounded_for_each_channel():
    weight = torch.randn(6, 4, 3, 3) * 10.0 ** torch.arange(-3, 3)[:, None, None, None]
    weight[5] = 0
    values, steps = rounded(weight)
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
        assert quantize(layer) == 1
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
        assert 1e-4 < (layer(x) - exact).norm() / exact.norm() < 0.03
        layer.weight.mul_(2)
        layer.bias.zero_()
        torch.testing.assert_close(layer(x), by_hand(layer, x), rtol=1e-4, atol=1e-4)  # the weight that is there now


@needs_int8
@torch.no_grad()
def test_gated_halves_share_their_rounded_input():
    torch.manual_seed(0)
    layer, x = GEGLU(64, 96), torch.randn(300, 64)
    exact, (value, gate) = layer(x), by_hand(layer.proj, x).chunk(2, dim=-1)
    quantize(layer)
    torch.testing.assert_close(layer(x), value * nn.functional.gelu(gate), rtol=1e-4, atol=1e-4)
    assert 1e-4 < (layer(x) - exact).norm() / exact.norm() < 0.03
    few = layer(x[:2])
    torch.testing.assert_close(few, exact[:2], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rounding_without_the_function_that_torch_means_to_drop(monkeypatch):
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    values, *steps = rounded_input(x)
    monkeypatch.setattr(int8, "_quantizes", lambda: False)
    others, *same = rounded_input(x)
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
    lay_out(network)
    assert quantize(network) == 5  # wide, and four in attention
    assert quantize(nn.Sequential(nn.Conv2d(32, 32, 1))) == 1
    assert list(network.state_dict()) == keys
    assert isinstance(network["wide"], Int8Linear)
    assert not any(isinstance(network[name], Int8Conv2d) for name in ("first", "last", "groups"))
    assert network["attention"].coarse
    few = torch.randn(2, 64)  # a timestep's embedding is not worth rounding
    torch.testing.assert_close(network["wide"](few), nn.functional.linear(few, *network["wide"].parameters()))
    with pytest.raises(ValueError, match="no layer of 32 channels"):
        quantize(nn.Conv2d(4, 4, 3))


@needs_int8
def test_training_and_other_kinds_of_numbers_go_on_as_before():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 64), torch.randn(300, 64)
    wanted = layer(x)
    quantize(layer)
    assert torch.equal(layer(x), wanted)
    layer(x).sum().backward()
    with torch.no_grad():
        assert layer.double()(x.double()).dtype == torch.float64


def test_a_cpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(ValueError, match="AVX512-VNNI"):
        quantize(nn.Linear(64, 64))


@torch.no_grad()
def test_coarse_attention_is_near(monkeypatch):
    """To many keys in bfloat16: eight bits of mantissa, so within a percent, and never where it is not asked for."""
    from ldm.modules import attending

    monkeypatch.setattr(attending, "LONG", 64)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 64, 8) for _ in range(3))
    exact = (q.double() @ k.double().transpose(-1, -2) / 8**0.5).softmax(-1) @ v.double()
    coarse = attending.attend(q, k, v, coarse=True)
    assert coarse.dtype == torch.float32
    assert 1e-4 < (coarse - exact).norm() / exact.norm() < 0.01
    assert (attending.attend(q, k, v) - exact).norm() / exact.norm() < 1e-6
