"""Every draw of a step follows from the run's seed and the step's number: no random state needs to be saved."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

TRAINING, VALIDATION = 0, 1


def seed_draws(*key: int) -> None:
    """Start Python's, numpy's and torch's random numbers, on every device, from a tuple of numbers."""
    words = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


class StepSeeds(pl.Callback):
    """Seeds every batch of training by its number since the beginning of the run, and of validation by its place.

    All processes alike: a model that draws for each process something else draws for all of them, and takes its share.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Lightning's hook."""
        seed_draws(self.seed, TRAINING, trainer.fit_loop.total_batch_idx)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Lightning's hook: the same draws in every validation, so that their losses can be compared."""
        seed_draws(self.seed, VALIDATION, dataloader_idx, batch_idx)
