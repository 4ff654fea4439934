"""Weights that are laid out once give what torch's own layers give, and follow their weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules import attending, layout
from ldm.modules.attending import attend
from ldm.modules.attention import GEGLU
from ldm.modules.diffusionmodules import model as first_stage
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.layout import LaidOutConv2d, LaidOutLinear, lay_out

pytestmark = pytest.mark.skipif(not layout.has_kernels(), reason="this build of torch has no oneDNN")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def used(module: nn.Module) -> bool:
    """Whether the last call went by what a layer keeps."""
    return module._kept is not None and module._kept.is_of(module.weight)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (2, 3, 5, 24)])
def test_linear(shape, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    wanted = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()).float()
    lay_out(layer)
    torch.testing.assert_close(layer(x), wanted, **CLOSE)
    torch.testing.assert_close(layer(x.transpose(0, -2)), wanted.transpose(0, -2), **CLOSE)  # strided
    assert used(layer)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_gated_halves(bias):
    torch.manual_seed(0)
    layer, x = GEGLU(24, 40), 3 * torch.randn(2, 5, 24)
    layer.proj = nn.Linear(24, 80, bias=bias)
    value, gate = copy.deepcopy(layer.proj).double()(x.double()).chunk(2, dim=-1)
    wanted = (value * F.gelu(gate)).float()
    lay_out(layer)
    torch.testing.assert_close(layer(x), wanted, **CLOSE)
    assert layer.proj._halves.is_of(layer.proj.weight)
    layer.proj.weight.zero_()
    assert not torch.allclose(layer(x), wanted)
    with torch.enable_grad():
        layer(x).sum().backward()
    assert layer.proj.weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 4}])
def test_convolution_at_several_sizes(options):
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, 3, **options)
    plain = copy.deepcopy(layer).double()
    lay_out(layer)
    for size in ((2, 16, 12, 12), (1, 16, 7, 9), (3, 16, 33, 6), (2, 16, 12, 12)):
        x = torch.randn(size)
        torch.testing.assert_close(layer(x), plain(x.double()).float(), **CLOSE)
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x), **CLOSE)
    assert used(layer)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("upsample", [first_stage.Upsample(16), openaimodel.Upsample(16, True, out_channels=8)])
@pytest.mark.parametrize("size", [(1, 1), (5, 4), (16, 16)])
def test_doubling_and_its_convolution_as_one(monkeypatch, upsample, size):
    torch.manual_seed(0)
    layer, x = copy.deepcopy(upsample), torch.randn(2, 16, *size)
    plain = copy.deepcopy(layer.conv).double()
    wanted = plain(F.interpolate(x.double(), scale_factor=2.0)).float()
    lay_out(layer)
    other_size = layer(x.repeat(1, 1, 2, 3))
    assert other_size.shape[2:] == (4 * size[0], 6 * size[1])
    monkeypatch.setattr(F, "interpolate", None)
    torch.testing.assert_close(layer(x), wanted, **CLOSE)
    layer.conv.weight.mul_(2)
    layer.conv.bias.mul_(2)
    torch.testing.assert_close(layer(x), 2 * wanted, **CLOSE)


@torch.no_grad()
def test_doubling_to_another_size_or_for_another_convolution():
    torch.manual_seed(0)
    layer, x = openaimodel.Upsample(16, True), torch.randn(2, 16, 3, 3)
    wanted = layer(x), layer(x, (5, 6))
    lay_out(layer)
    torch.testing.assert_close(layer(x, (5, 6)), wanted[1], **CLOSE)
    torch.testing.assert_close(layer(x, (6, 6)), wanted[0], **CLOSE)
    layer.conv.padding = (0, 1)  # as seamless pictures have it
    assert layer.conv.after_doubling(x) is None
    with torch.enable_grad():
        layer(x).sum().backward()
    assert layer.conv.weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("change", ["in place", "state dict", "assigned", "swapped", "back and forth"])
def test_follows_its_weight(change):
    torch.manual_seed(0)
    layer, other, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(3, 8)
    lay_out(layer)
    before = layer(x)
    if change == "in place":
        layer.weight.copy_(other.weight)
    elif change == "state dict":
        layer.load_state_dict({"weight": other.weight, "bias": layer.bias})
    elif change == "assigned":
        layer.weight = other.weight
    else:  # as averages are swapped in
        layer.weight.data, other.weight.data = other.weight.data, layer.weight.data
        if change == "back and forth":
            layer(x)
            layer.weight.data, other.weight.data = other.weight.data, layer.weight.data
            assert torch.equal(layer(x), before)
            return
    assert not used(layer)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), **CLOSE)
    assert not torch.allclose(layer(x), before)


def test_training_goes_on_as_before():
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(8, 8), torch.randn(3, 8)), (nn.Conv2d(8, 8, 3), torch.randn(3, 8, 5, 5))):
        wanted = layer(x)
        lay_out(layer)
        assert torch.equal(layer(x), wanted)
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        assert layer._kept is None


@torch.no_grad()
def test_what_oneDNN_is_not_for_goes_on_as_before():
    linear, conv = nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
    same, x = nn.Conv2d(8, 8, 3, padding="same"), torch.randn(2, 8, 5, 5)
    pairs = [(linear, torch.randn(8)), (linear, torch.randn(0, 8)), (conv, x), (same, x)]
    wanted = [layer(x) for layer, x in pairs]
    for layer, _ in pairs:
        lay_out(layer)
    for (layer, x), y in zip(pairs, wanted):
        assert torch.equal(layer(x), y)
        assert layer._kept is None
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(2, 8)).dtype == torch.bfloat16
    assert linear.double()(torch.randn(2, 8).double()).dtype == torch.float64
    assert linear._kept is None


@torch.no_grad()
def test_nothing_of_it_leaves_the_process():
    """State dicts, copies and files are those of plain layers; only modules of exactly the plain kinds change."""
    network = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Conv1d(8, 8, 1), nn.LayerNorm(8))
    keys = list(network.state_dict())
    lay_out(network)
    lay_out(network)  # a second time changes nothing
    assert [type(part) for part in network] == [LaidOutLinear, LaidOutConv2d, nn.Conv1d, nn.LayerNorm]
    x = torch.randn(2, 8)
    wanted = network[0](x)
    assert list(network.state_dict()) == keys
    twin = copy.deepcopy(network)
    assert twin[0]._kept is None
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(twin[0](x), wanted)
    assert torch.equal(again[0](x), wanted)


def test_inference_mode():
    with torch.inference_mode():
        layer, x = nn.Linear(8, 8), torch.randn(2, 8)
        wanted = layer(x)
        lay_out(layer)
        torch.testing.assert_close(layer(x), wanted, **CLOSE)
        assert used(layer)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(64, 64, 64), (70, 2048, 70), (4096, 5000, 257)])
def test_attention_to_many(monkeypatch, sizes):
    """However many scores are made at a time, the formula in float64 is met; for many keys that way is taken."""
    queries, keys, cached = sizes
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 8).transpose(1, 2) for length in (queries, keys, keys))
    scores = q.double() @ k.double().transpose(-1, -2) / 8**0.5
    wanted = (scores.softmax(-1) @ v.double()).float()
    monkeypatch.setattr(attending, "CACHED", cached * keys)
    monkeypatch.setattr(attending, "LONG", min(keys, attending.LONG))
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    torch.testing.assert_close(attend(q, k, v), wanted, **CLOSE)
    v = torch.cat([v, v], dim=-1)  # values of another width than keys
    torch.testing.assert_close(attend(q, k, v), torch.cat([wanted, wanted], dim=-1), **CLOSE)


def test_attention_to_many_is_not_for_training():
    q, k, v = (torch.randn(1, 1, attending.LONG, 2, requires_grad=True) for _ in range(3))
    attend(q, k, v).sum().backward()
    assert q.grad is not None
