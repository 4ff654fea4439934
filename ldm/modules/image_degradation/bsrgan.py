"""Random degradations for blind super-resolution.

Zhang et al. 2021, "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution", section 3: blur,
downsampling and noise, each random, in random order, and JPEG compression at the end.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.modules.image_degradation.resampling import resize

Step = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Ranges:
    """Ranges of the random parameters.

    Attributes:
        blurs: number of blurs, alternately isotropic and anisotropic.
        blur: factor on the widths of the blur kernels.
        noise: standard deviations of Gaussian and speckle noise, of a range of 255.
        speckle: probability of speckle noise.
        jpeg: qualities of JPEG compression.
        early_jpeg: probability of a compression before the last one.
        halve: probability that a factor of 4 begins with one of 2.
    """

    blurs: int
    blur: float
    noise: tuple[float, float]
    speckle: float
    jpeg: tuple[int, int]
    early_jpeg: float
    halve: float


FULL = Ranges(blurs=2, blur=1.0, noise=(1, 25), speckle=0.25, jpeg=(30, 95), early_jpeg=0.75, halve=0.25)
LIGHT = Ranges(blurs=1, blur=0.5, noise=(1, 5), speckle=0.1, jpeg=(80, 95), early_jpeg=0.0, halve=0.25)


def degradation_fn_bsr(
    image: np.ndarray,
    sf: int = 4,
    isp_model: None = None,
    up: bool = False,
    *,
    rng: np.random.Generator | int | None = None,
) -> dict[str, np.ndarray]:
    """Degrade an image at random and shrink it by `sf`.

    Args:
        image: uint8 (H, W, 3).
        sf: how many times smaller the sides become, 1 to 4; sides are cut to a multiple of it.
        isp_model: accepted for compatibility. Sensor noise is speckle noise here.
        up: resize the result to the size of the input.
        rng: a generator or a seed; by default one seeded by numpy's global state.

    Returns:
        {"image": uint8 (H // sf, W // sf, 3)}.

    Raises:
        ValueError: For an image of another type or shape, or one that is smaller than `sf`.
    """
    return _degrade(image, sf, isp_model, up, rng, FULL)


def degradation_fn_bsr_light(
    image: np.ndarray,
    sf: int = 4,
    isp_model: None = None,
    up: bool = False,
    *,
    rng: np.random.Generator | int | None = None,
) -> dict[str, np.ndarray]:
    """Degrade an image as `degradation_fn_bsr` does, with one blur, less noise and better JPEG quality."""
    return _degrade(image, sf, isp_model, up, rng, LIGHT)


def _degrade(image: np.ndarray, sf: int, isp_model: Any, up: bool, rng: Any, ranges: Ranges) -> dict[str, np.ndarray]:
    _check(image, sf, isp_model)
    if rng is None:
        rng = np.random.randint(2**32, size=4, dtype=np.uint32)
    rng = np.random.default_rng(rng)
    height, width = (side - side % sf for side in image.shape[:2])
    x = image[:height, :width].astype(np.float64) / 255
    size = height // sf, width // sf
    if sf == 4 and rng.random() < ranges.halve:
        x = np.clip(resize(x, (height // 2, width // 2), _either(rng), antialias=bool(rng.random() < 0.5)), 0, 1)
        sf = 2
    steps = _steps(sf, size, rng, ranges)
    for k in rng.permutation(len(steps)):
        x = np.clip(steps[k](x), 0, 1)
    x = jpeg(x, int(rng.integers(ranges.jpeg[0], ranges.jpeg[1] + 1)))
    if up:
        x = resize(x, (height, width), "bicubic")
    return {"image": to_uint8(x)}


def _check(image: np.ndarray, sf: int, isp_model: Any) -> None:
    if isp_model is not None:
        raise ValueError("isp_model must be None: models of a camera's sensor are not supported")
    if sf not in (1, 2, 3, 4):
        raise ValueError(f"sf must be 1, 2, 3 or 4, not {sf!r}")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image must be a uint8 array (H, W, 3), not {found}")
    if min(image.shape[:2]) < sf:
        raise ValueError(f"an image of {image.shape[1]}x{image.shape[0]} pixels cannot be made {sf} times smaller")


def _steps(sf: int, size: tuple[int, int], rng: np.random.Generator, ranges: Ranges) -> list[Step]:
    """The degradations of one image, in no order yet."""
    steps: list[Step] = [lambda x: blur(x, random_kernel(sf, rng, isotropic=True, factor=ranges.blur))]
    if ranges.blurs > 1:
        steps.append(lambda x: blur(x, random_kernel(sf, rng, isotropic=False, factor=ranges.blur)))
    elif rng.random() < 0.5:
        steps = [lambda x: blur(x, random_kernel(sf, rng, isotropic=False, factor=ranges.blur))]
    steps.append(partial(_downsample, sf=sf, size=size, rng=rng))
    steps.append(lambda x: gaussian_noise(x, _covariance(rng, ranges), rng))
    if rng.random() < ranges.speckle:
        steps.append(lambda x: speckle_noise(x, _covariance(rng, ranges), rng))
    if rng.random() < ranges.early_jpeg:
        steps.append(lambda x: jpeg(x, int(rng.integers(ranges.jpeg[0], ranges.jpeg[1] + 1))))
    return steps


# ---------------------------------------------------------------------------------------------------------------- blur


def gaussian_kernel(size: int, variances: tuple[float, float], angle: float = 0.0, shift: float = 0.0) -> np.ndarray:
    """A Gaussian blur kernel.

    Args:
        size: its side in pixels, odd.
        variances: of the two axes, in square pixels.
        angle: of the first axis, in radians.
        shift: of the centre, right and down, in pixels.

    Returns:
        exp(-x^T S^-1 x / 2) over the grid, normalised to sum 1, (size, size).
    """
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    precision = turn @ np.diag(1 / np.asarray(variances)) @ turn.T
    place = np.arange(size) - size // 2 - shift
    grid = np.stack(np.meshgrid(place, place), axis=-1)  # (size, size, 2): x, y
    kernel = np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", grid, precision, grid))
    return kernel / kernel.sum()


def random_kernel(sf: int, rng: np.random.Generator, isotropic: bool, factor: float = 1.0) -> np.ndarray:
    """A random Gaussian kernel of 7x7 to 21x21 pixels (Zhang et al. 2021, section 3.1)."""
    size = 2 * int(rng.integers(3, 11)) + 1
    if isotropic:
        variance = rng.uniform(0.1, factor * (2.0 + 0.2 * sf)) ** 2
        return gaussian_kernel(size, (variance, variance))
    first, second = rng.uniform(0.5, 0.5 + factor * (3.5 + sf), size=2)
    return gaussian_kernel(size, (first, second), rng.uniform(0, np.pi))


def blur(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Convolve each channel of an image (H, W, C) with a kernel, the border reflected."""
    margin = len(kernel) // 2
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    planes = torch.from_numpy(padded).float().movedim(-1, 0)[:, None].contiguous()  # (C, 1, H, W); double is slow
    weight = torch.from_numpy(kernel[::-1, ::-1].copy()).float()[None, None]
    return F.conv2d(planes, weight)[:, 0].movedim(0, -1).double().numpy()


# -------------------------------------------------------------------------------------------------------- downsampling


def _downsample(x: np.ndarray, sf: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Shrink to `size` by nearest neighbours after a blur, by interpolation, or down and up again on the way."""
    way = rng.choice(["nearest", "interpolate", "down-up"], p=[0.25, 0.5, 0.25])
    if way == "nearest":
        variance = rng.uniform(0.1, 0.6 * sf) ** 2
        return decimate(blur(x, gaussian_kernel(25, (variance, variance), shift=-0.5 * (sf - 1))), sf)
    if way == "down-up":
        between = rng.uniform(0.5, sf)  # how many times smaller the first step is; below 1 it enlarges
        height, width = (max(1, round(side / between)) for side in x.shape[:2])
        x = np.clip(resize(x, (height, width), _either(rng)), 0, 1)
    return resize(x, size, rng.choice(["bilinear", "bicubic", "area"]))


def decimate(image: np.ndarray, sf: int) -> np.ndarray:
    """Keep every `sf`-th pixel of each side, the first one included."""
    return image[::sf, ::sf]


def _either(rng: np.random.Generator) -> str:
    return "bilinear" if rng.random() < 0.5 else "bicubic"


# --------------------------------------------------------------------------------------------------------------- noise


def _covariance(rng: np.random.Generator, ranges: Ranges) -> np.ndarray:
    """A random covariance (3, 3) of the channels' noise: general, independent, or equal in all channels."""
    level = rng.uniform(*ranges.noise) / 255
    kind = rng.choice(["general", "independent", "gray"], p=[0.2, 0.4, 0.4])
    if kind == "independent":
        return level**2 * np.eye(3)
    if kind == "gray":
        return level**2 * np.ones((3, 3))
    axes, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    return level**2 * (axes * rng.random(3)) @ axes.T


def _noise(shape: tuple[int, ...], covariance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Normal noise (H, W, 3) with a covariance between its channels."""
    values, axes = np.linalg.eigh(covariance)
    return rng.standard_normal(shape) @ (axes * np.sqrt(np.maximum(values, 0))).T


def gaussian_noise(image: np.ndarray, covariance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add normal noise: x + n. image: (H, W, 3) in [0, 1]; covariance: (3, 3) of n."""
    return image + _noise(image.shape, covariance, rng)


def speckle_noise(image: np.ndarray, covariance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add noise in proportion to the image: x + x n."""
    return image + image * _noise(image.shape, covariance, rng)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress an image (H, W, 3) in [0, 1] as JPEG and decode it."""
    file = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), dtype=np.float64) / 255


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Convert levels in [0, 1] to 0..255."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
