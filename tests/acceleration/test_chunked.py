"""Large maps some rows at a time: what complete maps give, in less memory, and only where that is for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ldm.acceleration import accelerate, chunked, int8, onednn
from ldm.modules.diffusionmodules import openaimodel
from ldm.modules.diffusionmodules.model import Decoder, Encoder, Normalize, ResnetBlock

pytestmark = pytest.mark.skipif(not onednn.has_kernels(), reason="this build of torch has no oneDNN")
CONFIG = {"ch": 32, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "in_channels": 3}
CONFIG |= {"resolution": 16, "z_channels": 4}


@pytest.fixture
def many(monkeypatch) -> list[torch.Size]:
    """Chunks for all maps, of a few rows each; the list is of the maps that went by them."""
    seen: list[torch.Size] = []
    convolve = chunked._convolve_chunks

    def watched(x: torch.Tensor, *args: object) -> torch.Tensor:
        seen.append(x.shape)
        return convolve(x, *args)

    monkeypatch.setattr(chunked, "LARGE", 1)
    monkeypatch.setattr(chunked, "CHUNK", 32 * 20 * 3)
    monkeypatch.setattr(chunked, "_convolve_chunks", watched)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("out_channels", [32, 64])  # without and with a shortcut
@pytest.mark.parametrize("size", [(1, 20), (2, 20), (3, 20), (10, 20), (7, 90)])  # one strip, several, of one row
def test_block(many, size, out_channels):
    torch.manual_seed(0)
    block = ResnetBlock(in_channels=32, out_channels=out_channels).eval()
    for norm in (block.norm1, block.norm2):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = 3 * torch.randn(2, 32, *size) + torch.randn(32, 1, 1) + torch.arange(size[0])[:, None]  # strips differ
    before, exact = x.clone(), copy.deepcopy(block).double()(x.double()).float()
    accelerate(block)
    found = block(x)
    assert len(many) == 2 and torch.equal(x, before)

    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind, shape", [(Encoder, (2, 3, 16, 16)), (Decoder, (2, 4, 8, 8))])
def test_networks(many, kind, shape):
    torch.manual_seed(0)
    network, x = kind(**CONFIG).eval(), torch.randn(shape)
    exact = copy.deepcopy(network).double()(x.double()).float()
    accelerate(network)
    torch.testing.assert_close(network(x), exact, rtol=1e-5, atol=1e-5)
    assert many


def test_only_while_drawing(many):
    block, x = ResnetBlock(in_channels=32), torch.randn(1, 32, 8, 8)
    accelerate(block)
    block(x).sum().backward()
    assert block.conv1.weight.grad is not None
    with torch.no_grad():
        block.double()(x.double())
        ResnetBlock(in_channels=32)(x)  # not accelerated
        empty = ResnetBlock(in_channels=32)
        accelerate(empty)
        assert empty(x[:0]).shape == (0, 32, 8, 8)
    assert not many


@torch.no_grad()
def test_int8_has_a_way_of_its_own(many):
    if not int8.has_int8():
        pytest.skip("this CPU has no int8 to speak of")
    torch.manual_seed(0)
    block, upsample, x = ResnetBlock(in_channels=32), openaimodel.Upsample(32, True), torch.randn(1, 32, 8, 8)
    wanted, larger = block(x), upsample(x)
    for part in (block, upsample):
        accelerate(part)
        int8.quantize_int8(part)
    assert not torch.allclose(block(x), wanted, atol=1e-5) and not many
    assert not torch.allclose(upsample(x), larger, atol=1e-5) and upsample.forward.packed is None


@torch.no_grad()
def test_dropout_is_not_forgotten(many):
    """A module in training mode drops, gradients or not."""
    block, x = ResnetBlock(in_channels=32, dropout=0.5).train(), torch.randn(1, 32, 8, 8)
    accelerate(block)
    assert not torch.equal(block(x), block(x))


@torch.no_grad()
def test_variance_far_from_zero(many):
    """A mean much larger than the deviations does not swallow them."""
    torch.manual_seed(0)
    x = torch.randn(1, 32, 40, 20) + 30 * torch.rand(32, 1, 1)
    norm = Normalize(32)
    mean, variance = chunked._moments(x.contiguous(memory_format=torch.channels_last), norm)
    exact = torch.var_mean(x[0].double().flatten(1), dim=1, correction=0)
    torch.testing.assert_close(variance.double(), exact[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(mean.double(), exact[1], rtol=1e-6, atol=0)
