"""Models whose network sees more than the latent in its first convolution, and may start from one that did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.gaussian import Condition
from ldm.models.diffusion.stages import freeze, images_of
from ldm.util import instantiate_from_config

FIRST_CONVOLUTION = (
    "model.diffusion_model.input_blocks.0.0.weight",
    "model_ema.diffusion_modelinput_blocks00weight",
)


class LatentFinetuneDiffusion(LatentDiffusion):
    """Latent diffusion under a prompt and, concatenated to the latent, the entries `concat_keys` of a batch.

    finetune_keys, keep_finetune_dims: of these weights a file that training starts from (`ckpt_path`) may have fewer
    input channels; its first `keep_finetune_dims` are taken and the new ones are zero, so that the network begins as it
    was. None allows that for no weight. c_concat_log_start, c_concat_log_end: channels of what is concatenated that are
    a latent, to be decoded among the pictures of training. stages (not public): configs of further frozen modules, by
    name.
    """

    def __init__(
        self,
        concat_keys: Sequence[str],
        finetune_keys: Sequence[str] | None = FIRST_CONVOLUTION,
        keep_finetune_dims: int = 4,
        c_concat_log_start: int | None = None,
        c_concat_log_end: int | None = None,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        *,
        train_only: Sequence[str] | None = None,
        stages: Mapping[str, Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.concat_keys = tuple(concat_keys)
        self.finetune_keys = tuple(finetune_keys or ())
        self.keep_finetune_dims = keep_finetune_dims
        self.logged_channels = (c_concat_log_start, c_concat_log_end)
        self.frozen_stages = tuple(stages or ())
        for name, config in (stages or {}).items():
            setattr(self, name, freeze(instantiate_from_config(config)))
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)
        if train_only is not None:
            self.train_only(train_only)

    def train(self, mode: bool = True) -> LatentFinetuneDiffusion:
        """As `nn.Module.train`, but frozen stages stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen_stages:
            stage = getattr(self, name)
            if stage is not None:
                stage.eval()
        return self

    def widened_keys(self) -> dict[str, int]:
        """`finetune_keys`, and how many of the file's input channels to take."""
        return dict.fromkeys(self.finetune_keys, self.keep_finetune_dims)

    @torch.no_grad()
    def concat_condition(self, batch: Mapping[str, Any], size: Sequence[int], bs: int | None = None) -> Tensor:
        """The batch's `concat_keys` as one tensor (B, C', h, w) at the latent's `size` (h, w)."""
        entries = ((key, images_of(batch, key, self.device)[:bs]) for key in self.concat_keys)
        return torch.cat([self.concat_entry(key, entry, size) for key, entry in entries], dim=1)

    def concat_entry(self, key: str, entry: Tensor, size: Sequence[int]) -> Tensor:
        """One entry (B, C, H, W) of a batch at the latent's `size`."""
        return F.interpolate(entry, size=tuple(size))

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, bs: int | None = None) -> tuple[Tensor, Any]:
        """(latents, {"c_concat", "c_crossattn"}) of the first `bs` items."""
        z, c = super().get_input(batch, k, bs)
        return z, {"c_concat": [self.concat_condition(batch, z.shape[2:], bs)], "c_crossattn": [c]}

    def _originals(self, batch: Mapping[str, Any], N: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
        z, c, log = super()._originals(batch, N)
        if self.logged_channels != (None, None):
            log["c_concat_decoded"] = self.decode_first_stage(c["c_concat"][0][:, slice(*self.logged_channels)])
        return z, c, log
