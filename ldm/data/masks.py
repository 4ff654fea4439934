"""Masks for training to fill in: rectangles, strokes of a brush, whole pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm.data.loading import has_generator_access, seeded_globals
from ldm.util import instantiate_from_config

WHOLE = 0.25  # the share of masks that cover everything, as the public inpainting model was trained with


class MaskedImages:
    """A data set's items with a random `mask` (H, W, 1), 1 to fill, and `masked_image` (H, W, 3), 0 (grey) there.

    dataset: the data set, or its config; `image_key`: its pictures, float32 (H, W, 3) in -1..1.
    """

    def __init__(self, dataset: Any, image_key: str = "image", seed: int = 0) -> None:
        self.dataset = instantiate_from_config(dataset) if isinstance(dataset, Mapping) else dataset
        self.image_key = image_key
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.get(i, np.random.default_rng((self.seed, i)))

    def get(self, i: int, rng: np.random.Generator) -> dict[str, Any]:
        """Item `i`, its mask drawn by `rng` after what the data set itself draws."""
        if has_generator_access(self.dataset):
            item = self.dataset.get(i, rng)
        else:
            with seeded_globals(rng.integers(2**32, size=4).tolist()):
                item = self.dataset[i]
        if self.image_key not in item:
            raise ValueError(f"items have no {self.image_key!r} to mask, only {', '.join(sorted(item))}: set image_key")
        image = np.asarray(item[self.image_key])
        height, width = image.shape[:2]
        mask = random_mask(height, width, rng)
        return {**item, "mask": mask, "masked_image": image * (1.0 - mask)}


def random_mask(height: int, width: int, rng: np.random.Generator, full: float = WHOLE) -> np.ndarray:
    """Random float32 mask (height, width, 1) of 0 and 1: all ones (probability `full`), or boxes or strokes."""
    if rng.random() < full:
        return np.ones((height, width, 1), np.float32)
    picture = Image.new("L", (width, height))
    draw = ImageDraw.Draw(picture)
    shape = _rectangle if rng.random() < 0.5 else _stroke
    for _ in range(rng.integers(1, 5)):
        shape(draw, width, height, rng)
    return np.asarray(picture, np.float32)[:, :, None]


def _rectangle(draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> None:
    """Sides from a tenth to six tenths of the picture's; it may reach over the edge."""
    across, down = rng.uniform(0.1, 0.6, 2) * (width, height)
    left, top = rng.uniform(-0.1, 0.9, 2) * (width, height)
    draw.rectangle((left, top, left + across, top + down), fill=1)


def _stroke(draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> None:
    """A line through 3 to 8 points, as thick as a twentieth to a fifth of the shorter side, with round ends."""
    radius = rng.uniform(0.025, 0.1) * min(width, height)
    points = [tuple(rng.uniform(0.0, 1.0, 2) * (width, height)) for _ in range(rng.integers(3, 9))]
    draw.line(points, fill=1, width=max(round(2 * radius), 1))
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
