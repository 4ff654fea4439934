"""What watches a run: weights and gradients that are no longer finite, and where its time goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import PassThroughProfiler
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


class NonFiniteGuard(pl.Callback):
    """Ends a run whose gradients or weights are not finite, so that no checkpoint ever holds such weights.

    Models check their losses; this finds what goes wrong behind a finite loss. every_n_steps: how often to look at the
    gradients, which costs a pass over them. With --precision 16-mixed they may overflow now and then, which its loss
    scaling mends, so weights are looked at instead. Weights are looked at before every checkpoint, too.

    Raises FloatingPointError, naming the step and the first module concerned.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._steps: Counter[int] = Counter()  # of every optimiser

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Lightning's hook."""
        if self._steps[id(optimizer)] % self.every_n_steps == 0:
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            self._check(trainer, pl_module, weights, "weight" if scaled else "gradient")
        self._steps[id(optimizer)] += 1

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning's hook, before the file is written."""
        self._check(trainer, pl_module, list(pl_module.parameters()), "weight")

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule, weights: list[Tensor], what: str) -> None:
        bad = not all_finite([weight.grad if what == "gradient" else weight for weight in weights])
        if trainer.world_size > 1:  # all processes stop together, or the others would wait for this one forever
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            raise FloatingPointError(
                f"a {what} is not finite at step {trainer.global_step}: {first_non_finite(module, weights, what)}; "
                "try a lower learning rate, or lightning.trainer.gradient_clip_val=1.0"
            )


@torch.no_grad()
def all_finite(tensors: list[Tensor | None]) -> bool:
    """Whether every value is finite; reads one number from the device, unless it has to look more closely."""
    present = [x.detach() for x in tensors if x is not None and x.numel()]
    # A norm is not finite if some value is not, but also where large values overflow.
    return bool(get_total_norm(present).isfinite()) or all(bool(x.isfinite().all()) for x in present)


def first_non_finite(module: nn.Module, weights: list[Tensor], what: str) -> str:
    """The name of the first of `weights`, in the order of the modules, that is spoilt, with the kind of its module."""
    among = {id(weight) for weight in weights}
    for path, part in module.named_modules():
        for name, weight in part.named_parameters(recurse=False):
            value = weight.grad if what == "gradient" else weight
            if id(weight) in among and not all_finite([value]):
                return f"{path}.{name} ({type(part).__name__}) is the first".lstrip(".")
    return "in another process"


class ThroughputMonitor(pl.Callback):
    """Logs `images_per_second`, and `waiting_for_data`, the share of the time spent on getting batches.

    Both are means over the batches since they were last logged, every `log_every_n_steps` of the Trainer, for all
    processes together. All that training takes is counted, pictures and checkpoints too, but for validation. Nothing
    waits for the device: over many batches the time that a CPU takes to hand out work is the time to do it. With a
    profiler of one's own there is no `waiting_for_data`.
    """

    def __init__(self) -> None:
        self._fetching = _Fetching()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning's hook."""
        if type(trainer.profiler) is PassThroughProfiler:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            trainer.profiler = self._fetching  # type: ignore[attr-defined]  # Lightning sets it elsewhere

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self._restart()

    def _restart(self) -> None:
        self._batches, self._images, self._start = 0, 0, time.perf_counter()
        self._fetching.seconds = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        self._batches += 1
        self._images += batch_size(batch) * trainer.world_size
        if self._batches < trainer.log_every_n_steps or not trainer._logger_connector.should_update_logs:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            return
        seconds = time.perf_counter() - self._start
        values = {"images_per_second": self._images / seconds}
        if trainer.profiler is self._fetching:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            values["waiting_for_data"] = self._fetching.seconds / seconds
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # what Lightning's loggers call the step
        for board in trainer.loggers:
            board.log_metrics(values, step=step)
        self._restart()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Lightning's hook: validation does not count."""
        if not trainer.sanity_checking:
            self._start += time.perf_counter() - self._paused


class _Fetching(PassThroughProfiler):
    """Adds up the seconds that Lightning's training loop spends on getting the next batch."""

    seconds = 0.0
    _start = 0.0

    def start(self, action_name: str) -> None:
        """Lightning's hook."""
        if action_name.endswith(".train_dataloader_next"):
            self._start = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Lightning's hook."""
        if action_name.endswith(".train_dataloader_next"):
            self.seconds += time.perf_counter() - self._start


def batch_size(batch: Any) -> int:
    """Items of a batch: the length of its first entry that has one."""
    entries = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    return next((len(entry) for entry in entries if hasattr(entry, "__len__")), 0)
