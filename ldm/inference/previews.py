"""Pictures of a drawing on its way: what the network expects to come out, in colours that a linear map guesses."""

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

OnPreview = Callable[[list["Image.Image"], int, int], None]  # (pictures, step, of how many)

_PICTURES, _SIDE = 16, 8  # what the map is fitted on: so many pictures of so many latent positions a side


class Previews:
    """Hands the predicted pictures of a batch to `on_preview`, every so many steps: an `on_step` of `txt2img`.

    Decoding them would take longer than a step. A linear map from a latent position's channels to a colour does
    instead, fitted once to what the first stage makes of a few mosaics of colours.
    """

    def __init__(self, model: LatentDiffusion, every: int, on_preview: OnPreview) -> None:
        """ValueError for every < 1."""
        if every < 1:
            raise ValueError(f"previews come every step or less often, not every {every} steps")
        self.model, self.every, self.on_preview = model, every, on_preview

    def __call__(self, x0: Tensor, step: int, total: int) -> None:
        """x0 (B, C, h, w): what the network expects after `step` steps of `total`."""
        if step % self.every == 0:
            self.on_preview(self.pictures(x0), step, total)

    def pictures(self, x0: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) as pictures of the size that they would be decoded to."""
        weight = self._weight.to(x0.device)
        colours = torch.einsum("bchw,ck->bkhw", x0.float(), weight[:-1]) + weight[-1][:, None, None]
        factor = self.model.first_stage_model.downsampling_factor
        return tensor_to_images(F.interpolate(colours, scale_factor=factor, mode="nearest"))

    @functools.cached_property
    def _weight(self) -> Tensor:
        return fit_colours(self.model)


@torch.no_grad()
def fit_colours(model: LatentDiffusion) -> Tensor:
    """The linear map (C + 1, 3), a constant last, that best tells from scaled latents what colour they decode to."""
    stage = model.first_stage_model
    generator = torch.Generator("cpu").manual_seed(0)  # not the run's random numbers
    mosaic = torch.rand((_PICTURES, 3, _SIDE, _SIDE), generator=generator, device="cpu") * 2 - 1
    pixels = F.interpolate(mosaic, scale_factor=stage.downsampling_factor, mode="nearest")
    posterior = model.encode_first_stage(pixels.to(model.device, first_stage_dtype(model)))
    latents = posterior.mode() if isinstance(posterior, DiagonalGaussianDistribution) else posterior
    z = (model.scale_factor * latents).to(latents.dtype)
    decoded = model.decode_first_stage(z).float().clamp(-1, 1)
    colours = F.avg_pool2d(decoded, stage.downsampling_factor)
    known, wanted = (x.float().cpu().movedim(1, -1).flatten(0, 2) for x in (z, colours))
    ones = torch.ones_like(known[:, :1])
    solution: Tensor = torch.linalg.lstsq(torch.cat([known, ones], dim=1), wanted, driver="gelsd").solution
    return solution
