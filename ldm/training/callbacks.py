"""What the public script's smaller callbacks do: configs written at the start, times; and the progress bar."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import TQDMProgressBar

from ldm.files import numbered, write_exclusive

logger = logging.getLogger(__name__)


class SetupCallback(pl.Callback):
    """Writes what the run is into its folder before it starts, and checks cached data against the model.

    resume: whether the run goes on. now: the time in the names of the configs. logdir, ckptdir, cfgdir: the run's
    folder, and those of checkpoints and configs. config, lightning_config: what is written as `<now>-project.yaml` and
    `<now>-lightning.yaml`.
    """

    def __init__(
        self,
        resume: bool,
        now: str,
        logdir: str | Path,
        ckptdir: str | Path,
        cfgdir: str | Path,
        config: Mapping[str, Any],
        lightning_config: Mapping[str, Any],
    ) -> None:
        self.resume, self.now = resume, now
        self.folders = [Path(place) for place in (logdir, ckptdir, cfgdir)]
        self.configs = {"project": config, "lightning": {"lightning": lightning_config}}

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Lightning's hook."""
        if stage == "fit" and trainer.strategy.restore_checkpoint_after_setup:
            _check_caches(trainer, module)  # later the weights are in pieces
        if stage != "fit" or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            return
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
        for name, config in self.configs.items():
            content = OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode()
            names = numbered(self.folders[-1] / f"{self.now}-{name}.yaml")
            write_exclusive(self.folders[-1], names, partial(_write, content))

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lightning's hook. The model has its weights by now, also those of the run that it goes on with."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            _check_caches(trainer, module)


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _check_caches(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    for dataset in trainer.datamodule.datasets.values():  # type: ignore[attr-defined]  # Lightning sets it elsewhere
        if hasattr(dataset, "check"):
            dataset.check(module)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar on one line, without the number that it gives to runs."""

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Lightning's hook."""
        return {name: value for name, value in super().get_metrics(trainer, module).items() if name != "v_num"}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lightning's hook."""
        super().on_train_start(trainer, module)
        self.on_train_epoch_start(trainer, module)  # which Lightning leaves out where a run goes on within an epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lightning's hook."""
        # The means of an epoch over all processes: the bar of the first one alone would wait for the others' shares.
        _ = trainer.progress_bar_metrics
        super().on_train_epoch_end(trainer, module)


class CUDACallback(pl.Callback):
    """Logs how long every epoch took and, on a GPU, the most memory that it held."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self._start = time.monotonic()
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lightning's hook."""
        if not hasattr(self, "_start"):  # the run went on in the middle of this epoch
            return
        seconds = time.monotonic() - self._start
        if module.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(module.device) / 2**20
            logger.info("Epoch %d: %.2f seconds, at most %.0f MiB", trainer.current_epoch, seconds, memory)
        else:
            logger.info("Epoch %d: %.2f seconds", trainer.current_epoch, seconds)
