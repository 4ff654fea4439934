"""Stable Diffusion's depth-to-image model: the network sees a depth map beside the noisy latent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion.finetuning import LatentFinetuneDiffusion
from ldm.models.diffusion.gaussian import Condition
from ldm.models.diffusion.stages import images_of
from ldm.modules.midas.api import fit

logger = logging.getLogger(__name__)

WAY_OUT = "model.params.depth_stage_config.params.path takes weights of MiDaS"


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Latent diffusion under a prompt and a depth map, whose one channel from -1 (far) to 1 (near) joins the latent.

    depth_stage_config: the estimator, `MiDaSInference`. It becomes `depth_model`, which is None where neither the
    checkpoint nor its own `path` brought weights. concat_keys: the one entry of a batch that depth comes from, pictures
    (B, H, W, 3) to estimate it of, or depth itself, (B, H, W) or (B, H, W, 1). Without it the picture to learn serves.
    """

    optional_parts = ("depth_model",)  # to `fill_model`: some fine-tunes were saved without it

    depth_model: Any  # what `depth_stage_config` makes, or None

    def __init__(
        self, depth_stage_config: Mapping[str, Any], concat_keys: Sequence[str] = ("midas_in",), **kwargs: Any
    ) -> None:
        if len(concat_keys) != 1:
            raise ValueError(f"concat_keys names the one entry that depth comes from, not {list(concat_keys)}")
        super().__init__(concat_keys, stages={"depth_model": depth_stage_config}, **kwargs)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> list[str]:
        """As of every model; an estimator that has weights from nowhere goes, for its depth would be noise."""
        missing = super().init_from_ckpt(path, ignore_keys, only_model)
        brought = not only_model and not any(key.startswith("depth_model.") for key in missing)
        filled_later = any(parameter.is_meta for parameter in self.depth_model.parameters())
        if not brought and not filled_later and self.depth_model.path is None:
            logger.warning("%s brings no weights to estimate depth with: batches must hold depth; or %s", path, WAY_OUT)
            self.depth_model = None
        return missing

    @torch.no_grad()
    def estimate_depth(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to their relative depth (B, 1, H', W'), larger is nearer.

        Raises ValueError if the model came without weights for that.
        """
        if self.depth_model is None:
            raise ValueError(
                "this model's checkpoint has no weights to estimate depth with (depth_model.*): give the depth itself, "
                f"as a picture (--depth) or as the batch's {self.concat_keys[0]!r}; or in the config {WAY_OUT}"
            )
        return self.depth_model(fit(images))

    @torch.no_grad()
    def depth_condition(self, depth: Tensor, size: Sequence[int]) -> Tensor:
        """Depth (B, 1, H, W) of any scale, larger is nearer, as the network takes it: (B, 1, h, w) at `size` (h, w).

        Each map is scaled to [-1, 1] after it was resized; a flat one is -1.
        """
        depth = F.interpolate(depth.float(), size=tuple(size), mode="bicubic", align_corners=False)
        low, high = depth.amin(dim=(1, 2, 3), keepdim=True), depth.amax(dim=(1, 2, 3), keepdim=True)
        span = torch.where(high > low, high - low, 1.0)
        return 2.0 * (depth - low) / span - 1.0

    @torch.no_grad()
    def concat_condition(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> Tensor:
        """The depth (B, 1, h, w) of a batch's pictures at the latent's `size` (h, w)."""
        (key,) = self.concat_keys
        entry = images_of(batch, key if key in batch else self.first_stage_key, self.device)[:bs]
        depth = entry if entry.shape[1] == 1 else self.estimate_depth(entry)
        return self.depth_condition(depth, size)

    def _originals(self, batch: Mapping[str, Any], N: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
        z, c, log = super()._originals(batch, N)
        depth = F.interpolate(c["c_concat"][0], size=log["reconstruction"].shape[2:])
        return z, c, log | {"depth": depth.expand(-1, 3, -1, -1)}
