"""Tiles: where they lie, and that what comes of them is what comes of the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.inference.tiling import padded, tile_first_stage, tile_spans, tiled
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModelInterface
from tests.golden import filled, golden_configs


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("length, tile", [(64, 64), (72, 64), (128, 64), (1000, 64), (120, 40), (120, 47), (400, 16)])
def test_tiles_cover_everything_with_enough_in_common(length, tile, multiple):
    found = tile_spans(length, tile, multiple)
    assert found[0].start == 0 and found[-1].stop == length
    (size,) = {span.stop - span.start for span in found}
    assert size == min(length, tile - tile % multiple)  # none is smaller than it must be
    assert all(span.start % multiple == 0 for span in found)
    assert all(a.stop - b.start >= tile / 4 for a, b in zip(found, found[1:]))


def test_no_more_tiles_than_needed():
    assert len(tile_spans(64, 64)) == 1 and len(tile_spans(65, 64)) == 2
    assert len(tile_spans(64 + 48, 64)) == 2 and len(tile_spans(64 + 49, 64)) == 3  # each adds three quarters of a tile


@pytest.mark.parametrize("length, tile, multiple", [(64, 15, 8), (64, 3, 1), (65, 32, 8)])
def test_impossible_tiles(length, tile, multiple):
    with pytest.raises(ValueError, match=r"too small: they need at least (16|4)|65 cannot be cut at multiples of 8"):
        tile_spans(length, tile, multiple)


def blur(x):
    kernel = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return F.conv2d(x, kernel, padding=2)


LOCAL = {
    "of one pixel": torch.sin,
    "of 5x5 pixels": blur,
    "twice the size": lambda x: F.interpolate(blur(x), scale_factor=2.0),
    "half the size": lambda x: F.avg_pool2d(blur(x), 2),
    "fewer channels": lambda x: blur(x)[:, :1],
}


@pytest.mark.parametrize("size", [(80, 128), (32, 180), (204, 28), (100, 34)])
@pytest.mark.parametrize("name", LOCAL)
def test_local_functions_are_exact(name, size):
    x = torch.randn(2, 3, *size)
    whole, parts = LOCAL[name](x), tiled(LOCAL[name], x, 32, multiple=2)
    assert whole.shape == parts.shape
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


def test_other_functions_fade_from_tile_to_tile():
    """Neighbors that differ by 1 meet in a ramp, whose steps are even."""
    calls = iter(range(2))
    line = tiled(lambda x: torch.full_like(x, next(calls)), torch.zeros(1, 1, 64, 64 + 48), 64)[0, 0, 0]
    steps = line.diff()
    assert line[0] == 0 and line[-1] == 1 and (steps >= 0).all() and steps.max() == pytest.approx(1 / 8)  # 16 in common
    assert (line[:52] == 0).all() and (line[60:] == 1).all()  # their middle half fades


def test_memory_is_that_of_a_tile_and_a_whole_picture_is_looked_at_once():
    seen = []
    tiled(lambda x: seen.append(x.shape) or x, torch.zeros(2, 3, 100, 20), 32)
    assert len(seen) == 4 and set(seen) == {(2, 3, 32, 20)}
    seen.clear()
    tiled(lambda x: seen.append(x.shape) or x, torch.zeros(2, 3, 100, 20), 0)
    assert seen == [(2, 3, 100, 20)]


def test_progress_bar_counts_tiles(capsys):
    tiled(torch.sin, torch.zeros(1, 1, 64, 64), 16, progress="Decoding")
    tiled(torch.sin, torch.zeros(1, 1, 16, 16), 16, progress="Whole")
    error = capsys.readouterr().err
    assert "Decoding" in error and "25/25" in error and "Whole" not in error


@pytest.mark.parametrize("size", [(13, 21), (16, 8), (1, 3)])
def test_padding_mirrors(size):
    x = torch.randn(2, 3, *size)
    larger = padded(x, 8)
    height, width = size
    assert larger.shape == (2, 3, -(-height // 8) * 8, -(-width // 8) * 8)
    assert torch.equal(larger[:, :, :height, :width], x)
    if size == (13, 21):
        assert torch.equal(larger[:, :, 13:, :21], x[:, :, 9:12].flip(2))
        assert torch.equal(larger[:, :, :13, 21:], x[:, :, :, 17:20].flip(3))


# ---- first stages ----

CONFIG = golden_configs("diffusion")
KINDS = {
    "kl": lambda: AutoencoderKL(CONFIG["kl"], {"target": "torch.nn.Identity"}, embed_dim=4),
    "vq": lambda: VQModelInterface(3, CONFIG["vq"], {"target": "torch.nn.Identity"}, n_embed=64),
}


def latents(encoded):
    return encoded if isinstance(encoded, torch.Tensor) else encoded.parameters


@pytest.mark.parametrize("kind", KINDS)
def test_first_stage_in_tiles(kind):
    torch.manual_seed(0)
    stage = filled(KINDS[kind]())
    factor, x = stage.downsampling_factor, torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        z = latents(stage.encode(x))
        z = z[:, : stage.embed_dim]
        whole = stage.decode(z)
        sizes = []
        for network in (stage.encoder, stage.decoder):
            network.conv_in.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
        tile_first_stage(stage, 32)
        encoded = latents(stage.encode(x))
        assert set(sizes) == {(32, 32)} and len(sizes) == 3 * 4
        sizes.clear()
        decoded = stage.decode(z)
        assert set(sizes) == {(32 // factor, 32 // factor)} and len(sizes) == 3 * 4
        assert decoded.shape == whole.shape and not torch.equal(decoded, whole)

        alone = stage.decode(z[..., : 32 // factor, : 32 // factor])
        corner = (..., slice(0, 20), slice(0, 20))  # before the first neighbour begins to fade in
        torch.testing.assert_close(decoded[corner], alone[corner])
        assert encoded.shape[2:] == z.shape[2:]

        tile_first_stage(stage, 0)
        assert torch.equal(stage.decode(z), whole)


def test_pictures_of_one_tile_stay_the_same():
    stage, x = filled(KINDS["kl"]()), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        whole = stage(x, sample_posterior=False)[0]
        tile_first_stage(stage, 32)
        assert torch.equal(stage(x, sample_posterior=False)[0], whole)


def test_what_a_first_stage_cannot_be_cut_into():
    stage = KINDS["kl"]()
    with pytest.raises(ValueError, match="tiles of 7 pixels are too small: this first stage needs at least 8"):
        tile_first_stage(stage, 7)
    tile_first_stage(IdentityFirstStage(), 1)  # has nothing to cut
