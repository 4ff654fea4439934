"""Pictures of what a model does while it trains, in files as the public code lays them out, and in TensorBoard."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from ldm import files
from ldm.images import make_grid, tensor_to_images
from ldm.models.diffusion.distributed_rng import seeded

logger = logging.getLogger(__name__)

SEED = 23  # of every call, so that the pictures of two calls differ by what was learnt in between


class ImageLogger(pl.Callback):
    """Has the model draw its `log_images` now and then: `<run>/images/{train,val}/{key}_gs-..._e-..._b-....png`.

    gs is the step that metrics are logged under, e the epoch, b the batch of the epoch. A file that exists is never
    replaced: a run that goes over the same steps again adds "_2" to the name.

    batch_frequency: draw every so many batches of training, counted from the beginning of the run, micro-batches and
    all optimisers alike; in validation from its first batch, once so many batches of training have passed since the
    last time. max_images: items of the batch; 0 for none. clamp: kept for public configs; values too large for a
    picture are cut off either way. increase_log_steps: draw at batches 1, 2, 4, 8 ... too. rescale: values are from -1
    to 1, else from 0 to 1. disabled: draw nothing. log_on_batch_idx: count from the beginning of the epoch.
    log_first_step: draw at batch 0 too. log_images_kwargs: passed on to `log_images`. enable_autocast: kept for public
    configs; pictures are made in the precision of the run.

    Pictures that cannot be made or written cost a warning, not the run. Under FSDP, where no process has all of the
    model, there are none.
    """

    def __init__(
        self,
        batch_frequency: int = 750,
        max_images: int = 4,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
        enable_autocast: bool = True,
    ) -> None:
        if batch_frequency < 1:
            raise ValueError(f"batch_frequency must be at least 1, not {batch_frequency}; disabled: true draws nothing")
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.increase_log_steps = increase_log_steps
        self.rescale = rescale
        self.disabled = disabled or max_images < 1
        self.log_on_batch_idx = log_on_batch_idx
        self.log_first_step = log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self._validated: int | None = None  # batches of training before the last pictures of validation
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """Lightning's hook."""
        return {"validated": self._validated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lightning's hook."""
        self._validated = state["validated"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning's hook."""
        if isinstance(trainer.strategy, FSDPStrategy) and not self.disabled:
            logger.warning("No pictures are drawn under FSDP, where no process has all of the model")
            self.disabled = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        if self.is_due(batch_idx if self.log_on_batch_idx else trainer.fit_loop.total_batch_idx):
            self.draw(trainer, pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Lightning's hook."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or batch_idx > 0 or dataloader_idx > 0:
            return
        batches = trainer.fit_loop.total_batch_idx + 1
        if self._validated is None or batches - self._validated >= self.batch_frequency:
            self._validated = batches
            self.draw(trainer, pl_module, batch, batch_idx, "val")

    def is_due(self, number: int) -> bool:
        """Whether the training batch of that number, from 0, is to be drawn."""
        if number == 0:
            return self.log_first_step
        power_of_two = number & (number - 1) == 0
        return number % self.batch_frequency == 0 or (
            self.increase_log_steps and power_of_two and number < self.batch_frequency
        )

    def draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, split: str) -> None:
        """Draw and write the pictures of a batch; `split` is "train" or "val"."""
        if self.disabled or not trainer.is_global_zero or not hasattr(pl_module, "log_images"):
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # what Lightning's loggers call the step
        name = f"gs-{step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
        try:
            for key, grid in self._grids(trainer, pl_module, batch, split).items():
                write_new(grid, _save_dir(trainer) / "images" / split, f"{key}_{name}")
                for board in trainer.loggers:
                    if isinstance(board, TensorBoardLogger):
                        board.experiment.add_image(f"{split}/{key}", np.asarray(grid), step, dataformats="HWC")
        except Exception as error:  # whatever it is, hours of training are worth more than a picture
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            if not self._warned:
                logger.warning("Pictures of step %d cannot be drawn (%s): training goes on without", step, text)
            self._warned = True

    def _grids(self, trainer: pl.Trainer, pl_module: Any, batch: Any, split: str) -> dict[str, Image.Image]:
        options = {"N": self.max_images, **self.log_images_kwargs}
        precision = trainer.precision_plugin.forward_context()
        with _evaluating(pl_module), torch.no_grad(), seeded(SEED, pl_module.device), precision:
            pictures = pl_module.log_images(batch, split=split, **options)
        return {key: self.grid(x) for key, x in pictures.items()}

    def grid(self, x: Tensor) -> Image.Image:
        """The first pictures of x (B, 1 or 3, H, W), in rows of four, 2 pixels apart."""
        x = x[: self.max_images].detach().float()
        x = x if self.rescale else 2.0 * x - 1.0
        return make_grid(tensor_to_images(x.expand(-1, 3, -1, -1)), nrow=4, padding=2)


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Within it all parts of `module` are in evaluation mode; afterwards each is in its own again."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _save_dir(trainer: pl.Trainer) -> Path:
    places = [board.save_dir for board in trainer.loggers if board.save_dir]
    return Path(places[0] if places else trainer.default_root_dir)


def write_new(image: Image.Image, folder: Path, stem: str) -> Path:
    """Write `folder`/`stem`.png, or `stem`_2.png if that is taken, and so on; an incomplete file does not stay."""
    folder.mkdir(parents=True, exist_ok=True)
    names = files.numbered(folder / f"{stem}.png", "_")
    return files.write_exclusive(folder, names, lambda file: image.save(file, format="PNG"))
