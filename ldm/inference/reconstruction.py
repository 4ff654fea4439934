"""What a first stage keeps of a picture: there and back again, and how far off that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.checkpoint import check_unchanged
from ldm.images import image_to_tensor, tensor_to_images
from ldm.inference.pipeline import check_finite
from ldm.inference.tiling import padded, tiled
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.first_stage import psnr

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.first_stage import FirstStage


TILE = 1024


@torch.no_grad()
def reconstruct(
    first_stage: FirstStage, image: Image.Image, *, tile: int = TILE, progress: bool = True
) -> tuple[Image.Image, float]:
    """(the picture as `first_stage` gives it back, of the same size; its PSNR in dB over all pixels).

    first_stage: from `load_first_stage`. A KL posterior gives its mean, so nothing is random. tile: the longest side
    that goes through at once, 0 for any; larger pictures do in overlapping tiles.

    Raises ValueError for tiles that are too small, ArithmeticError if the result is not finite.
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
    check_finite(back, "the picture")
    check_unchanged(first_stage)
    (reconstruction,) = tensor_to_images(back)
    return reconstruction, psnr(back, x).item()


def round_trip(first_stage: FirstStage, x: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1], encoded and decoded, by any first stage."""
    answer = first_stage(x, sample_posterior=False) if isinstance(first_stage, AutoencoderKL) else first_stage(x)
    back: Tensor = answer[0] if isinstance(answer, tuple) else answer  # an identity gives no codebook loss
    return back
