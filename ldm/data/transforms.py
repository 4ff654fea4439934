"""From a picture of any size to the square array that a model trains on."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

CROPS = ("random", "center", "none")
INTERPOLATIONS = ("bicubic", "lanczos", "bilinear", "box", "nearest")


class SquareTransform:
    """A picture cut to a square, resized to `size` pixels a side and perhaps mirrored.

    crop: "random" or "center" cuts the largest square there is, "none" squeezes the whole picture into one.
    flip: probability of mirroring left and right. interpolation: one of `INTERPOLATIONS`, averaging when it shrinks.

    Raises ValueError for options outside these.
    """

    def __init__(self, size: int, crop: str = "center", flip: float = 0.0, interpolation: str = "bicubic") -> None:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size is the side of the pictures in pixels, a whole number from 1, not {size!r}")
        if crop not in CROPS:
            raise ValueError(f"crop {crop!r} is not one of {', '.join(CROPS)}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is a probability from 0 to 1, not {flip!r}")
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {interpolation!r} is not one of {', '.join(INTERPOLATIONS)}")
        self.size = size
        self.crop = crop
        self.flip = flip
        self.interpolation = interpolation

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """An RGB picture as float32 (size, size, 3) from -1 to 1. Takes three numbers from `rng`, whatever happens."""
        across, down, mirror = rng.random(3)
        left, top, width, height = 0, 0, image.width, image.height
        if self.crop != "none":
            side = width = height = min(image.size)
            left, top = image.width - side, image.height - side  # whole pixels: a fitting picture is not resampled
            if self.crop == "center":
                left, top = left // 2, top // 2
            else:
                left, top = int(across * (left + 1)), int(down * (top + 1))
        image = image.resize(
            (self.size, self.size),
            Image.Resampling[self.interpolation.upper()],
            box=(left, top, left + width, top + height),
            reducing_gap=3.0 if self.interpolation != "nearest" else None,
        )
        pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1.0  # (H, W, 3)
        return pixels[:, ::-1].copy() if mirror < self.flip else pixels

    def describe(self) -> dict[str, Any]:
        """The settings, as plain values."""
        return dict(vars(self))
