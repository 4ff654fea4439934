"""Pictures cut to squares: where the cut is, what mirrors, what stays exact."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.data.folder import SquareTransform


def columns(width: int = 12, height: int = 8) -> Image.Image:
    """A picture whose red is the column and whose green is the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def levels(array: np.ndarray) -> np.ndarray:
    """-1..1 back to 0..255."""
    return np.rint((array + 1) * 127.5).astype(int)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_values_and_layout() -> None:
    picture = Image.new("RGB", (4, 4), (0, 255, 51))
    array = SquareTransform(4)(picture, rng())
    assert (array.dtype, array.shape) == (np.float32, (4, 4, 3))
    np.testing.assert_allclose(array[0, 0], [-1, 1, 51 / 127.5 - 1], atol=1e-6)


def test_an_image_that_fits_is_cropped_and_not_resampled() -> None:
    assert (levels(SquareTransform(8)(columns(), rng()))[..., 0] == np.arange(2, 10)).all()
    starts = set()
    for seed in range(40):
        reds = levels(SquareTransform(8, crop="random")(columns(), rng(seed)))[0, :, 0]
        assert (np.diff(reds) == 1).all()
        starts.add(reds[0])
    assert starts == {0, 1, 2, 3, 4}  # every place there is, and no other


def test_tall_images_are_cropped_at_top_and_bottom() -> None:
    assert (levels(SquareTransform(4)(columns(4, 10), rng()))[:, 0, 1] == np.arange(3, 7)).all()


def test_crop_none_changes_the_aspect_ratio() -> None:
    whole = levels(SquareTransform(4, crop="none", interpolation="box")(columns(), rng()))
    assert (whole[0, :, 0] == [1, 4, 7, 10]).all()  # means of three columns each


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos", "bilinear", "box"])
def test_shrinking_averages(interpolation: str) -> None:
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32))).convert("RGB")
    assert np.abs(SquareTransform(8, interpolation=interpolation)(stripes, rng())).max() < 0.02  # grey, no moire


def test_flip_is_a_mirror_with_the_given_probability() -> None:
    plain = SquareTransform(8)(columns(), rng())
    assert (SquareTransform(8, flip=1.0)(columns(), rng()) == plain[:, ::-1]).all()
    half = SquareTransform(8, flip=0.5)
    mirrored = sum(not np.array_equal(half(columns(), rng(seed)), plain) for seed in range(400))
    assert 160 < mirrored < 240


def test_all_settings_use_the_same_random_numbers() -> None:
    after = set()
    for crop in ("random", "center", "none"):
        generator = rng()
        SquareTransform(4, crop, flip=0.5)(columns(), generator)
        after.add(generator.random())
    assert len(after) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is the side"),
        ({"size": "big"}, "'big'"),
        ({"size": 8, "crop": "middle"}, "crop 'middle' is not one of random, center, none"),
        ({"size": 8, "flip": 2}, "probability from 0 to 1, not 2"),
        ({"size": 8, "interpolation": "cubic"}, "interpolation 'cubic' is not one of bicubic"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SquareTransform(**options)
