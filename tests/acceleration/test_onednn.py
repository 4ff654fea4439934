"""Packed weights give what torch's own layers give, and follow the weights."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ldm.acceleration import accelerate, onednn
from ldm.acceleration.onednn import PackedConv2d, PackedLinear, refresh
from ldm.modules.attention import GEGLU
from ldm.modules.diffusionmodules import model as first_stage
from ldm.modules.diffusionmodules import openaimodel

pytestmark = pytest.mark.skipif(not onednn.has_kernels(), reason="this build of torch has no oneDNN")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


LAYERS = [
    (lambda: nn.Linear(8, 8), (3, 8)),
    (lambda: GEGLU(8, 8), (3, 8)),
    (lambda: nn.Conv2d(8, 8, 3), (1, 8, 5, 5)),
    (lambda: openaimodel.Upsample(8, True), (1, 8, 5, 5)),
]


def used(module: nn.Module) -> bool:
    """Whether the last call used packed weights."""
    packed = module.forward.packed
    return packed is not None and packed.matches(module.weight, packed.options)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (2, 3, 5, 24)])
def test_linear(shape, bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    wanted = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()).float()
    accelerate(layer)
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
    accelerate(layer)
    torch.testing.assert_close(layer(x), wanted, **CLOSE)
    assert layer.forward.packed.matches(layer.proj.weight)
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
    accelerate(layer)
    for size in ((2, 16, 12, 12), (1, 16, 7, 9), (3, 16, 33, 6), (2, 16, 12, 12)):
        x = torch.randn(size)
        torch.testing.assert_close(layer(x), plain(x.double()).float(), **CLOSE)
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x), **CLOSE)
    assert used(layer)
    assert layer(x).is_contiguous()  # as the input is
    last = layer(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("upsample", [first_stage.Upsample(16), openaimodel.Upsample(16, True, out_channels=8)])
@pytest.mark.parametrize("size", [(1, 1), (5, 4), (16, 16)])
def test_doubling_and_its_convolution_as_one(monkeypatch, upsample, size):
    torch.manual_seed(0)
    layer, x = copy.deepcopy(upsample), torch.randn(2, 16, *size)
    plain = copy.deepcopy(layer.conv).double()
    wanted = plain(F.interpolate(x.double(), scale_factor=2.0)).float()
    accelerate(layer)
    other_size = layer(x.repeat(1, 1, 2, 3))
    assert other_size.shape[2:] == (4 * size[0], 6 * size[1])
    monkeypatch.setattr(layer.conv, "_conv_forward", None)
    torch.testing.assert_close(layer(x), wanted, **CLOSE)
    layer.conv.weight.mul_(2)
    layer.conv.bias.mul_(2)
    torch.testing.assert_close(layer(x), 2 * wanted, **CLOSE)


@torch.no_grad()
def test_doubling_for_another_convolution():
    torch.manual_seed(0)
    layer, x = openaimodel.Upsample(16, True), torch.randn(2, 16, 3, 3)
    accelerate(layer)
    layer.conv.padding = (0, 1)  # as seamless images have it
    assert layer(x).shape == (2, 16, 4, 6) and layer.forward.packed is None
    with torch.enable_grad():
        layer(x).sum().backward()
    assert layer.conv.weight.grad is not None


CHANGES = ["in place", "state dict", "assigned", "swapped", "back and forth", ".data", "a row of .data"]


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_follows_its_weight(change):
    torch.manual_seed(0)
    layer, other, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(3, 8)
    accelerate(layer)
    before = layer(x)
    if change == "in place":
        layer.weight.copy_(other.weight)
    elif change == "state dict":
        layer.load_state_dict({"weight": other.weight, "bias": layer.bias})
    elif change == "assigned":
        layer.weight = other.weight
    elif change == ".data":
        layer.weight.data += other.weight
    elif change == "a row of .data":
        layer.weight.data[3] *= 2
    else:  # as averages are swapped in
        layer.weight.data, other.weight.data = other.weight.data, layer.weight.data
        if change == "back and forth":
            layer(x)
            layer.weight.data, other.weight.data = other.weight.data, layer.weight.data
            assert torch.equal(layer(x), before)
            return
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), **CLOSE)
    assert not torch.allclose(layer(x), before)


def test_training_goes_on_as_before():
    torch.manual_seed(0)
    for layer, x in ((nn.Linear(8, 8), torch.randn(3, 8)), (nn.Conv2d(8, 8, 3), torch.randn(3, 8, 5, 5))):
        wanted = layer(x)
        accelerate(layer)
        assert torch.equal(layer(x), wanted)
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        assert layer.forward.packed is None


@torch.no_grad()
def test_what_oneDNN_is_not_for_goes_on_as_before():
    linear, conv = nn.Linear(8, 8), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
    same, x = nn.Conv2d(8, 8, 3, padding="same"), torch.randn(2, 8, 5, 5)
    pairs = [(linear, torch.randn(8)), (linear, torch.randn(0, 8)), (conv, x), (same, x)]
    wanted = [layer(x) for layer, x in pairs]
    for layer, _ in pairs:
        accelerate(layer)
    for (layer, x), y in zip(pairs, wanted):
        assert torch.equal(layer(x), y)
        assert layer.forward.packed is None
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(2, 8)).dtype == torch.bfloat16
    assert linear.double()(torch.randn(2, 8).double()).dtype == torch.float64
    assert linear.forward.packed is None


@torch.no_grad()
def test_state_dicts_copies_and_files():
    """They are those of plain layers; packed weights do not leave the process."""
    network = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.Conv1d(8, 8, 1), nn.LayerNorm(8))
    keys = list(network.state_dict())
    handle = accelerate(network)
    assert not accelerate(network).overrides  # a second time changes nothing
    assert [type(part) for part in network] == [nn.Linear, nn.Conv2d, nn.Conv1d, nn.LayerNorm]
    assert [type(override) for override in handle.overrides] == [PackedLinear, PackedConv2d]
    x = torch.randn(2, 8)
    wanted = network[0](x)
    assert list(network.state_dict()) == keys
    twin = copy.deepcopy(network)
    assert twin[0].forward.packed is None and twin[0].forward.module is twin[0]
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
        accelerate(layer)
        torch.testing.assert_close(layer(x), wanted, **CLOSE)
        assert used(layer)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(8, 8), (3, 50), (2000, 7), (1, 1), (1, 9), (9, 1), (5000, 3)])
def test_every_row_is_compared(shape):
    """A change of any one row through `.data` is noticed, at once or within a few calls of a layer with many rows."""
    layer, x = nn.Linear(shape[1], shape[0]), torch.randn(2, shape[1])
    accelerate(layer)
    for row in {0, shape[0] // 2, shape[0] - 1}:
        before = layer(x)
        layer.weight.data[row] += 1
        for _ in range(shape[0] // onednn.SAMPLE + 2):
            after = layer(x)
        torch.testing.assert_close(after, F.linear(x, layer.weight, layer.bias), **CLOSE)
        assert not torch.allclose(after, before)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(8, 8), (7, 9)])
def test_refresh_compares_every_number(shape):
    layer, x = nn.Linear(shape[1], shape[0]), torch.randn(2, shape[1])
    accelerate(layer)
    for row, column in ((0, 0), (6, 7), (1, 4)):
        layer(x)
        layer.weight.data[row, column] += 1
        refresh(layer)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), **CLOSE)


@torch.no_grad()
def test_refresh_sees_swapped_numbers():
    layer, x = nn.Linear(64, 64), torch.randn(2, 64)
    accelerate(layer)
    for one, other in (((5, 20), (6, 30)), ((1, 2), (1, 8)), ((0, 0), (63, 62))):
        before = layer(x)
        data = layer.weight.data
        data[one], data[other] = data[other].clone(), data[one].clone()
        refresh(layer)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), **CLOSE)
        assert not torch.equal(layer(x), before)


@torch.no_grad()
@pytest.mark.parametrize("build, shape", LAYERS)
def test_transforms_see_torchs_own_functions(build, shape):
    """Tracing, vmap, forward-mode derivatives and modes that watch functions get what they get without kernels."""
    torch.manual_seed(0)
    layer, x, tangent = build(), torch.randn(shape), torch.randn(shape)
    plain = copy.deepcopy(layer)
    accelerate(layer)
    layer(x)
    for found, wanted in zip(torch.func.jvp(layer, (x,), (tangent,)), torch.func.jvp(plain, (x,), (tangent,))):
        torch.testing.assert_close(found, wanted)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(layer(forward_ad.make_dual(x, tangent))).tangent is not None
    torch.testing.assert_close(torch.func.vmap(layer)(x[None]), plain(x)[None])
    traced = torch.jit.trace(layer, x, check_trace=False)
    for parameter in layer.parameters():
        parameter.mul_(2)
    torch.testing.assert_close(traced(x), layer(x))
    counts = []
    for network in (layer, plain):
        with FlopCounterMode(display=False) as counter:
            network(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        layer(x)
    assert {F.linear, F.conv2d} & set(seen)
    with torch.device("cpu"):  # a mode, too, but one that changes no layer
        assert onednn.usable(x, next(layer.parameters()))


@torch.no_grad()
@pytest.mark.parametrize("build, shape", LAYERS)
def test_wrong_shapes_are_told_as_by_torch(build, shape):
    layer, x = build(), torch.randn(shape[0], shape[1] + 1, *shape[2:])
    plain = copy.deepcopy(layer)
    accelerate(layer)
    with pytest.raises(RuntimeError) as wanted:
        plain(x)
    with pytest.raises(RuntimeError, match=re.escape(str(wanted.value))):
        layer(x)


@torch.no_grad()
def test_settings_that_torch_takes():
    """A number for a pair, a bias of one number, a size by keyword."""
    torch.manual_seed(0)
    linear, conv, upsample = nn.Linear(8, 8), nn.Conv2d(8, 8, 3), openaimodel.Upsample(8, True)
    linear.bias, conv.padding, conv.stride = nn.Parameter(torch.ones(1)), 1, 2
    for layer, x, options in (
        (linear, torch.randn(2, 8), {}),
        (conv, torch.randn(2, 8, 5, 5), {}),
        (upsample, torch.randn(2, 8, 3, 3), {"size": (5, 6)}),
    ):
        wanted = layer(x, **options)
        accelerate(layer)
        torch.testing.assert_close(layer(x, **options), wanted, **CLOSE)


@torch.no_grad()
def test_a_replaced_call_of_all_modules(monkeypatch):
    layer, x, called, call = GEGLU(8, 8), torch.randn(2, 8), [], nn.Module.__call__
    accelerate(layer)
    layer(x)
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args: called.append(self) or call(self, *args))
    layer(x)
    assert called == [layer, layer.proj]


@torch.no_grad()
def test_networks_keep_the_memory_format():
    """So that `randn_like` of a result draws what it draws without acceleration."""
    config = {"ch": 32, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "resolution": 16}
    network = first_stage.Encoder(**config, in_channels=3, z_channels=4).eval()
    quant = nn.Conv2d(8, 8, 1)
    x = torch.randn(2, 3, 16, 16)
    for image in (x, x.to(memory_format=torch.channels_last), torch.randn(2, 16, 16, 3).permute(0, 3, 1, 2)):
        plain = quant(network(image))
        with accelerate(network), accelerate(quant):
            fast = quant(network(image))
        torch.testing.assert_close(fast, plain, **CLOSE)
        assert fast.stride() == plain.stride()
