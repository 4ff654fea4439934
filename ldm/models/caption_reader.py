"""A text encoder taught to read: what a small diffusion model has in place of CLIP's pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.lightning import pl
from ldm.util import instantiate_from_config


class CaptionReader(pl.LightningModule):
    """A text encoder with a linear classifier on its end token for each attribute that a caption can state.

    Stable Diffusion starts from a text encoder that CLIP has taught to read, and cannot be expected to learn language
    from noise predictions; neither can a small model. Batches hold `caption`, B strings, and `attributes`, (B, K)
    int64. The checkpoint's `cond_stage_model.*` are what `FrozenCLIPEmbedder(ckpt_path=...)` takes from it.

    cond_stage_config: the text encoder. classes: the number of values of each of the K attributes. width: the encoder's
    output channels. scheduler_config: of the learning rate, as diffusion models take it.
    """

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
        # Every caption is padded with end tokens, and the last one has seen the whole caption.
        return list(self.head(states[:, -1]).split(self.classes, dim=1))

    def shared_step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        """Sum of the attributes' cross-entropies; logs it, and the share of captions read without a mistake."""
        logits, attributes = self(batch["caption"]), batch["attributes"]  # (B, K)
        losses = [F.cross_entropy(logit, attributes[:, k]) for k, logit in enumerate(logits)]
        loss = torch.stack(losses).sum()
        read = torch.stack([logit.argmax(1) == attributes[:, k] for k, logit in enumerate(logits)]).all(0)
        size = len(attributes)
        self.log_dict({f"{split}/loss": loss, f"{split}/read": read.float().mean()}, prog_bar=True, batch_size=size)
        return loss

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Lightning's hook."""
        return self.shared_step(batch, "train")

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Lightning's hook."""
        self.shared_step(batch, "val")

    learning_rate: float  # set from outside

    def configure_optimizers(self) -> Any:
        """Lightning's hook: AdamW at `self.learning_rate`, with the config's schedule every step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3)
        if self.scheduler_config is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, instantiate_from_config(self.scheduler_config).schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
