"""Previews while sampling: the predicted x0 in colors, by a linear map instead of the decoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.images import tensor_to_images
from ldm.inference.pipeline import first_stage_dtype
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

OnPreview = Callable[[list["Image.Image"], int, int], None]  # (images, step, number of steps)

_COUNT, _SIDE = 16, 8  # the map is fitted on this many images of this many latents a side


class Previews:
    """Call `on_preview` with preview images every few steps: an `on_step` callback of `txt2img`.

    Decoding would take longer than a step. A linear map from the channels of a latent to a color is used instead,
    fitted once to the first stage's output for mosaics of random colors.

    Args:
        model: The model that samples.
        every: Steps between previews.
        on_preview: Called with (images, step, number of steps).
    """

    def __init__(self, model: LatentDiffusion, every: int, on_preview: OnPreview) -> None:
        if every < 1:
            raise ValueError(f"previews need a number of steps of at least 1, not every {every} steps")
        self.model, self.every, self.on_preview = model, every, on_preview

    def __call__(self, x0: Tensor, step: int, total: int) -> None:
        """Preview the predicted x0 (B, C, h, w) after `step` steps of `total`."""
        if step % self.every == 0:
            self.on_preview(self.images(x0), step, total)

    def images(self, x0: Tensor) -> list[Image.Image]:
        """Images of latents (B, C, h, w), of the size that they would be decoded to."""
        weight = self._weight.to(x0.device)
        colors = torch.einsum("bchw,ck->bkhw", x0.float(), weight[:-1]) + weight[-1][:, None, None]
        factor = self.model.first_stage_model.downsampling_factor
        return tensor_to_images(F.interpolate(colors, scale_factor=factor, mode="nearest"))

    @functools.cached_property
    def _weight(self) -> Tensor:
        return fit_colors(self.model)


@torch.no_grad()
def fit_colors(model: LatentDiffusion) -> Tensor:
    """The least-squares linear map (C + 1, 3), the constant last, from scaled latents to decoded colors."""
    stage = model.first_stage_model
    generator = torch.Generator("cpu").manual_seed(0)  # leaves the run's random numbers alone
    mosaic = torch.rand((_COUNT, 3, _SIDE, _SIDE), generator=generator, device="cpu") * 2 - 1
    pixels = F.interpolate(mosaic, scale_factor=stage.downsampling_factor, mode="nearest")
    posterior = model.encode_first_stage(pixels.to(model.device, first_stage_dtype(model)))
    latents = posterior.mode() if isinstance(posterior, DiagonalGaussianDistribution) else posterior
    z = (model.scale_factor * latents).to(latents.dtype)
    decoded = model.decode_first_stage(z).float().clamp(-1, 1)
    colors = F.avg_pool2d(decoded, stage.downsampling_factor)
    known, wanted = (x.float().cpu().movedim(1, -1).flatten(0, 2) for x in (z, colors))
    ones = torch.ones_like(known[:, :1])
    solution: Tensor = torch.linalg.lstsq(torch.cat([known, ones], dim=1), wanted, driver="gelsd").solution
    return solution
