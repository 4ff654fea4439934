"""Pictures in memory: brought to a size, masks and blending, to and from tensors, in grids."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def fit_to_multiple(
    image: Image.Image, multiple: int, height: int | None = None, width: int | None = None
) -> Image.Image:
    """`image` resized (Lanczos) to `height` x `width` pixels, both floored to a multiple of `multiple`.

    With one side given the other follows the picture's shape; with neither the picture keeps its size but for the
    flooring. Raises ValueError if a side comes out below one multiple.
    """
    if height is None and width is None:
        height, width = image.height, image.width
    elif height is None and width is not None:
        height = round(width * image.height / image.width)
    elif width is None and height is not None:
        width = round(height * image.width / image.height)
    assert height is not None and width is not None
    if min(height, width) < multiple:
        raise ValueError(
            f"a picture of {width}x{height} pixels is too small: each side needs at least {multiple}; "
            f"give a larger picture or a larger size"
        )
    return image.resize((width - width % multiple, height - height % multiple), resample=Image.Resampling.LANCZOS)


def check_mask(mask: Tensor, image: Image.Image, mask_name: str = "the mask", image_name: str = "the picture") -> None:
    """ValueError, naming both, unless a mask (1, 1, H, W) is as large as its picture, but for a scale."""
    height, width = mask.shape[2:]
    if abs(height / image.height - width / image.width) > 0.5 / image.height + 0.5 / image.width:
        raise ValueError(
            f"{mask_name} is {width}x{height} pixels, but {image_name} is {image.width}x{image.height}: "
            "make it as large as the picture"
        )


def fit_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask (1, 1, H, W) with values from 0 to 1, resized and made one of 0 and 1, which is from a half on."""
    if mask.shape[2:] != (height, width):
        mask = F.interpolate(mask, (height, width), mode="bilinear", antialias=True)
    return (mask >= 0.5).float()


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """A mask (1, 1, H, W) of 0 and 1 with a soft edge outside of what it covers, `pixels` wide.

    At the distance d from the nearest 1 it is max(0, 1 - d / (pixels + 1)).
    """
    squared = torch.where(mask > 0, 0.0, math.inf)  # distances: exact, as the square of each axis adds up
    for axis, sides in ((3, (pixels, pixels)), (2, (0, 0, pixels, pixels))):
        padded = F.pad(squared, sides, value=math.inf)
        shifts = range(-pixels, pixels + 1)
        moved = (padded.narrow(axis, pixels + k, mask.shape[axis]) + k * k for k in shifts)
        squared = functools.reduce(torch.minimum, moved)
    return (1 - squared.sqrt() / (pixels + 1)).clamp(min=0)


def blend(under: Image.Image, over: Image.Image, weight: Tensor) -> Image.Image:
    """`over` on `under`, RGB of one size, with a weight (1, 1, H, W): where it is 0 or 1, bit for bit one of them."""
    below, above = (np.asarray(image, dtype=np.float32) for image in (under, over))
    return Image.fromarray(np.rint(below + weight[0, 0, :, :, None].numpy() * (above - below)).astype(np.uint8))


def image_to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as float32 (1, 3, H, W) from -1 to 1."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return 2.0 * torch.from_numpy(rearrange(pixels, "h w c -> 1 c h w").copy()) - 1.0


def tensor_to_images(x: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) with values from -1 to 1, cut off beyond, as B pictures.

    Levels are truncated, not rounded, as in the public scripts. Raises ValueError for any other shape.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"pictures have the shape (B, 3, H, W), not {tuple(x.shape)}")
    pixels = torch.clamp((x.detach().float() + 1.0) / 2.0, min=0.0, max=1.0).cpu().numpy()
    return [Image.fromarray((255.0 * rearrange(p, "c h w -> h w c")).astype(np.uint8)) for p in pixels]


def text_to_tensor(texts: Sequence[str], height: int, width: int) -> Tensor:
    """Texts in lines that fit, black on white, as pictures (B, 3, height, width) from -1 to 1; the end may be cut."""
    size = max(8, width // 24)
    font = ImageFont.load_default(size)
    columns = max(1, int(width / font.getlength("abcdefgh ") * 9))
    drawn = []
    for text in texts:
        image = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(image).text((1, 0), textwrap.fill(text, columns), fill="black", font=font)
        drawn.append(image_to_tensor(image))
    return torch.cat(drawn)


def make_grid(images: Sequence[Image.Image], nrow: int = 8, padding: int = 2) -> Image.Image:
    """RGB pictures of one size in rows of `nrow`, on black, `padding` pixels around each.

    Laid out as torchvision.utils.make_grid does it: a row is never longer than there are pictures, and a single
    picture is returned without padding. Raises ValueError for no pictures, unequal sizes or nrow < 1.
    """
    if not images or nrow < 1:
        raise ValueError(f"a grid needs pictures and at least one a row, got {len(images)} pictures and nrow={nrow}")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"the pictures of a grid need one size, got {sizes}")
    if len(images) == 1:
        return images[0].copy()
    width, height = (side + padding for side in sizes[0])
    columns = min(nrow, len(images))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (width * columns + padding, height * rows + padding))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid.paste(image, (column * width + padding, row * height + padding))
    return grid
