"""The place that a run is at: found from the Trainer's counters, kept in checkpoints, taken up again exactly.

Lightning's own checkpoints differ by the hook that they are written in, and some of them go on at another batch than
the one that follows. Here every checkpoint of a place says the same: so many epochs, so many batches of the next one.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a run is: whole epochs behind it, batches of the next one, and batches of a process since the beginning."""

    epoch: int
    batch: int
    total: int


def place_of(trainer: pl.Trainer) -> Place:
    """The place after the last batch that was trained with, between any two of them."""
    loop = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress
    epoch = max(loop.epoch_progress.current.started - 1, 0)  # type: ignore[attr-defined]  # Lightning sets it elsewhere
    batch, total = batches.current.processed, batches.total.processed  # type: ignore[attr-defined]  # Lightning sets it elsewhere
    return Place(epoch + 1, 0, total) if batch >= trainer.num_training_batches else Place(epoch, batch, total)


def accumulation(trainer: pl.Trainer) -> int:
    """How many batches make one optimiser step. Models that optimise by hand keep the number themselves."""
    module = trainer.lightning_module
    if module.automatic_optimization:
        return trainer.accumulate_grad_batches
    return getattr(module, "accumulate_grad_batches", 1)


def between_steps(trainer: pl.Trainer) -> bool:
    """Whether no gradients are waiting for more batches: only then does a checkpoint hold all that there is."""
    return place_of(trainer).batch % accumulation(trainer) == 0


class ContinueExactly(pl.Callback):
    """Puts the run's place into every checkpoint, in the one form that leads back to it, and lets training start there.

    Raises ValueError for a checkpoint whose epochs are of another length, or cut for another number of processes;
    with `anyway` it logs a warning instead.
    """

    def __init__(self, anyway: bool = False) -> None:
        self.anyway = anyway
        self._fresh_epoch = False

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook."""
        place = place_of(trainer)
        logged = _steps_logged(trainer, place)
        checkpoint["epoch"] = place.epoch
        checkpoint["place"] = {
            "epoch": place.epoch,
            "batch": place.batch,
            "total": place.total,
            "logged": logged,
            "batches": trainer.num_training_batches,
            "processes": trainer.world_size,
        }
        checkpoint["loops"]["fit_loop"] |= _counters(place, logged)
        for key in [key for key in checkpoint["loops"]["fit_loop"] if ".val_loop." in key]:
            del checkpoint["loops"]["fit_loop"][key]  # a validation that was cut off starts again

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook."""
        place = checkpoint["place"]
        self._check("processes", place["processes"], trainer.world_size)
        self._check_counters(checkpoint)
        self._batches, self._optimizers = place["batches"], len(checkpoint["optimizer_states"])
        self._fresh_epoch = place["batch"] == 0
        trainer.datamodule.start_at(place["epoch"], place["batch"])  # type: ignore[attr-defined]  # Lightning sets it elsewhere
        logger.info("Going on after %d batches of epoch %d", place["batch"], place["epoch"])

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lightning's hook, after the loops have taken up their counters."""
        if self._fresh_epoch:
            trainer.fit_loop.epoch_loop.restarting = False  # an epoch that starts is not one that restarts
        if getattr(self, "_batches", None) is not None:
            self._check("batches in an epoch", self._batches, trainer.num_training_batches)
            self._check("optimizers", self._optimizers, len(trainer.optimizers))
            self._batches = None

    def _check(self, what: str, before: Any, now: Any) -> None:
        if before == now:
            return
        message = f"the run had {before} {what}, and would now have {now}"
        if not self.anyway:
            raise ValueError(f"{message}: it would not go on as it was; mend that, or add --resume_anyway")
        logger.warning("%s: it goes on from its weights, but not with the batches that would have followed", message)

    def _check_counters(self, checkpoint: dict[str, Any]) -> None:
        """Make Lightning's counters those of the place; ones that the file does not know are added.

        ValueError if it has another value of one, unless the run goes on anyway.
        """
        place, loop = checkpoint["place"], checkpoint["loops"]["fit_loop"]
        expected = _counters(Place(place["epoch"], place["batch"], place["total"]), place["logged"])
        if not loop.keys() >= expected.keys() or not _agree(loop, expected):
            message = f"the checkpoint's counters say another place than {place}"
            if not self.anyway:
                raise ValueError(f"{message}: resume from another checkpoint, or add --resume_anyway")
            logger.warning("%s: it goes on from there, whatever they say", message)
        checkpoint["loops"]["fit_loop"] = _with(loop, expected)


def _agree(found: Any, expected: Any) -> bool:
    """Whether two trees of counters have the same values wherever both have one."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return all(_agree(found[key], expected[key]) for key in found.keys() & expected.keys())
    return found == expected


def _with(found: Any, expected: Any) -> Any:
    """The tree `expected`, and what `found` has beside."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found | {key: _with(found.get(key), value) for key, value in expected.items()}
    return expected


def _steps_logged(trainer: pl.Trainer, place: Place) -> int:
    """Lightning's count of batches that ended in an optimiser step, which metrics are written by."""
    every = trainer.accumulate_grad_batches
    per_epoch = math.ceil(trainer.num_training_batches / every) if trainer.num_training_batches < math.inf else 0
    return place.epoch * per_epoch + math.ceil(place.batch / every)


def _counters(place: Place, steps: int) -> dict[str, Any]:
    """The state of Lightning's fit loop at a place.

    In an epoch: as in the hook after a batch, which Lightning knows to complete. Between two: all is complete.
    """
    epochs = {"ready": place.epoch, "started": place.epoch, "processed": place.epoch, "completed": place.epoch}
    current = {"ready": place.batch, "started": place.batch, "processed": place.batch, "completed": place.batch}
    total = {"ready": place.total, "started": place.total, "processed": place.total, "completed": place.total}
    if place.batch:
        epochs |= {"ready": place.epoch + 1, "started": place.epoch + 1}
        current["completed"] -= 1
        total["completed"] -= 1
        steps -= 1  # Lightning adds the step of that batch when it completes it
    return {
        "epoch_progress": {"total": dict(epochs), "current": dict(epochs)},
        "epoch_loop.batch_progress": {"total": total, "current": current, "is_last_batch": False},
        "epoch_loop.state_dict": {"_batches_that_stepped": steps},
    }
