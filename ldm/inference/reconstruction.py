"""Encode and decode an image with a first stage, and measure the error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.checkpoint import check_unchanged
from ldm.images import image_to_tensor, tensor_to_images
from ldm.inference.pipeline import check_finite
from ldm.inference.tiling import padded, tiled
from ldm.models.autoencoder import AutoencoderKL, psnr

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.autoencoder import FirstStage


TILE = 1024


@torch.no_grad()
def reconstruct(
    first_stage: FirstStage, image: Image.Image, *, tile: int = TILE, progress: bool = True
) -> tuple[Image.Image, float]:
    """Reconstruct an image with `first_stage`.

    Args:
        first_stage: From `load_first_stage`. A KL posterior's mean is decoded, so nothing is random.
        image: An image of any size.
        tile: Longest side to process at once, 0 for any; larger images are processed in overlapping tiles.
        progress: Show a progress bar.

    Returns:
        The reconstruction, of the same size, and its PSNR in dB over all pixels.

    Raises:
        ValueError: for tiles that are too small.
        ArithmeticError: if the result is not finite.
    """
    check_unchanged(first_stage)
    like = next(first_stage.parameters(), torch.empty(0))  # an identity has none
    factor = first_stage.downsampling_factor
    x = image_to_tensor(image)  # (1, 3, H, W)
    title = "Tiles" if progress else None
    back = tiled(
        lambda part: round_trip(first_stage, part), padded(x, factor).to(like), tile, multiple=factor, progress=title
    )
    back = back[:, :, : image.height, : image.width].float().cpu()
    check_finite(back, "the image")
    check_unchanged(first_stage)
    (reconstruction,) = tensor_to_images(back)
    return reconstruction, psnr(back, x).item()


def round_trip(first_stage: FirstStage, x: Tensor) -> Tensor:
    """Encode and decode x (B, 3, H, W) in [-1, 1] with any first stage."""
    output = first_stage(x, sample_posterior=False) if isinstance(first_stage, AutoencoderKL) else first_stage(x)
    back: Tensor = output[0] if isinstance(output, tuple) else output  # an identity has no codebook loss
    return back
