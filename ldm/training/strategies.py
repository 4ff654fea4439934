"""How several processes share the work."""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.strategies import DDPStrategy, Strategy


def choose_strategy(name: str, model: pl.LightningModule, find_unused_parameters: bool = False) -> str | Strategy:
    """Lightning's strategy of that name, set up for models of this kind."""
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=find_unused_parameters)
    return name
