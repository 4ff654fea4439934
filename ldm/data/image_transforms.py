"""Transforms of PIL images that configs list under `image_transforms`; they need no torchvision.

Random numbers come from numpy's global generator, which `DataModuleFromConfig` seeds for each item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.util import instantiate_from_config

Size = int | Sequence[int]


class Compose:
    """Apply transforms one after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """Resize an image to (height, width), or its shorter side to `size`.

    Args:
        size: the two sides, or the shorter one.
        interpolation: PIL's code, such as 2 for bilinear and 3 for bicubic, or its name.
        max_size: limit of the longer side, if `size` is one number.
        antialias: accepted for compatibility. PIL always averages where an image shrinks.
    """

    def __init__(
        self, size: Size, interpolation: int | str = 2, max_size: int | None = None, antialias: bool | None = True
    ) -> None:
        self.size = size
        self.interpolation = resampling(interpolation)
        self.max_size = max_size

    def __call__(self, image: Image.Image) -> Image.Image:
        if not isinstance(self.size, int):
            height, width = _pair(self.size)
        else:
            scale = self.size / min(image.size)
            if self.max_size is not None:
                scale = min(scale, self.max_size / max(image.size))
            width, height = (max(1, round(side * scale)) for side in image.size)
        return image if image.size == (width, height) else image.resize((width, height), self.interpolation)


class CenterCrop:
    """Cut `size` (height, width) out of the middle; black where the image is smaller."""

    def __init__(self, size: Size) -> None:
        self.size = _pair(size)

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        return _crop(image, (image.width - width + 1) // 2, (image.height - height + 1) // 2, self.size)


class RandomCrop:
    """Cut `size` (height, width) out of an image at random.

    Raises:
        ValueError: For an image that is smaller, unless `pad_if_needed`, which makes the rest black.
    """

    def __init__(self, size: Size, pad_if_needed: bool = False) -> None:
        self.size = _pair(size)
        self.pad_if_needed = pad_if_needed

    def __call__(self, image: Image.Image) -> Image.Image:
        spare = image.height - self.size[0], image.width - self.size[1]
        if min(spare) < 0 and not self.pad_if_needed:
            raise ValueError(
                f"RandomCrop(size={list(self.size)}): the image has only {image.height}x{image.width} pixels; "
                "put a Resize before it"
            )
        top, left = (int(np.random.random() * (room + 1)) if room > 0 else room // 2 for room in spare)
        return _crop(image, left, top, self.size)


class RandomHorizontalFlip:
    """Mirror an image left to right with probability `p`."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if np.random.random() < self.p else image


class ToTensor:
    """Convert an image to float32 (C, H, W) in [0, 1]."""

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        pixels = np.asarray(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        tensor = torch.from_numpy(pixels.copy()).movedim(-1, 0)
        return tensor.float() / 255 if pixels.dtype == np.uint8 else tensor.float()


class Normalize:
    """Scale a tensor (C, H, W) to (x - mean) / std, channel by channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], inplace: bool = False) -> None:
        self.mean = torch.tensor(mean)[:, None, None]
        self.std = torch.tensor(std)[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def square_box(size: tuple[int, int], side: int, random: bool) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of a square in an image of `size` (width, height), in the middle or at random."""
    across, down = np.random.random(2) if random else (0.5, 0.5)
    left, top = int(across * (size[0] - side + 1)), int(down * (size[1] - side + 1))
    return left, top, left + side, top + side


def build_transforms(configs: Any) -> Compose:
    """Build the transforms of an `image_transforms` section: a config, or a list of configs or callables."""
    if configs is None:
        return Compose([])
    entries = list(configs) if isinstance(configs, Sequence) and not isinstance(configs, str) else [configs]
    return Compose([entry if callable(entry) else instantiate_from_config(entry) for entry in entries])


def resampling(interpolation: int | str) -> Image.Resampling:
    """PIL's filter by its number or its name. Raises ValueError for one that PIL does not have."""
    try:
        if isinstance(interpolation, str):
            return Image.Resampling[{"linear": "bilinear"}.get(interpolation, interpolation).upper()]
        return Image.Resampling(interpolation)
    except (KeyError, ValueError):
        known = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in Image.Resampling)
        raise ValueError(f"interpolation {interpolation!r} is not one of {known}") from None


def to_array(image: Any) -> np.ndarray:
    """Convert an image to float32 (H, W, C) in [-1, 1], whatever transform was its last."""
    if isinstance(image, Tensor):
        return image.movedim(0, -1).numpy() * 2 - 1
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1


def _pair(size: Size) -> tuple[int, int]:
    """Height and width."""
    sides = [size] if isinstance(size, int) else list(size)
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"size must be one or two numbers from 1, not {size!r}")
    return int(sides[0]), int(sides[-1])


def _crop(image: Image.Image, left: int, top: int, size: tuple[int, int]) -> Image.Image:
    return image.crop((left, top, left + size[1], top + size[0]))
