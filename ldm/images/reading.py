"""Images from files: sRGB images, masks and depth maps."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

logger = logging.getLogger(__name__)

# Pillow has more: rare decoders are little tested, and some, such as EPS, run programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_SIDE = 65_535  # pixels, as in JPEG files; decoders need far more memory for extreme shapes
UNIFORM = 32  # levels by which the colours of a mask's strokes may differ
SOLID = 0.5  # alpha from which a pixel belongs to a stroke


def load_image(path: str | Path, shrink_to: int | None = None) -> Image.Image:
    """Load an image as RGB in sRGB, oriented by EXIF, with transparent parts on white.

    Of an animation the first frame is used. Colours are converted by the ICC profile. 16-bit levels become 8-bit ones;
    floats are scaled from black, the least, to white.

    Args:
        path: The file.
        shrink_to: Let JPEG files be decoded at a reduced size, no side below this many pixels, which is faster.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is a folder, not an image in one of `FORMATS`, damaged, or too large.
    """
    return _to_rgb(*_load(path, shrink_to))


def load_gray(path: str | Path) -> Tensor:
    """Load a mask or a depth map: brightness as float32 (1, 1, H, W) from 0 to 1, oriented by EXIF.

    Files of more than 8 bits keep their precision. Where a file has strokes of one colour on a transparent canvas, the
    alpha channel is the mask; otherwise transparent parts are white. Raises what `load_image` raises.
    """
    image, levels = _load(path)
    if levels is None:
        levels = _stroke_alpha(image)
    if levels is None:
        levels = np.asarray(_to_rgb(image).convert("L"), np.float32) / 255
    return torch.from_numpy(levels.copy())[None, None]


def _stroke_alpha(image: Image.Image) -> np.ndarray | None:
    """Return the alpha channel from 0 to 1 if opaque pixels have one colour and others are transparent."""
    if not image.has_transparency_data:
        return None
    pixels = np.asarray(image.convert("RGBA"))
    alpha = pixels[..., 3].astype(np.float32) / 255
    strokes = pixels[alpha >= SOLID][:, :3]
    if len(strokes) in (0, alpha.size) or np.ptp(strokes, axis=0).max() > UNIFORM:
        return None
    return alpha


def _load(path: str | Path, shrink_to: int | None = None) -> tuple[Image.Image, np.ndarray | None]:
    """Load an image as it is in its file, but oriented, and the levels (H, W) from 0 to 1 of deep grey images."""
    with opened(path) as image:
        if shrink_to is not None:
            image.draft(None, (shrink_to, shrink_to))
        image.load()
        unsigned = image.format == "TIFF" and image.tag_v2.get(339, (1,))[0] == 1  # type: ignore[attr-defined]
        kind = f"{image.mode} {image.format}"
        image = ImageOps.exif_transpose(image)
    levels = None
    if image.mode.startswith("I") or image.mode == "F":
        levels = _scale_levels(np.asarray(image), kind, unsigned)
        if not np.isfinite(levels).all():
            raise ValueError(f"{path} holds NaN or infinity: replace them by numbers")
    return image, levels


def _scale_levels(pixels: np.ndarray, kind: str, unsigned: bool) -> np.ndarray:
    """Scale deep levels (H, W) to float32 from 0 to 1. Floats and 32-bit integers have no range of their own."""
    if kind == "I TIFF":
        levels = pixels.astype(np.int32).astype(np.uint32 if unsigned else np.int32).astype(np.float64)
        if levels.min() >= 0:
            most = levels.max()
            return (levels / next((scale for scale in (255, 65535) if most <= scale), most)).astype(np.float32)
    elif pixels.dtype.kind != "f":
        return np.clip(pixels.astype(np.float32) / 65535, 0, 1)
    else:
        levels = pixels.astype(np.float32)
    return ((levels - levels.min()) / max(np.ptp(levels), 1e-12)).astype(np.float32)


def _to_rgb(image: Image.Image, levels: np.ndarray | None = None) -> Image.Image:
    if levels is not None:
        return Image.fromarray(np.rint(levels * 255).astype(np.uint8)).convert("RGB")
    profile = image.info.get("icc_profile")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if alpha is not None or image.mode == "P":
        image = image.convert("RGB")
    rgb = _to_srgb(image, profile) if profile else image.convert("RGB")
    if alpha is None:
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")


def _to_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """Convert colours by an ICC profile; profiles that are damaged or of another colour space are ignored."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
        converted = None
    return image.convert("RGB") if converted is None else converted


# ---- opening ----

# what Pillow's decoders raise on damaged data
_DAMAGED = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError, TypeError, RuntimeError),
    *(struct.error, zlib.error),
)


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file; errors in the block become those of `load_image`."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not an image")
    if not path.exists():
        raise FileNotFoundError(f"there is no image {path}")
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            # Pillow warns at half the size that it refuses; photos of that size are common
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # damage raises an error as well
            with Image.open(_without_text(file), formats=_formats()) as image:
                if max(image.size) > MAX_SIDE:
                    raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
                if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a photo and its previews
                    _log_first_frame(str(path))
                yield image
    except UnidentifiedImageError:
        raise ValueError(
            f"{path} is not an image that Pillow can read, in a format of {', '.join(FORMATS)}: convert it to PNG"
        ) from None
    except Image.DecompressionBombError as error:
        size = re.search(r"[\dx]+ pixels", str(error))
        raise ValueError(f"{path} has too many pixels ({size[0] if size else error}): make it smaller first") from None
    except PermissionError:
        raise
    except _DAMAGED as error:
        raise ValueError(f"{path} is cut short or damaged: {error}") from error


_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_TEXT = 2**20  # bytes of a decompressed PNG chunk, beyond which Pillow refuses the file


def _without_text(file: BinaryIO) -> BinaryIO:
    """Drop a PNG's text chunks and oversized ICC profiles, for which Pillow would refuse the file."""
    if file.read(8) != _PNG:
        file.seek(0)
        return file
    kept, dropped, start = [(0, 8)], False, 8
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        end = start + length + 12
        if kind in (b"tEXt", b"zTXt", b"iTXt") or (kind == b"iCCP" and _is_oversized(file.read(length))):
            dropped = True
        else:
            kept.append((start, end))
        start = file.seek(end)
    file.seek(0)
    if not dropped:
        return file
    parts = []
    for start, end in kept:
        file.seek(start)
        parts.append(file.read(end - start))
    return io.BytesIO(b"".join(parts))


def _is_oversized(chunk: bytes) -> bool:
    try:
        decoder = zlib.decompressobj()
        decoder.decompress(chunk.partition(b"\0")[2][1:], _MOST_TEXT)
        return bool(decoder.unconsumed_tail)
    except zlib.error:
        return False


@functools.cache
def _formats() -> list[str]:
    """Return those of `FORMATS` that this Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@functools.lru_cache(maxsize=10_000)  # once per file, even if training reads it in every epoch
def _log_first_frame(path: str) -> None:
    logger.info("%s holds several images: the first is used", path)
