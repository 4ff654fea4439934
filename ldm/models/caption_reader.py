"""Pre-training of a small text encoder, in place of CLIP's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.training import lr_schedules
from ldm.util import instantiate_from_config


class CaptionReader(pl.LightningModule):
    """A text encoder with a linear classifier on its end token for each attribute that a caption can state.

    Noise predictions teach a text encoder little language, so Stable Diffusion starts from CLIP's encoder and a small
    model from this one. Batches hold `caption`, B strings, and `attributes`, (B, K) int64. The checkpoint's
    `cond_stage_model.*` are the weights that `FrozenCLIPEmbedder(ckpt_path=...)` loads.

    Args:
        cond_stage_config: the text encoder.
        classes: number of values of each of the K attributes.
        width: output channels of the encoder.
        scheduler_config: learning-rate schedule.
    """

    learning_rate: float  # set by the training script

    def __init__(
        self,
        cond_stage_config: Mapping[str, Any],
        classes: Sequence[int],
        width: int,
        monitor: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.scheduler_config = scheduler_config
        self.cond_stage_model = instantiate_from_config(cond_stage_config)
        self.cond_stage_model.requires_grad_(True)
        self.classes = list(classes)
        self.head = nn.Linear(width, sum(self.classes))
        if monitor is not None:
            self.monitor = monitor

    def forward(self, captions: Sequence[str]) -> list[Tensor]:
        """B captions to the logits of each attribute, K of (B, classes[k])."""
        states = self.cond_stage_model.encode(captions)  # (B, L, D)
        # captions are padded with end tokens, and attention is causal: the last one has seen everything
        return list(self.head(states[:, -1]).split(self.classes, dim=1))

    def shared_step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        """Sum of the attributes' cross-entropies; logs it, and the fraction of captions with every attribute right."""
        logits, attributes = self(batch["caption"]), batch["attributes"]  # (B, K)
        losses = [F.cross_entropy(logit, attributes[:, k]) for k, logit in enumerate(logits)]
        loss = torch.stack(losses).sum()
        right = torch.stack([logit.argmax(1) == attributes[:, k] for k, logit in enumerate(logits)]).all(0)
        size = len(attributes)
        self.log_dict({f"{split}/loss": loss, f"{split}/read": right.float().mean()}, prog_bar=True, batch_size=size)
        return loss

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of a training batch."""
        return self.shared_step(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log the loss of a validation batch."""
        self.shared_step(batch, "val")

    def configure_optimizers(self) -> Any:
        """AdamW at `self.learning_rate`, with `scheduler_config` at every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3)
        return [optimizer], lr_schedules([optimizer], self.scheduler_config)
