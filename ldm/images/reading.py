"""Pictures from files."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

logger = logging.getLogger(__name__)

# What pictures come in. Pillow knows more: rare decoders are little tested, and some, such as EPS, run programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def load_image(path: str | Path, shrink_to: int | None = None) -> Image.Image:
    """The picture in a file as RGB, turned the way its EXIF orientation says, transparent parts on white.

    Of several, as in an animation, the first. 16 bits a level become 8; floats go from black, the least, to white.

    shrink_to: let JPEG files come out smaller, which decodes them faster, but with no side below this many pixels.

    Raises FileNotFoundError if there is no such file, ValueError if it is a folder, not a picture in one of `FORMATS`,
    damaged, or larger than Pillow's limit against decompression bombs.
    """
    return _to_rgb(_loaded(path, shrink_to))


def load_gray(path: str | Path) -> Tensor:
    """A mask or a depth map: the brightness in a picture file as float32 (1, 1, H, W) from 0 to 1.

    Files of 16 bits keep their precision. Turned and composed as by `load_image`, with the same errors.
    """
    image = _loaded(path)
    levels = _deep_levels(image) if _is_deep(image) else np.asarray(_to_rgb(image).convert("L"), np.float32) / 255
    return torch.from_numpy(levels.copy())[None, None]


def _loaded(path: str | Path, shrink_to: int | None = None) -> Image.Image:
    """A picture as it is in its file, but turned."""
    with opened(path) as image:
        if shrink_to is not None:
            image.draft(None, (shrink_to, shrink_to))
        image.load()
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
        raise ValueError(f"{path} holds NaN or infinity: put numbers in their place")
    return image


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture file, open; what goes wrong in the block is said as `load_image` says it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a picture")
    if not path.exists():
        raise FileNotFoundError(f"there is no picture {path}")
    try:
        with warnings.catch_warnings():
            # Pillow warns at half the size that it refuses at; photos of that size are common.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # what is broken ends in an error
            with Image.open(path, formats=_formats()) as image:
                if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo and its previews
                    _say_first(str(path))
                yield image
    except UnidentifiedImageError:
        raise ValueError(
            f"{path} is not a picture that Pillow can read, in a format of {', '.join(FORMATS)}: convert it to PNG"
        ) from None
    except Image.DecompressionBombError as error:
        size = re.search(r"\d+ pixels", str(error))
        raise ValueError(f"{path} has too many pixels ({size[0] if size else error}): make it smaller first") from None
    except PermissionError:
        raise
    except _DAMAGED as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from error


# What Pillow's decoders raise on broken data.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, TypeError, struct.error, zlib.error)


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@functools.lru_cache(maxsize=10_000)  # once a file, even if a training reads it in every epoch
def _say_first(path: str) -> None:
    logger.info("%s holds several pictures: the first is used", path)


def _is_deep(image: Image.Image) -> bool:
    """Whether levels have more than 8 bits, which Pillow would cut off at 255 instead of scaling them."""
    return image.mode.startswith("I") or image.mode == "F"


def _deep_levels(image: Image.Image) -> np.ndarray:
    """(H, W), float32 from 0 to 1."""
    levels = np.asarray(image, dtype=np.float32)
    if image.mode == "F":
        return (levels - levels.min()) / max(np.ptp(levels), 1e-12)  # floats have no range of their own
    return np.clip(levels / 65535, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        image = Image.fromarray(np.rint(_deep_levels(image) * 255).astype(np.uint8))
    elif _is_deep(image):
        image = Image.fromarray(np.clip(np.asarray(image) // 257, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
