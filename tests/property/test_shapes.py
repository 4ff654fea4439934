"""Outputs have the expected sizes: random small networks, sizes and samplers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.models.diffusion.noise import PerImageNoise
from ldm.models.diffusion.samplers import SAMPLERS, make_sampler
from ldm.models.diffusion.schedules import SCHEDULES
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.models.test_convergence import V1, Gaussian

quick = settings(max_examples=20, derandomize=True, deadline=None, database=None)

WIDTH = 64  # 32 groups of one channel each could not be normalised over one pixel

sides = st.integers(1, 11)
mults = st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3)


@st.composite
def unets(draw: st.DrawFn) -> dict[str, Any]:
    mult = draw(mults)
    config = {
        "image_size": 8,
        "in_channels": draw(st.integers(1, 5)),
        "model_channels": WIDTH,
        "out_channels": draw(st.integers(1, 5)),
        "num_res_blocks": draw(st.integers(1, 2)),
        "attention_resolutions": draw(st.lists(st.sampled_from([1, 2, 4]), unique=True)),
        "channel_mult": mult,
        "num_heads": draw(st.sampled_from([1, 2])),
        "conv_resample": draw(st.booleans()),
        "resblock_updown": draw(st.booleans()),
        "use_scale_shift_norm": draw(st.booleans()),
    }
    if draw(st.booleans()):
        config |= {"use_spatial_transformer": True, "context_dim": 6, "use_linear_in_transformer": draw(st.booleans())}
    if draw(st.booleans()):
        config |= {"num_classes": 4}
    return config


@quick
@given(unets(), st.integers(1, 3), sides, sides)
def test_unet_output_has_the_input_size(config, batch, height, width):
    torch.manual_seed(0)
    unet = UNetModel(**config).eval()
    if not config["conv_resample"] or config["resblock_updown"]:  # averages of two by two, as published, need these
        smallest = 2 ** (len(config["channel_mult"]) - 1)
        height, width = max(height, smallest), max(width, smallest)
    inputs = {}
    if "context_dim" in config:
        inputs["context"] = torch.randn(batch, 3, 6)
    if "num_classes" in config:
        inputs["y"] = torch.arange(batch)
    with torch.no_grad():
        out = unet(torch.randn(batch, config["in_channels"], height, width), torch.arange(batch), **inputs)
    assert out.shape == (batch, config["out_channels"], height, width) and out.isfinite().all()


@st.composite
def first_stages(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "ch": WIDTH,
        "ch_mult": draw(mults),
        "num_res_blocks": draw(st.integers(1, 2)),
        "attn_resolutions": draw(st.lists(st.sampled_from([16, 8, 4]), unique=True)),
        "resolution": 16,
        "in_channels": draw(st.integers(1, 4)),
        "out_ch": draw(st.integers(1, 4)),
        "z_channels": draw(st.integers(1, 4)),
        "double_z": draw(st.booleans()),
        "resamp_with_conv": draw(st.booleans()),
        "attn_type": draw(st.sampled_from(["vanilla", "none"])),
    }


@quick
@given(first_stages(), st.integers(1, 2), st.integers(4, 19), st.integers(4, 19))
def test_encoder_halves_and_floors(config, batch, height, width):
    torch.manual_seed(0)
    f = 2 ** (len(config["ch_mult"]) - 1)
    with torch.no_grad():
        z = Encoder(**config)(torch.randn(batch, config["in_channels"], height, width))
    assert z.shape == (batch, config["z_channels"] * (1 + config["double_z"]), height // f, width // f)
    assert z.isfinite().all()


@quick
@given(first_stages(), st.integers(1, 2), st.integers(1, 5), st.integers(1, 5))
def test_decoder_doubles(config, batch, height, width):
    torch.manual_seed(0)
    f = 2 ** (len(config["ch_mult"]) - 1)
    with torch.no_grad():
        x = Decoder(**config)(torch.randn(batch, config["z_channels"], height, width))
    assert x.shape == (batch, config["out_ch"], f * height, f * width) and x.isfinite().all()


@pytest.mark.parametrize("name", SAMPLERS)
@settings(max_examples=12, derandomize=True, deadline=None, database=None)
@given(
    st.integers(1, 12),
    st.lists(st.integers(1, 6), min_size=3, max_size=3),
    st.integers(1, 3),
    st.sampled_from(sorted(SCHEDULES)),
    st.booleans(),
)
def test_samplers_keep_shapes_and_images_apart(name, steps, shape, batch, schedule, masked):
    """Of any shape; and image i of a batch, with a seed of its own, is what it is alone."""
    sampler = make_sampler(Gaussian(V1), name)

    def drawn(seeds: list[int]) -> Tensor:
        options: dict[str, Any] = {"schedule": schedule, "verbose": False, "noise": PerImageNoise(seeds)}
        if masked:
            options["mask"] = (torch.arange(shape[2]) % 2).float().expand(1, 1, *shape[1:])
            options["x0"] = torch.ones(len(seeds), *shape)
        return sampler.sample(steps, len(seeds), shape, **options)[0]

    together = drawn(list(range(batch)))
    assert together.shape == (batch, *shape) and together.dtype == torch.float32 and together.isfinite().all()
    torch.testing.assert_close(drawn([batch - 1])[0], together[-1], rtol=0, atol=1e-5)
