"""The first stage's networks while they draw: the same numbers as with gradients, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules.model import Decoder, Encoder, ResnetBlock

CONFIG = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [16],
    "in_channels": 3,
    "resolution": 16,
    "z_channels": 4,
}


@pytest.mark.parametrize("kind, shape", [(Encoder, (2, 3, 16, 16)), (Decoder, (2, 4, 8, 8))])
def test_inference_gives_what_training_gives(kind, shape):
    torch.manual_seed(0)
    network, x = kind(**CONFIG).eval(), torch.randn(shape)
    trained = network(x)
    with torch.no_grad():
        before = x.clone()
        drawn = network(x)
    assert drawn.is_contiguous() and torch.equal(x, before)  # nobody else's memory is written to
    torch.testing.assert_close(drawn, trained, rtol=1e-5, atol=1e-5)


def test_blocks_leave_their_input_alone():
    torch.manual_seed(0)
    x = torch.randn(1, 32, 4, 4)
    before = x.clone()
    with torch.no_grad():
        for block in (ResnetBlock(in_channels=32), ResnetBlock(in_channels=32, out_channels=64)):
            block(x)
    assert torch.equal(x, before)


def test_decoder_lets_go_of_each_result():
    """At the full resolution no map is alive but those of the block at work and the one it began with."""
    import weakref

    decoder, results = Decoder(**CONFIG).eval(), []
    stages = [part for level in decoder.up for part in (*level.block, *level.attn, *level.children())]
    stages = [part for part in stages if not isinstance(part, nn.ModuleList)]
    alive: list[int] = []

    def remember(module: nn.Module, inputs: tuple, result: torch.Tensor) -> None:
        alive.append(sum(kept() is not None for kept in results))
        results.append(weakref.ref(result))

    for stage in stages:
        stage.register_forward_hook(remember)
    with torch.no_grad():
        decoder(torch.randn(1, 4, 8, 8))
    assert len(alive) == len(stages) and max(alive) == 1
