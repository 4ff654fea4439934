"""Stable Diffusion's inpainting models: the network sees the mask and the masked picture beside the noisy latent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ldm.models.diffusion.finetuning import LatentFinetuneDiffusion
from ldm.models.diffusion.gaussian import Condition
from ldm.models.diffusion.stages import images_of


class LatentInpaintDiffusion(LatentFinetuneDiffusion):
    """Latent diffusion under a prompt, a mask (1 to fill) and the picture without what it covers.

    masked_image_key: which of `concat_keys` is an image to encode; the others are resized to the latent.
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str = "masked_image",
        **kwargs: Any,
    ) -> None:
        if masked_image_key not in concat_keys:
            raise ValueError(f"masked_image_key {masked_image_key!r} is not among concat_keys {list(concat_keys)}")
        super().__init__(concat_keys, **kwargs)
        self.masked_image_key = masked_image_key

    def concat_entry(self, key: str, entry: Tensor, size: Sequence[int]) -> Tensor:
        """The masked picture as a latent; the mask (B, 1, H, W) at the latent's `size`."""
        if key == self.masked_image_key:
            entry = entry.to(next(self.first_stage_model.parameters()).dtype)
            return self.get_first_stage_encoding(self.encode_first_stage(entry))
        return super().concat_entry(key, entry, size)

    def _originals(self, batch: Mapping[str, Any], N: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
        z, c, log = super()._originals(batch, N)
        return z, c, log | {"masked_image": images_of(batch, self.masked_image_key, self.device)[:N]}
