"""Image resampling in floating point, with or without antialiasing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

METHODS = ("nearest", "bilinear", "bicubic", "area", "lanczos")


def resize(image: np.ndarray, size: tuple[int, int], method: str = "bicubic", antialias: bool = False) -> np.ndarray:
    """Resize an image of floats.

    Without antialiasing the kernel has the width of source pixels, as in OpenCV: "bicubic" is Keys' kernel with
    a = -0.75, "lanczos" has four lobes, and pixels beyond the border repeat it. With antialiasing the kernel has
    the width of target pixels, as in Pillow and MATLAB: a = -0.5, three lobes, and no pixels beyond the border.

    Args:
        image: (H, W) or (H, W, C).
        size: height and width of the result.
        method: one of `METHODS`. "nearest" and "area" are the same with and without antialiasing.
        antialias: widen the kernel where the image shrinks.

    Returns:
        The image at `size`, float64, not clipped.

    Raises:
        ValueError: For an unknown method or a size below 1x1.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if min(size) < 1:
        raise ValueError(f"an image cannot be resized to {size[1]}x{size[0]} pixels")
    down, across = (_weights(old, new, method, antialias) for old, new in zip(image.shape[:2], size))
    rows = np.tensordot(down, image.astype(np.float64), axes=(1, 0))  # (h, W, ...)
    return np.moveaxis(np.tensordot(across, rows, axes=(1, 1)), 0, 1)


def _weights(old: int, new: int, method: str, antialias: bool) -> np.ndarray:
    """Weights (new, old) of source pixels in target pixels, along one side; each row sums to 1."""
    scale = old / new
    if method == "nearest":
        return np.eye(old)[np.minimum((np.arange(new) * scale).astype(int), old - 1)]
    if method == "area" and scale > 1:
        edges = np.arange(new + 1)[:, None] * scale
        covered = np.clip(edges - np.arange(old), 0, 1)  # of each pixel, up to each edge
        return np.diff(covered, axis=0) / scale
    kernel, radius = _kernel(method, antialias)
    stretch = max(scale, 1.0) if antialias else 1.0
    margin = int(np.ceil(radius * stretch))
    centers = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    pixels = np.arange(-margin, old + margin)
    weights = kernel((centers - pixels) / stretch)  # (new, old + 2 * margin)
    inner = weights[:, margin : margin + old].copy()
    if not antialias:
        inner[:, 0] += weights[:, :margin].sum(axis=1)
        inner[:, -1] += weights[:, margin + old :].sum(axis=1)
    return inner / inner.sum(axis=1, keepdims=True)


def _kernel(method: str, antialias: bool) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """A kernel and its radius in pixels."""
    if method == "bicubic":
        return _cubic(-0.5 if antialias else -0.75), 2
    if method == "lanczos":
        lobes = 3 if antialias else 4
        return lambda x: np.where(np.abs(x) < lobes, np.sinc(x) * np.sinc(x / lobes), 0.0), lobes
    return lambda x: np.maximum(1 - np.abs(x), 0.0), 1


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
    """Keys' cubic convolution kernel (Keys 1981, equation 4)."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = a * (((x - 5) * x + 8) * x - 4)
        return np.where(x <= 1, near, np.where(x < 2, far, 0.0))

    return kernel
