"""Checkpoints of a run: which are written and when, and the exact position that a run resumes at."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO
from torch import Tensor, nn

from ldm.checkpoint import read_checkpoint
from ldm.checkpoint.reading import kind_of_file
from ldm.checkpoint.trainer_state import read_state
from ldm.files import PARTIAL, atomic_write
from ldm.training.folders import LAST

logger = logging.getLogger(__name__)

# --------------------------------------------------------------------------------------------- reading and writing


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint plugin: atomic writes, safe reads.

    Files hold tensors and plain values only, since nothing else is read back. Anything else causes one warning.
    """

    def __init__(self) -> None:
        self._warned = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Write `checkpoint`. On failure raises OSError and leaves the file that was there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unreadable: list[str] = []
        plain = _to_plain(checkpoint, "", unreadable)
        if unreadable and not self._warned:
            self._warned = True
            logger.warning(
                "No run can be resumed from %s, which holds objects that are not read back: %s. Save numbers, text and "
                "tensors instead",
                *(path, ", ".join(unreadable[:5])),
            )
        try:
            with atomic_write(path) as partial, partial.open("wb") as file:
                torch.save(plain, file)
        except (OSError, RuntimeError) as error:
            raise _cannot_save(path, error) from error

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a training checkpoint to the CPU. Raises FileNotFoundError or CheckpointError."""
        return read_training_state(path)

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        """Remove a file, if it is there."""
        Path(path).unlink(missing_ok=True)


_WEIGHTS_ONLY = (
    "{0} holds weights, but not the state of a run{1}: resume from last.ckpt, or start a new run from its weights with "
    "model.params.ckpt_path={0}"
)
_TYPES: dict[str, Any] = {
    **{"state_dict": dict, "place": dict, "loops": dict, "callbacks": dict},
    **{"optimizer_states": list, "lr_schedulers": list, "global_step": int, "epoch": int},
}


def read_training_state(path: str | os.PathLike) -> dict[str, Any]:
    """Read all of a training checkpoint, its tensors memory-mapped on the CPU (see `ldm.checkpoint.trainer_state`).

    Raises FileNotFoundError, or ValueError saying what the file is instead, if no run can resume from it.
    """
    path = Path(path)
    if not path.is_file() or kind_of_file(path) != "zip":
        read_checkpoint(path)  # raises what is wrong with the file, unless it holds weights
        raise ValueError(_WEIGHTS_ONLY.format(path, ""))
    checkpoint = read_state(path)
    missing = [key for key in ("place", "loops", "optimizer_states") if key not in checkpoint]
    if missing:
        raise ValueError(_WEIGHTS_ONLY.format(path, f" ({', '.join(missing)})"))
    for key, kind in _TYPES.items():
        if not isinstance(checkpoint.get(key, kind()), kind):
            raise ValueError(f"cannot resume from {path}: its {key} is of type {type(checkpoint[key]).__name__}")
    position = checkpoint["place"]
    numbers = ("epoch", "batch", "total", "logged", "processes")
    if not all(isinstance(position.get(key), int) and 0 <= position[key] < 2**53 for key in numbers):
        raise ValueError(f"cannot resume from {path}: invalid position {str(position)[:200]}")
    return checkpoint


def remove_partial_files(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote a checkpoint."""
    for path in folder.glob(PARTIAL.format(name="*", pid="*")):
        logger.info("Removing %s, which was never completed", path)
        path.unlink(missing_ok=True)


def _cannot_save(path: Path, error: Exception) -> OSError:
    cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
    # torch's writer reports a full disk as a RuntimeError
    code = cause.errno if isinstance(cause, OSError) and cause.errno else errno.ENOSPC
    return OSError(f"cannot write {path.name} to {path.parent}: {os.strerror(code)}")


_READABLE = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, set),
    *(torch.dtype, torch.device, torch.Size),
)


