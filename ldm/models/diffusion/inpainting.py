"""Stable Diffusion's inpainting models: the network sees the mask and the masked picture beside the noisy latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.stages import images_of


class LatentInpaintDiffusion(LatentDiffusion):
    """Latent diffusion under a prompt and, concatenated to the latent, the entries `concat_keys` of a batch.

    masked_image_key: which of them is an image to encode; the others are resized to the latent (mask: 1 to fill).
    finetune_keys: kept for public configs.
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        finetune_keys: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if masked_image_key not in concat_keys:
            raise ValueError(f"masked_image_key {masked_image_key!r} is not among concat_keys {list(concat_keys)}")
        super().__init__(**kwargs)
        self.concat_keys = tuple(concat_keys)
        self.masked_image_key = masked_image_key

    @torch.no_grad()
    def concat_condition(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> Tensor:
        """The batch's `concat_keys` as one tensor (B, C', h, w) at the latent's `size` (h, w)."""
        parts = []
        for key in self.concat_keys:
            entry = images_of(batch, key, self.device)[:bs]
            if key == self.masked_image_key:
                parts.append(self.get_first_stage_encoding(self.encode_first_stage(entry)))
            else:
                parts.append(F.interpolate(entry, size=tuple(size)))
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, bs: int | None = None) -> tuple[Tensor, Any]:
        """(latents, {"c_concat", "c_crossattn"}) of the first `bs` items."""
        z, c = super().get_input(batch, k, bs)
        return z, {"c_concat": [self.concat_condition(batch, z.shape[2:], bs)], "c_crossattn": [c]}

    def get_learned_conditioning(self, c: Any) -> Any:
        """The encoded condition; of a condition in parts, as `get_input` gives it, its text alone is encoded."""
        if isinstance(c, Mapping) and "c_crossattn" in c:
            encoded = [super(LatentInpaintDiffusion, self).get_learned_conditioning(text) for text in c["c_crossattn"]]
            return {**c, "c_crossattn": encoded}
        return super().get_learned_conditioning(c)
