"""Inpainting data: random masks for training, and pairs of image and mask files."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ldm.data.folder import SUFFIXES
from ldm.data.loading import has_generator_access, seeded_globals
from ldm.images import check_mask, load_gray, load_image
from ldm.util import instantiate_from_config

FULL = 0.25  # fraction of masks that cover everything, as in the training of the public inpainting model

logger = logging.getLogger(__name__)


class MaskedImages:
    """Add a random `mask` (H, W, 1), 1 to fill, and `masked_image` (H, W, 3), 0 (grey) there, to a dataset's items.

    Args:
        dataset: The dataset, or its config.
        image_key: Its images, float32 (H, W, 3) in [-1, 1].
        seed: Seed of the masks.
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
        """Return item `i`; the mask takes random numbers from `rng` after the dataset."""
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


def random_mask(height: int, width: int, rng: np.random.Generator, full: float = FULL) -> np.ndarray:
    """Random float32 mask (height, width, 1) of 0 and 1: all ones (probability `full`), or boxes or strokes."""
    if rng.random() < full:
        return np.ones((height, width, 1), np.float32)
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    shape = _rectangle if rng.random() < 0.5 else _stroke
    for _ in range(rng.integers(1, 5)):
        shape(draw, width, height, rng)
    return np.asarray(canvas, np.float32)[:, :, None]


def _rectangle(draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> None:
    """Fill a rectangle with sides of 0.1 to 0.6 of the image's; it may reach over the edge."""
    across, down = rng.uniform(0.1, 0.6, 2) * (width, height)
    left, top = rng.uniform(-0.1, 0.9, 2) * (width, height)
    draw.rectangle((left, top, left + across, top + down), fill=1)


def _stroke(draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> None:
    """Fill a line through 3 to 8 points, 0.05 to 0.2 of the shorter side thick, with round ends."""
    radius = rng.uniform(0.025, 0.1) * min(width, height)
    points = [tuple(rng.uniform(0.0, 1.0, 2) * (width, height)) for _ in range(rng.integers(3, 9))]
    draw.line(points, fill=1, width=max(round(2 * radius), 1))
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)


# ---- files ----


def find_pairs(folder: str | Path) -> list[tuple[Path, Path]]:
    """Pair each image X.png of a folder with its mask X_mask.png; images without a mask are skipped with a warning.

    The two files may be of different types.

    Raises:
        FileNotFoundError: If there is no folder, or a mask has no image.
        ValueError: If there is no mask.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    masks = {path.stem.removesuffix("_mask"): path for path in files if path.stem.endswith("_mask")}
    images = [path for path in files if not path.stem.endswith("_mask")]
    unmatched = sorted(masks.keys() - {path.stem for path in images})
    if unmatched:
        names = ", ".join(masks[stem].name for stem in unmatched)
        raise FileNotFoundError(f"{folder} has no image for {names}: X_mask.png is the mask of X.png")
    unmasked = ", ".join(path.name for path in images if path.stem not in masks)
    if not masks:
        raise ValueError(f"{folder} has no masks: the mask of X.png is X_mask.png beside it, white where to fill")
    if unmasked:
        logger.warning("%s has no mask for %s: skipped (X_mask.png is the mask of X.png)", folder, unmasked)
    return [(path, masks[path.stem]) for path in images if path.stem in masks]


def load_pair(picture: str | Path, mask: str | Path) -> tuple[Image.Image, Tensor]:
    """Load an image and its mask (1, 1, H, W) in [0, 1]; warns if the mask covers everything or nothing.

    Raises:
        ValueError: If their aspect ratios differ. Other errors are those of `load_image`.
    """
    image, levels = load_image(picture), load_gray(mask)
    check_mask(levels, image, f"the mask {mask}", str(picture))
    if (covered := float((levels >= 0.5).float().mean())) in (0.0, 1.0):
        logger.warning("the mask %s covers %s of the image", mask, "all" if covered else "nothing")
    return image, levels
