"""Callbacks of a run: configs and images in its folder, seeds, progress, throughput, non-finite weights."""

from __future__ import annotations

import logging
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ldm import files
from ldm.images import make_grid, tensor_to_images

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------- start and progress


class SetupCallback(pl.Callback):
    """Writes the run's configs into its folder before it starts, and checks cached data against the model.

    Args:
        resume: Whether the run resumes.
        now: Time stamp in the names of the configs.
        logdir: Folder of the run.
        ckptdir: Folder of checkpoints.
        cfgdir: Folder of configs.
        config: Written as `<now>-project.yaml`.
        lightning_config: Written as `<now>-lightning.yaml`.
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
        """Write the configs."""
        if stage == "fit" and trainer.strategy.restore_checkpoint_after_setup:
            _check_caches(trainer, module)  # later the weights are sharded
        if stage != "fit" or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            return
        for folder in self.folders:
            folder.mkdir(parents=True, exist_ok=True)
        for name, config in self.configs.items():
            content = OmegaConf.to_yaml(OmegaConf.create(dict(config))).encode()
            names = files.numbered(self.folders[-1] / f"{self.now}-{name}.yaml")
            files.write_exclusive(self.folders[-1], names, partial(_write, content))

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check caches. The model has its weights by now, also those of the run that it resumes."""
        if not trainer.strategy.restore_checkpoint_after_setup:
            _check_caches(trainer, module)


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _check_caches(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    for dataset in trainer.datamodule.datasets.values():  # type: ignore[attr-defined]  # Lightning sets it elsewhere
        if hasattr(dataset, "check"):
            dataset.check(module)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar on one line, without its version number."""

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        """Metrics beside the bar."""
        return {name: value for name, value in super().get_metrics(trainer, module).items() if name != "v_num"}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the epoch's bar too, which Lightning leaves out where a run resumes within an epoch."""
        super().on_train_start(trainer, module)
        self.on_train_epoch_start(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Compute the epoch's means in all processes: the first one alone would wait for the others forever."""
        _ = trainer.progress_bar_metrics
        super().on_train_epoch_end(trainer, module)


class CUDACallback(pl.Callback):
    """Logs how long every epoch took and, on a GPU, its peak memory."""

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log the time."""
        if not hasattr(self, "_start"):  # the run resumed within this epoch
            return
        seconds = time.monotonic() - self._start
        memory = ""
        if module.device.type == "cuda":
            memory = f", peak {torch.cuda.max_memory_allocated(module.device) / 2**20:.0f} MiB"
        logger.info("Epoch %d: %.2f seconds%s", trainer.current_epoch, seconds, memory)


# -------------------------------------------------------------------------------------------------------------- seeds

TRAINING, VALIDATION = 0, 1


def seed_all(*key: int) -> None:
    """Seed Python's, numpy's and torch's generators, on every device, from a tuple of numbers."""
    words = np.random.SeedSequence(key).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


class StepSeeds(pl.Callback):
    """Seeds every training batch by its number since the beginning of the run, so that no RNG state needs saving.

    All processes have the same seeds: a model that needs other numbers in each process generates those of all, and
    takes its rows.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Seed a training batch."""
        seed_all(self.seed, TRAINING, trainer.fit_loop.total_batch_idx)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Seed a validation batch: alike in every validation, so that losses can be compared."""
        seed_all(self.seed, VALIDATION, dataloader_idx, batch_idx)


# ---------------------------------------------------------------------------------------------------------- nan guard


class NonFiniteGuard(pl.Callback):
    """Stops a run whose gradients or weights are not finite, so that no checkpoint ever holds such weights.

    Models check their losses; this finds what goes wrong behind a finite loss. It raises FloatingPointError with the
    step and the first module concerned. Weights are also checked before every checkpoint.

    Args:
        every_n_steps: How often to check the gradients, which costs a pass over them. With --precision 16-mixed they
            may overflow, which loss scaling handles, so weights are checked instead.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._steps: Counter[int] = Counter()  # by optimizer

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check every n-th step before it changes weights."""
        if self._steps[id(optimizer)] % self.every_n_steps == 0:
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            self._check(trainer, pl_module, weights, "weight" if scaled else "gradient")
        self._steps[id(optimizer)] += 1

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check the weights before the file is written."""
        self._check(trainer, pl_module, list(pl_module.parameters()), "weight")

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule, weights: list[Tensor], what: str) -> None:
        bad = not all_finite([weight.grad if what == "gradient" else weight for weight in weights])
        if trainer.world_size > 1:  # all stop together, or the others would wait forever
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            raise FloatingPointError(
                f"a {what} is not finite at step {trainer.global_step}: {first_non_finite(module, weights, what)}; "
                "try a lower learning rate, or lightning.trainer.gradient_clip_val=1.0"
            )


@torch.no_grad()
def all_finite(tensors: list[Tensor | None]) -> bool:
    """Whether every value is finite, usually at the cost of reading one number from the device."""
    present = [x.detach() for x in tensors if x is not None and x.numel()]
    # a norm is not finite if a value is not, but also where large values overflow
    return bool(get_total_norm(present).isfinite()) or all(bool(x.isfinite().all()) for x in present)


def first_non_finite(module: nn.Module, weights: list[Tensor], what: str) -> str:
    """Name the first of `weights`, in the order of the modules, that is not finite, and its module's class."""
    checked = {id(weight) for weight in weights}
    for path, part in module.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            value = weight.grad if what == "gradient" else weight
            if id(weight) in checked and not all_finite([value]):
                return f"{path}.{name} ({type(part).__name__}) is the first".lstrip(".")
    return "in another process"


class ThroughputMonitor(pl.Callback):
    """Logs `images_per_second`, and `waiting_for_data`, the fraction of the time spent on loading batches.

    Both are means over the batches since they were last logged, every `log_every_n_steps` of the Trainer, for all
    processes together. Everything but validation counts, also images and checkpoints. The device is not synchronized:
    over many batches the time to queue the work is the time to do it. `waiting_for_data` needs the Trainer's own
    profiler.
    """

    def __init__(self) -> None:
        self._fetching = _Fetching()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Time the loading through the profiler's actions."""
        if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            trainer.profiler = self._fetching  # type: ignore[attr-defined]  # Lightning sets it elsewhere

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._restart()

    def _restart(self) -> None:
        self._batches, self._images, self._start = 0, 0, time.perf_counter()
        self._fetching.seconds = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch, and log every so many."""
        self._batches += 1
        self._images += batch_size(batch) * trainer.world_size
        if self._batches < trainer.log_every_n_steps or not trainer._logger_connector.should_update_logs:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            return
        seconds = time.perf_counter() - self._start
        values = {"images_per_second": self._images / seconds}
        if trainer.profiler is self._fetching:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            values["waiting_for_data"] = self._fetching.seconds / seconds
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step of Lightning's logged metrics
        for board in trainer.loggers:
            board.log_metrics(values, step=step)
        self._restart()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pause the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Continue the clock."""
        if not trainer.sanity_checking:
            self._start += time.perf_counter() - self._paused


class _Fetching(PassThroughProfiler):
    """Adds up the seconds that the training loop spends on getting the next batch."""

    seconds = 0.0
    _start = 0.0

    def start(self, action_name: str) -> None:
        """Start of an action."""
        if action_name.endswith(".train_dataloader_next"):
            self._start = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """End of an action."""
        if action_name.endswith(".train_dataloader_next"):
            self.seconds += time.perf_counter() - self._start


def batch_size(batch: Any) -> int:
    """Number of items in a batch: the length of its first entry that has one."""
    entries = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    return next((len(entry) for entry in entries if hasattr(entry, "__len__")), 0)


# ------------------------------------------------------------------------------------------------------------- images

IMAGE_SEED = 23  # of every call, so that images of two calls differ only by the weights


class ImageLogger(pl.Callback):
    """Writes the model's `log_images` to `<run>/images/{train,val}/{key}_gs-..._e-..._b-....png` and to TensorBoard.

    gs is the step of logged metrics, e the epoch, b the batch of the epoch. Files are never replaced: a run that
    repeats steps adds "_2" to the name. A failure is a warning. Under FSDP, where no process has the complete model,
    there are no images.

    Args:
        batch_frequency: Log every so many training batches, counted from the beginning of the run; of validations the
            first batch, if so many training batches have passed since the last time.
        max_images: Items of the batch to log; 0 for none.
        clamp: Accepted for public configs; values out of range are always clamped.
        increase_log_steps: Also log batches 1, 2, 4, 8 ...
        rescale: Values are in [-1, 1], else in [0, 1].
        disabled: Log nothing.
        log_on_batch_idx: Count from the beginning of the epoch.
        log_first_step: Also log batch 0.
        log_images_kwargs: Further arguments of `log_images`.
        enable_autocast: Accepted for public configs; images are made in the precision of the run.
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
            raise ValueError(
                f"batch_frequency must be at least 1, not {batch_frequency}; to log no images set disabled: true"
            )
        self.batch_frequency = batch_frequency
        self.max_images = max_images
        self.increase_log_steps = increase_log_steps
        self.rescale = rescale
        self.disabled = disabled or max_images < 1
        self.log_on_batch_idx = log_on_batch_idx
        self.log_first_step = log_first_step
        self.log_images_kwargs = dict(log_images_kwargs or {})
        self._validated: int | None = None  # training batches before the last validation images
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        """When validation images were last logged."""
        return {"validated": self._validated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self._validated = state["validated"]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Disable the images under FSDP."""
        if isinstance(trainer.strategy, FSDPStrategy) and not self.disabled:
            logger.warning("No images are logged under FSDP, where no process has the complete model")
            self.disabled = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log training images."""
        if self.check_frequency(batch_idx if self.log_on_batch_idx else trainer.fit_loop.total_batch_idx):
            self.log_img(pl_module, batch, batch_idx, "train")

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log validation images."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or batch_idx > 0 or dataloader_idx > 0:
            return
        batches = trainer.fit_loop.total_batch_idx + 1
        if self._validated is None or batches - self._validated >= self.batch_frequency:
            self._validated = batches
            self.log_img(pl_module, batch, batch_idx, "val")

    def check_frequency(self, check_idx: int) -> bool:
        """Whether to log the training batch of that number, from 0."""
        if check_idx == 0:
            return self.log_first_step
        power_of_two = check_idx & (check_idx - 1) == 0
        return check_idx % self.batch_frequency == 0 or (
            self.increase_log_steps and power_of_two and check_idx < self.batch_frequency
        )

    def log_img(self, pl_module: pl.LightningModule, batch: Any, batch_idx: int, split: str = "train") -> None:
        """Log the images of a batch; `split` is "train" or "val"."""
        trainer = pl_module.trainer
        if self.disabled or not trainer.is_global_zero or not hasattr(pl_module, "log_images"):
            return
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # the step of Lightning's logged metrics
        name = f"gs-{step:06}_e-{trainer.current_epoch:06}_b-{batch_idx:06}"
        try:
            for key, grid in self._grids(trainer, pl_module, batch, split).items():
                write_image(grid, _save_dir(trainer) / "images" / split, f"{key}_{name}")
                for board in trainer.loggers:
                    if isinstance(board, TensorBoardLogger):
                        board.experiment.add_image(f"{split}/{key}", np.asarray(grid), step, dataformats="HWC")
        except Exception as error:  # whatever it is, hours of training are worth more than an image
            text = f"{type(error).__name__}: {error}".partition("\n")[0]
            if not self._warned:
                logger.warning("Cannot log the images of step %d (%s): training continues without", step, text)
            self._warned = True

    def _grids(self, trainer: pl.Trainer, pl_module: Any, batch: Any, split: str) -> dict[str, Image.Image]:
        options = {"N": self.max_images, **self.log_images_kwargs}
        precision = trainer.precision_plugin.forward_context()
        gpus = [pl_module.device] if pl_module.device.type == "cuda" else []
        with _eval_mode(pl_module), torch.no_grad(), torch.random.fork_rng(gpus), precision:
            torch.manual_seed(IMAGE_SEED)
            images = pl_module.log_images(batch, split=split, **options)
        return {key: self.grid(x) for key, x in images.items()}

    def grid(self, x: Tensor) -> Image.Image:
        """Arrange the first images of x (B, 1 or 3, H, W) in rows of four, 2 pixels apart."""
        x = x[: self.max_images].detach().float()
        x = x if self.rescale else 2.0 * x - 1.0
        return make_grid(tensor_to_images(x.expand(-1, 3, -1, -1)), nrow=4, padding=2)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for all modules, then the mode that each had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _save_dir(trainer: pl.Trainer) -> Path:
    folders = [board.save_dir for board in trainer.loggers if board.save_dir]
    return Path(folders[0] if folders else trainer.default_root_dir)


def write_image(image: Image.Image, folder: Path, stem: str) -> Path:
    """Write `folder`/`stem`.png, or `stem`_2.png if that exists, and so on, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    names = files.numbered(folder / f"{stem}.png", "_")
    return files.write_exclusive(folder, names, lambda file: image.save(file, format="PNG"))
