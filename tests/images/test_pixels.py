"""ldm/images/pixels.py against hand-made pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import images
from tests.images import COLOURS, pixels

# ---- sizes ----


@pytest.mark.parametrize(
    ("given", "height", "width", "expected"),
    [
        ((100, 70), None, None, (96, 64)),
        ((64, 32), None, None, (64, 32)),
        ((100, 70), 130, 33, (32, 128)),
        ((400, 300), None, 128, (128, 96)),
        ((400, 300), 96, None, (128, 96)),
    ],
)
def test_fit_to_multiple(given, height, width, expected):
    assert images.fit_to_multiple(Image.new("RGB", given), 32, height, width).size == expected


def test_fit_to_multiple_resizes_with_lanczos():
    image = Image.effect_noise((70, 70), 80).convert("RGB")
    expected = image.resize((64, 64), resample=Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(images.fit_to_multiple(image, 64)), pixels(expected))
    assert np.array_equal(pixels(images.fit_to_multiple(expected, 64)), pixels(expected))


@pytest.mark.parametrize(
    ("size", "height", "width"), [((31, 64), None, None), ((64, 64), 8, 64), ((999, 33), None, 64)]
)
def test_fit_to_multiple_refuses_tiny_sizes(size, height, width):
    with pytest.raises(ValueError, match="too small: each side needs at least 32"):
        images.fit_to_multiple(Image.new("RGB", size), 32, height, width)


# ---- tensors ----


def test_image_to_tensor():
    image = Image.new("RGB", (3, 2), (0, 51, 255))
    x = images.image_to_tensor(image)
    assert x.shape == (1, 3, 2, 3) and x.dtype == torch.float32
    assert torch.allclose(x[0, :, 1, 2], torch.tensor([-1.0, -0.6, 1.0]), atol=1e-6)


def test_tensor_to_images_truncates_and_clamps():
    levels = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 7.0])  # 0, 0, 127.5, 254.87, 255, 255
    x = levels.view(1, 1, 1, 6).expand(2, 3, 1, 6)
    first, second = images.tensor_to_images(x)
    assert pixels(first)[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert np.array_equal(pixels(first), pixels(second))
    assert np.array_equal(pixels(images.tensor_to_images(x.to(torch.bfloat16))[0])[0, :3, 1], [0, 0, 127])


def test_tensor_to_images_keeps_channels_in_place():
    image = Image.effect_noise((5, 4), 50).convert("RGB")
    image.putpixel((4, 0), (10, 20, 30))
    back = images.tensor_to_images(images.image_to_tensor(image))[0]
    assert np.abs(pixels(back) - pixels(image)).max() <= 1  # truncation may lose one level
    assert back.size == (5, 4)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8)])
def test_tensor_to_images_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        images.tensor_to_images(torch.zeros(shape))


# ---- masks ----


def test_masks_are_binarised_at_half():
    mask = torch.tensor([[0.0, 127 / 255, 128 / 255, 1.0]]).expand(1, 1, 4, 4)
    assert images.fit_mask(mask, 4, 4)[0, 0, 0].tolist() == [0, 0, 1, 1]
    for side in (2, 8, 6):
        fitted = images.fit_mask(mask.round(), side, side)
        assert fitted.shape == (1, 1, side, side) and fitted[0, 0, 0].tolist() == [0] * (side // 2) + [1] * (side // 2)


@pytest.mark.parametrize("size", [(100, 50), (200, 100), (33, 17), (7, 3)])
def test_masks_may_be_scaled(size):
    images.check_mask(torch.zeros(1, 1, size[1], size[0]), Image.new("RGB", (100, 50)))


@pytest.mark.parametrize("size", [(50, 100), (96, 50), (100, 52)])
def test_masks_of_another_shape_are_refused(size):
    message = f"m.png is {size[0]}x{size[1]} pixels, but a.png is 100x50: make it as large as the image"
    with pytest.raises(ValueError, match=message):
        images.check_mask(torch.zeros(1, 1, size[1], size[0]), Image.new("RGB", (100, 50)), "m.png", "a.png")


@pytest.mark.parametrize("pixels", [0, 1, 3, 40])
def test_feather_falls_linearly_with_the_distance(pixels):
    mask = torch.zeros(1, 1, 19, 24)
    mask[..., 6:9, 4:7] = 1
    mask[..., 17, 20] = 1
    spots = mask[0, 0].nonzero()
    y, x = torch.meshgrid(torch.arange(19), torch.arange(24), indexing="ij")
    distance = ((y[..., None] - spots[:, 0]) ** 2 + (x[..., None] - spots[:, 1]) ** 2).amin(-1).sqrt()
    expected = (1 - distance / (pixels + 1)).clamp(min=0)
    assert torch.allclose(images.feathered(mask, pixels)[0, 0], expected, atol=1e-6)
    assert images.feathered(torch.zeros_like(mask), pixels).eq(0).all()


def test_blend_is_exact_where_the_weight_is_0_or_1():
    under, over = (Image.effect_noise((256, 3), 90).convert("RGB") for _ in range(2))
    weight = torch.tensor([0.0, 0.25, 1.0])[None, None, :, None].expand(1, 1, 3, 256)
    rows = pixels(images.blend(under, over, weight))
    assert np.array_equal(rows[0], pixels(under)[0]) and np.array_equal(rows[2], pixels(over)[2])
    assert np.abs(rows[1] - (0.75 * pixels(under)[1] + 0.25 * pixels(over)[1])).max() <= 0.5


# ---- grid ----


def test_grid_layout():
    tiles = [Image.new("RGB", (2, 1), colour) for colour in ("red", "lime", "blue")]
    grid = images.make_grid(tiles, nrow=2, padding=2)
    expected = np.zeros((8, 10, 3), dtype=int)  # rows 2 * (1 + 2) + 2, columns 2 * (2 + 2) + 2
    expected[2, 2:4] = COLOURS["red"]
    expected[2, 6:8] = COLOURS["lime"]
    expected[5, 2:4] = COLOURS["blue"]
    assert np.array_equal(pixels(grid), expected)


def test_grid_sizes_of_the_public_scripts():
    tiles = [Image.new("RGB", (512, 512))] * 3
    assert images.make_grid(tiles, nrow=3).size == (1544, 516)
    assert images.make_grid(tiles, nrow=8).size == (1544, 516)  # no longer than there are pictures
    assert images.make_grid(tiles, nrow=1).size == (516, 1544)
    assert images.make_grid(tiles[:1], nrow=3).size == (512, 512)  # one picture is left alone


def test_grid_errors():
    with pytest.raises(ValueError, match="needs images"):
        images.make_grid([])
    with pytest.raises(ValueError, match="nrow=0"):
        images.make_grid([Image.new("RGB", (2, 2))], nrow=0)
    with pytest.raises(ValueError, match="one size"):
        images.make_grid([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 2))])
