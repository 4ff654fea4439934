"""Pictures through every kind of first stage, whole and in tiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.inference import load_first_stage, reconstruct
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface
from tests.golden import filled, golden_configs
from tests.tiny import write_tiny

CONFIG = golden_configs("diffusion")
NO_LOSS = {"target": "torch.nn.Identity"}


def first_stage(kind: type) -> torch.nn.Module:
    if kind is AutoencoderKL:
        return filled(kind(ddconfig=CONFIG["kl"], lossconfig=NO_LOSS, embed_dim=4))
    return filled(kind(ddconfig=CONFIG["vq"], lossconfig=NO_LOSS, n_embed=64, embed_dim=3))


def picture(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 3, y * 2, x + y], axis=-1).astype(np.uint8))


class Dimmed(IdentityFirstStage):
    """Takes `by` of 255 levels from every pixel."""

    by, downsampling_factor = 5, 8

    def forward(self, x):
        return x - 2 * self.by / 255


@pytest.mark.parametrize("tile", [0, 32])
def test_psnr_of_a_known_error(tile):
    """PSNR = 20 log10(255 / error in levels), whatever the size."""
    image = picture(83, 41).point(lambda level: max(level, 50))
    reconstruction, psnr = reconstruct(Dimmed(), image, tile=tile, progress=False)
    assert psnr == pytest.approx(20 * math.log10(255 / 5), abs=1e-3)
    levels = np.asarray(image).astype(int) - np.asarray(reconstruction)
    assert levels.shape == (41, 83, 3) and abs(levels - 5).max() <= 1  # pictures truncate levels


def test_identity_gives_the_picture_back():
    assert reconstruct(IdentityFirstStage(), picture(31, 18))[1] == math.inf


@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel, VQModelInterface])
@pytest.mark.parametrize("size", [(61, 45), (64, 48), (3, 1)])
def test_every_first_stage_gives_pictures_of_their_size(kind, size):
    stage, image = first_stage(kind), picture(*size)
    reconstruction, psnr = reconstruct(stage, image)
    again, _ = reconstruct(stage, image)
    assert reconstruction.size == size and 0 < psnr < 60
    assert reconstruction.tobytes() == again.tobytes()  # the posterior's mean: nothing is drawn


def test_vq_models_agree_with_their_interface():
    image = picture(64, 48)
    assert reconstruct(first_stage(VQModel), image)[1] == reconstruct(first_stage(VQModelInterface), image)[1]


def test_kl_decodes_the_mean():
    stage, x = first_stage(AutoencoderKL), torch.rand(1, 3, 32, 32)
    image = Image.fromarray((x[0].movedim(0, -1) * 255).byte().numpy())
    levels = torch.from_numpy(np.array(image)).movedim(-1, 0)[None] / 127.5 - 1
    with torch.no_grad():
        back = stage.decode(stage.encode(levels).mode()).clamp(-1, 1)
    mse = (back - levels).square().mean()
    assert reconstruct(stage, image)[1] == pytest.approx((10 * torch.log10(4 / mse)).item(), abs=1e-3)


def test_first_stage_of_a_whole_model(tmp_path):
    stage = load_first_stage(ckpt=write_tiny(tmp_path), device="cpu")
    assert isinstance(stage, AutoencoderKL)
    assert reconstruct(stage, picture(61, 45), tile=32, progress=False)[0].size == (61, 45)


def test_tiles_too_small(tmp_path):
    with pytest.raises(ValueError, match="tiles of 7 are too small: they need at least 8"):
        reconstruct(first_stage(VQModel), picture(64, 48), tile=7)


def test_a_picture_that_is_not_finite():
    with pytest.raises(ArithmeticError, match="the image came out as NaN"):
        stage = Dimmed()
        stage.by = math.nan
        reconstruct(stage, picture(16, 16))