def _to_plain(value: Any, key_path: str, unreadable: list[str]) -> Any:
    """Convert `value` to what `read_state` accepts; what cannot be converted is appended to `unreadable`."""
    if isinstance(value, Mapping):
        return {
            _to_plain(key, key_path, unreadable): _to_plain(
                entry, f"{key_path}.{key}" if key_path else str(key), unreadable
            )
            for key, entry in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(_to_plain(entry, key_path, unreadable) for entry in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return str(value)
    if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
        return _materialized(value)
    is_numeric_array = type(value) is np.ndarray and value.dtype.kind in "biufc"
    if not is_numeric_array and type(value) not in _READABLE:
        unreadable.append(f"a {type(value).__name__} in {key_path}")
    return value


def _materialized(tensor: Tensor) -> Tensor:
    """Resolve lazy conjugation and expanded views; other views keep sharing their storage."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.device.type != "meta" and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return tensor.contiguous()
    return tensor


# --------------------------------------------------------------------------------------------------- exact resume


@dataclass(frozen=True)
class Position:
    """Where a run is: completed epochs, batches of the next one, and batches of a process since the beginning."""

    epoch: int
    batch: int
    total: int


def current_position(trainer: pl.Trainer) -> Position:
    """The position after the last batch that was trained with."""
    loop = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress
    epoch = max(loop.epoch_progress.current.started - 1, 0)  # type: ignore[attr-defined]  # Lightning sets it elsewhere
    batch, total = batches.current.processed, batches.total.processed  # type: ignore[attr-defined]  # Lightning sets it elsewhere
    if batch >= trainer.num_training_batches:
        return Position(epoch + 1, 0, total)
    return Position(epoch, batch, total)


def between_steps(trainer: pl.Trainer) -> bool:
    """Whether no gradients are accumulated: only then does a checkpoint hold the complete state."""
    module = trainer.lightning_module
    # models with manual optimization accumulate themselves
    accumulated = (
        trainer.accumulate_grad_batches
        if module.automatic_optimization
        else getattr(module, "accumulate_grad_batches", 1)
    )
    return current_position(trainer).batch % accumulated == 0


class ExactResume(pl.Callback):
    """Stores the run's position in every checkpoint and makes training resume exactly there.

    Lightning's checkpoints differ by the hook that they are written in, and some resume at another batch than the next
    one. Here all checkpoints of a position are alike.

    Args:
        anyway: Only warn where the run would not resume exactly: another number of batches in an epoch, of processes
            or of optimizers, or inconsistent counters. Otherwise that is a ValueError.
    """

    def __init__(self, anyway: bool = False) -> None:
        self.anyway = anyway
        self._at_epoch_start = False
        self._expected: dict[str, int | float] = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the position, and Lightning's counters for it."""
        position = current_position(trainer)
        logged = _logged_steps(trainer, position)
        checkpoint["epoch"] = position.epoch
        checkpoint["place"] = asdict(position) | {
            "logged": logged,
            "batches": trainer.num_training_batches,
            "processes": trainer.world_size,
        }
        loop = checkpoint["loops"]["fit_loop"]
        loop |= _counters(position, logged)
        for key in [key for key in loop if ".val_loop." in key]:
            del loop[key]  # an interrupted validation starts again

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the position and pass it to the data module."""
        place = checkpoint["place"]
        self._check("processes", place["processes"], trainer.world_size)
        self._check_counters(checkpoint)
        self._expected = {"batches": place["batches"], "optimizers": len(checkpoint["optimizer_states"])}
        self._at_epoch_start = place["batch"] == 0
        trainer.datamodule.start_at(place["epoch"], place["batch"])  # type: ignore[attr-defined]  # Lightning sets it elsewhere
        logger.info("Resuming after %d batches of epoch %d", place["batch"], place["epoch"])

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check the length of an epoch, which is known by now."""
        if self._at_epoch_start:
            trainer.fit_loop.epoch_loop.restarting = False  # a new epoch, not a restarted one
        if self._expected:
            self._check("batches in an epoch", self._expected["batches"], trainer.num_training_batches)
            self._check("optimizers", self._expected["optimizers"], len(trainer.optimizers))
            self._expected = {}

    def _check(self, what: str, before: Any, now: Any) -> None:
        if before == now:
            return
        message = f"the run had {before} {what}, and would now have {now}"
        if not self.anyway:
            raise ValueError(f"{message}: it cannot resume exactly; undo the change, or add --resume_anyway")
        logger.warning("%s: it resumes from its weights, but not with the batches that would have followed", message)

    def _check_counters(self, checkpoint: dict[str, Any]) -> None:
        """Set Lightning's counters to those of the position; releases of Lightning differ in which there are."""
        place, loop = checkpoint["place"], checkpoint["loops"]["fit_loop"]
        expected = _counters(Position(place["epoch"], place["batch"], place["total"]), place["logged"])
        if not loop.keys() >= expected.keys() or not _consistent(loop, expected):
            message = f"the checkpoint's counters contradict its position {place}"
            if not self.anyway:
                raise ValueError(f"{message}: resume from another checkpoint, or add --resume_anyway")
            logger.warning("%s: resuming there anyway", message)
        checkpoint["loops"]["fit_loop"] = _merged(loop, expected)


def _consistent(found: Any, expected: Any) -> bool:
    """Whether two trees of counters agree wherever both have a value."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return all(_consistent(found[key], expected[key]) for key in found.keys() & expected.keys())
    return found == expected


def _merged(found: Any, expected: Any) -> Any:
    """The tree `expected` with the additional entries of `found`."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found | {key: _merged(found.get(key), value) for key, value in expected.items()}
    return expected


def _logged_steps(trainer: pl.Trainer, position: Position) -> int:
    """Lightning's count of batches that ended in an optimizer step: the step of logged metrics."""
    every = trainer.accumulate_grad_batches
    per_epoch = math.ceil(trainer.num_training_batches / every) if trainer.num_training_batches < math.inf else 0
    return position.epoch * per_epoch + math.ceil(position.batch / every)


def _counters(position: Position, steps: int) -> dict[str, Any]:
    """The state of Lightning's fit loop at a position.

    Within an epoch it is that of the hook after a batch, which Lightning completes; between epochs all is complete.
    """
    states = ("ready", "started", "processed", "completed")
    epochs, current, total = (dict.fromkeys(states, n) for n in (position.epoch, position.batch, position.total))
    if position.batch:
        epochs |= {"ready": position.epoch + 1, "started": position.epoch + 1}
        current["completed"] -= 1
        total["completed"] -= 1
        steps -= 1  # Lightning adds the step of that batch when it completes it
    return {
        "epoch_progress": {"total": dict(epochs), "current": dict(epochs)},
        "epoch_loop.batch_progress": {"total": total, "current": current, "is_last_batch": False},
        "epoch_loop.state_dict": {"_batches_that_stepped": steps},
    }


# ------------------------------------------------------------------------------------------ what is written, and when


class Checkpoints(Checkpoint):
    """Writes `last.ckpt`, and named checkpoints of which the best or the newest are retained.

    A checkpoint is only written between optimizer steps, when gradients and averages are settled: as soon as the next
    batch arrives, in validation, or at the end of an epoch, whichever comes first.

    Args:
        dirpath: Folder of the checkpoints.
        filename: Format of the names, with epoch, step and logged metrics.
        monitor: Validation metric that ranks checkpoints; without it, or while it is not logged, the newest rank first.
        mode: "min" or "max": which values of `monitor` are best.
        save_top_k: Number of named checkpoints to retain; -1 for all.
        save_last: Write `last.ckpt` as well.
        every_n_train_steps: Write after so many optimizer steps; by default after every validation, or after every
            `every_n_epochs`-th epoch where there is none.
        every_n_epochs: See there.
        save_weights_only: Leave out optimizers and everything else that only training needs.
        verbose: Log every file.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike,
        filename: str = "{epoch:06}",
        monitor: str | None = None,
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool = True,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        save_weights_only: bool = False,
        verbose: bool = False,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode {mode!r} is not one of min, max")
        if every_n_train_steps and every_n_epochs:
            raise ValueError("every_n_train_steps and every_n_epochs exclude each other")
        self.dirpath = Path(dirpath)
        self.filename = filename
        self.monitor, self.mode = monitor, mode
        self.save_top_k, self.save_last = save_top_k, save_last
        self.every_n_train_steps = every_n_train_steps
        self.every_n_epochs = every_n_epochs or 1
        self.save_weights_only, self.verbose = save_weights_only, verbose
        self.retained: dict[str, float | None] = {}  # file name -> score, oldest first
        # While `last.ckpt` is written: the second name that it gets afterwards, and the file that is deleted for it.
        self._pending: dict[str, Any] = {}
        self._saved_step = 0
        self._due = False

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint."""
        return self._generate_state_key(every_n_train_steps=self.every_n_train_steps, folder=self.dirpath.name)

    def state_dict(self) -> dict[str, Any]:
        """The retained files, and what is pending."""
        return {"kept": dict(self.retained), "next": self._pending}

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Do what was pending, if the process was killed after this file was written."""
        pending = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("next")
        if not pending or not trainer.is_global_zero:
            return
        name, leaving = pending["name"], pending["leaving"]
        if _is_valid_name(name) and trainer.ckpt_path and not (self.dirpath / name).exists():
            _link(Path(trainer.ckpt_path), self.dirpath / name)
        if leaving and _is_valid_name(leaving[0]) and _identity(self.dirpath / leaving[0]) == leaving:
            (self.dirpath / leaving[0]).unlink()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the list of retained files, as far as they exist."""
        self.retained = {
            name: score
            for name, score in state["kept"].items()
            if _is_valid_name(name) and (self.dirpath / name).is_file()
        }

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start from the resumed step: what was saved up to here is not due again."""
        self._saved_step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save here what is due after a batch: only now has the model done all that follows that batch."""
        every = self.every_n_train_steps
        if every and trainer.global_step // every > self._saved_step // every:
            self._due = True
        self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save after a validation, unless steps are counted."""
        if trainer.sanity_checking:
            return
        if not self.every_n_train_steps and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._due = True
        self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save after an epoch, unless validation did."""
        every = self.every_n_train_steps
        if every:
            self._due |= trainer.global_step // every > self._saved_step // every
        elif (trainer.current_epoch + 1) % self.every_n_epochs == 0 and self._score(trainer) is None:
            self._due = True
        self._save_if_due(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write `last.ckpt` where the run ends."""
        if self.save_last and not trainer.fast_dev_run and self._saved_step != trainer.global_step:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            self.save_last_now(trainer)

    def save_last_now(self, trainer: pl.Trainer) -> Path:
        """Write `last.ckpt` and return its path. All processes must call this."""
        path = self.dirpath / LAST
        trainer.save_checkpoint(path, weights_only=self.save_weights_only)
        self._saved_step = trainer.global_step
        return path

    def _score(self, trainer: pl.Trainer) -> float | None:
        metrics = trainer.callback_metrics
        return float(metrics[self.monitor]) if self.monitor is not None and self.monitor in metrics else None

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        if not self._due or trainer.fast_dev_run or not between_steps(trainer):  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            return
        self._due = False
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        score = self._score(trainer)
        leaving = self._worst(score)
        path = None if leaving is False else self._free_path(trainer)
        # the first process decides: its metrics and files count
        score, leaving, path = trainer.strategy.broadcast((score, leaving, path))
        if path is None:
            if self.save_last:
                self.save_last_now(trainer)
            return
        before = dict(self.retained)
        self.retained[path.name] = score
        if leaving:
            self.retained.pop(leaving, None)
        self._pending = {"name": path.name, "leaving": _identity(self.dirpath / leaving) if leaving else None}
        try:
            # `last.ckpt` first: it records what is pending, should the process be killed now
            target = self.dirpath / LAST if self.save_last else path
            trainer.save_checkpoint(target, weights_only=self.save_weights_only)
            self._pending = {}
            self._saved_step = trainer.global_step
            if trainer.is_global_zero:
                if self.save_last:
                    _link(self.dirpath / LAST, path)
                if leaving:
                    (self.dirpath / leaving).unlink(missing_ok=True)
        except BaseException:  # later checkpoints must not list a file that does not exist
            if not path.exists():
                self.retained = before
            raise
        finally:
            self._pending = {}
        if self.verbose:
            logger.info("Saved %s", path)

    def _worst(self, score: float | None) -> str | Literal[False]:
        """The file to delete for one with this score: "" if none has to be, False if the new one is not good enough.

        Files without a score go first, then the worst.
        """
        if self.save_top_k == 0:
            return False
        if self.save_top_k < 0 or len(self.retained) < self.save_top_k:
            return ""
        scores = {name: found for name, found in self.retained.items() if found is not None and not np.isnan(found)}
        unscored = [name for name in self.retained if name not in scores]
        if unscored or score is None:
            return next(iter(unscored or self.retained))
        sign = 1 if self.mode == "min" else -1
        worst = max(scores, key=lambda name: sign * scores[name])
        return worst if sign * score < sign * scores[worst] else False

    def _free_path(self, trainer: pl.Trainer) -> Path:
        """A path that does not exist."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        values |= {"epoch": trainer.current_epoch, "step": trainer.global_step}
        try:
            name = self.filename.format(**values)
        except KeyError as error:
            raise ValueError(
                f"modelcheckpoint.params.filename {self.filename!r}: no metric {error} is logged"
            ) from error
        path = self.dirpath / f"{name}.ckpt"
        if path.exists():
            path = self.dirpath / f"{name}-{trainer.global_step:09}.ckpt"
        number = 1
        while path.exists():
            number += 1
            path = self.dirpath / f"{name}-{trainer.global_step:09}-{number}.ckpt"
        return path


def _is_valid_name(name: Any) -> bool:
    """Whether a name read from a file is that of a checkpoint in the folder, so that it may be created or deleted."""
    return isinstance(name, str) and name == Path(name).name and name.endswith(".ckpt") and name != LAST


def _identity(path: Path) -> list[Any] | None:
    """A file's name, size and time, by which it differs from a later one of that name. None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [path.name, found.st_size, found.st_mtime_ns]


def _link(path: Path, link: Path) -> None:
    """Give a checkpoint a second name, by a hard link where the file system has them, else by a copy."""
    partial = link.with_name(PARTIAL.format(name=link.name, pid=os.getpid()))
    try:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)
        os.replace(partial, link)
    except OSError as error:
        raise _cannot_save(link, error) from error
    finally:
        partial.unlink(missing_ok=True)
