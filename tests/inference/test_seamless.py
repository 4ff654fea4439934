"""Seamless pictures: rolling what they are drawn from rolls them, so no place is an edge."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm import inference
from ldm.inference import Pipeline, seamless
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return inference.load_model(ckpt=write_tiny(tmp_path_factory.mktemp("tiny")), device="cpu")


@pytest.fixture
def pixels(model, monkeypatch):
    """Sample from a start: float pixels instead of images."""
    monkeypatch.setattr(Pipeline, "decode", lambda self, latents: [self.model.decode_first_stage(latents)])

    def sample(start: torch.Tensor, tiling: str | None) -> torch.Tensor:
        options = {"steps": 3, "scale": 2.0, "progress": False, "tiling": tiling}
        return inference.txt2img(model, ["a red circle"], start_code=start, **options)[0]

    return sample


@pytest.mark.parametrize(
    "tiling, along, holds", [("both", (2, 3), True), ("x", 3, True), ("x", 2, False), ("y", 2, True), (None, 3, False)]
)
def test_rolling_the_start_rolls_the_picture(pixels, tiling, along, holds):
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    shift, factor = 8, 2  # half the latent
    by = (shift, shift) if isinstance(along, tuple) else shift
    further = tuple(factor * s for s in by) if isinstance(by, tuple) else factor * by
    rolled = pixels(start.roll(by, along), tiling)
    expected = pixels(start, tiling).roll(further, along)
    difference = (rolled - expected).abs().max()
    assert difference < 1e-4 if holds else difference > 1e-2


def test_encoding_goes_round_too(model):
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), seamless(model, "both"):
        mode, rolled = (model.encode_first_stage(x.roll(by, (2, 3))).mode() for by in ((0, 0), (8, 16)))
    torch.testing.assert_close(rolled, mode.roll((4, 8), (2, 3)), rtol=0, atol=1e-5)


def test_everything_is_as_before_afterwards(model):
    parts = [m for part in (model.model, model.first_stage_model) for m in part.modules()]
    padded = [m for m in parts if isinstance(m, (nn.Conv2d, nn.ZeroPad2d))]
    before = [(m.padding, len(m._forward_pre_hooks)) for m in padded]
    with pytest.raises(KeyError), seamless(model, "y"):
        assert any(m.padding != padding for m, (padding, _) in zip(padded, before))
        raise KeyError
    assert [(m.padding, len(m._forward_pre_hooks)) for m in padded] == before
    with pytest.raises(ValueError, match="tiling 'z' is not one of x, y, both"), seamless(model, "z"):
        pass
