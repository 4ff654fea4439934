"""Stable Diffusion's upscaler: the network sees the small picture, noised, beside the noisy latent of its own size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.distributed_rng import DistributedRNG
from ldm.models.diffusion.gaussian import Condition
from ldm.models.diffusion.noise import NoiseSource
from ldm.models.diffusion.stages import entry_of, images_of
from ldm.modules.diffusionmodules.upscaling import AbstractLowScaleModel
from ldm.util import instantiate_from_config


class LatentUpscaleDiffusion(LatentDiffusion):
    """Latent diffusion under a prompt, a small picture as large as the latent, and how much noise was added to that.

    low_scale_config: what adds the noise, `ImageConcatWithNoiseAugmentation`. low_scale_key: the batch's entry with the
    small pictures (B, h, w, 3) in [-1, 1]. noise_level_key: its entry with noise levels (B,); None draws them.
    """

    def __init__(
        self,
        low_scale_config: Mapping[str, Any],
        low_scale_key: str = "LR",
        noise_level_key: str | None = None,
        conditioning_key: str = "hybrid-adm",
        **kwargs: Any,
    ) -> None:
        super().__init__(conditioning_key=conditioning_key, **kwargs)
        self.low_scale_model = instantiate_from_config(low_scale_config)  # a schedule: no weights to load
        self.low_scale_key = low_scale_key
        self.noise_level_key = noise_level_key

    @property
    def max_noise_level(self) -> int:
        """The highest noise level of small pictures; random levels are below it."""
        return self.low_scale_model.max_noise_level

    @torch.no_grad()
    def low_scale_condition(
        self, x_low: Tensor, noise_level: int | Tensor | None = None, noise: NoiseSource | None = None
    ) -> tuple[Tensor, Tensor]:
        """Small pictures (B, 3, h, w) in [-1, 1] with noise of one level, of levels (B,), or of random ones.

        Returns what the network takes as `c_concat`, of the same shape, and as `c_adm`, the levels (B,) int64.
        Raises ValueError for levels that are not 0 to `max_noise_level`.
        """
        return augmented(self, self.low_scale_model, x_low, noise_level, noise)

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, bs: int | None = None) -> tuple[Tensor, Any]:
        """(latents, {"c_concat", "c_crossattn", "c_adm"}) of the first `bs` items."""
        z, c = super().get_input(batch, k, bs)
        x_low = images_of(batch, self.low_scale_key, self.device)[:bs]
        if x_low.shape[2:] != z.shape[2:]:
            raise ValueError(
                f"the batch's {self.low_scale_key!r} is {x_low.shape[2]}x{x_low.shape[3]} (height x width), but this "
                f"model takes small pictures as large as the latent, {z.shape[2]}x{z.shape[3]}"
            )
        level = None if self.noise_level_key is None else entry_of(batch, self.noise_level_key)[:bs]
        concat, level = self.low_scale_condition(x_low, level)
        return z, {"c_concat": [concat], "c_crossattn": [c], "c_adm": level}

    def _originals(self, batch: Mapping[str, Any], N: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
        z, c, log = super()._originals(batch, N)
        return z, c, log | {"low_scale": F.interpolate(c["c_concat"][0], size=log["reconstruction"].shape[2:])}


def augmented(
    model: LatentDiffusion,
    augmentor: AbstractLowScaleModel,
    x: Tensor,
    noise_level: int | Tensor | None,
    noise: NoiseSource | None = None,
) -> tuple[Tensor, Tensor]:
    """What `augmentor` makes of conditions x (B, ...) of `model`; random numbers are drawn for all of its processes."""
    draws = DistributedRNG.of(model)
    if noise_level is None:
        noise_level = draws.timesteps(len(x), max(augmentor.max_noise_level, 1), x.device)
    level = augmentor.levels(noise_level, len(x), x.device)
    return augmentor(x, level, draws.randn_like(x) if noise is None else noise(x.shape, x.device).to(x.dtype))
