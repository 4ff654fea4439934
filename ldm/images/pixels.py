"""Images in memory: sizes, masks, blending, tensors, grids."""

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
    """Resize (Lanczos) to `height` x `width` pixels, rounded down to multiples of `multiple`.

    With one side given the aspect ratio is kept, with neither the size. ValueError for less than one multiple.
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
            f"an image of {width}x{height} pixels is too small: each side needs at least {multiple}; "
            f"use a larger image or size"
        )
    return image.resize((width - width % multiple, height - height % multiple), resample=Image.Resampling.LANCZOS)


def check_mask(mask: Tensor, image: Image.Image, mask_name: str = "the mask", image_name: str = "the image") -> None:
    """Raise ValueError unless a mask (1, 1, H, W) has the aspect ratio of its image."""
    height, width = mask.shape[2:]
    if abs(height / image.height - width / image.width) > 0.5 / image.height + 0.5 / image.width:
        raise ValueError(
            f"{mask_name} is {width}x{height} pixels, but {image_name} is {image.width}x{image.height}: "
            "make it as large as the image"
        )


def fit_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Resize a mask (1, 1, H, W) in [0, 1] and binarise it at 0.5."""
    if mask.shape[2:] != (height, width):
        mask = F.interpolate(mask, (height, width), mode="bilinear", antialias=True)
    return (mask >= 0.5).float()


def feathered(mask: Tensor, pixels: int) -> Tensor:
    """Give a mask (1, 1, H, W) of 0 and 1 a soft outer edge, `pixels` wide.

    At distance d from the nearest 1 it is max(0, 1 - d / (pixels + 1)).
    """
    squared = torch.where(mask > 0, 0.0, math.inf)  # distances: exact, as squares of both axes add up
    for axis, sides in ((3, (pixels, pixels)), (2, (0, 0, pixels, pixels))):
        padded = F.pad(squared, sides, value=math.inf)
        shifts = range(-pixels, pixels + 1)
        moved = (padded.narrow(axis, pixels + k, mask.shape[axis]) + k * k for k in shifts)
        squared = functools.reduce(torch.minimum, moved)
    return (1 - squared.sqrt() / (pixels + 1)).clamp(min=0)


def blend(under: Image.Image, over: Image.Image, weight: Tensor) -> Image.Image:
    """Blend two RGB images by a weight (1, 1, H, W): `under` at 0 and `over` at 1, bit for bit."""
    below, above = (np.asarray(image, dtype=np.float32) for image in (under, over))
    return Image.fromarray(np.rint(below + weight[0, 0, :, :, None].numpy() * (above - below)).astype(np.uint8))


def image_to_tensor(image: Image.Image) -> Tensor:
    """Convert an image to float32 (1, 3, H, W) in [-1, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return 2.0 * torch.from_numpy(rearrange(pixels, "h w c -> 1 c h w").copy()) - 1.0


def tensor_to_images(x: Tensor) -> list[Image.Image]:
    """Convert (B, 3, H, W) in [-1, 1], clamped, to B images.

    Levels are truncated, not rounded, as in the public scripts. ValueError for other shapes.
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"images have the shape (B, 3, H, W), not {tuple(x.shape)}")
    pixels = torch.clamp((x.detach().float() + 1.0) / 2.0, min=0.0, max=1.0).cpu().numpy()
    return [Image.fromarray((255.0 * rearrange(p, "c h w -> h w c")).astype(np.uint8)) for p in pixels]


def text_to_tensor(texts: Sequence[str], height: int, width: int) -> Tensor:
    """Render texts, wrapped, black on white, to (B, 3, height, width) in [-1, 1]; long texts are truncated."""
    size = max(8, width // 24)
    font = ImageFont.load_default(size)
    columns = max(1, int(width / font.getlength("abcdefgh ") * 9))
    rendered = []
    for text in texts:
        image = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(image).text((1, 0), textwrap.fill(text, columns), fill="black", font=font)
        rendered.append(image_to_tensor(image))
    return torch.cat(rendered)


def make_grid(images: Sequence[Image.Image], nrow: int = 8, padding: int = 2) -> Image.Image:
    """Arrange RGB images of one size in rows of `nrow`, on black, with `padding` pixels around each.

    As torchvision.utils.make_grid: rows are not longer than the number of images, and a single image has no padding.
    ValueError for no images, unequal sizes or nrow < 1.
    """
    if not images or nrow < 1:
        raise ValueError(f"a grid needs images and at least one per row, got {len(images)} images and nrow={nrow}")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(f"the images of a grid need one size, got {sizes}")
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
