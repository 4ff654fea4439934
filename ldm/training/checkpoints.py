"""Which checkpoints a run writes, and when; each file whole or not there at all."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Mapping
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
from ldm.training.resume import between_steps

logger = logging.getLogger(__name__)


class WholeFiles(CheckpointIO):
    """Lightning's reading and writing of checkpoints, by way of a second file that takes the name when it is complete.

    What is written holds tensors and plain values only, for nothing else is read back. Where something else is left,
    a warning says so, once.
    """

    def __init__(self) -> None:
        self._warned = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any = None) -> None:
        """Write `checkpoint`. Raises OSError, and leaves the file that was there before, if that does not work out."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        strange: list[str] = []
        plain = _plain(checkpoint, "", strange)
        if strange and not self._warned:
            self._warned = True
            logger.warning(
                "No run can be resumed from %s, which holds what is not read back: %s. Keep numbers, text and tensors "
                "in their place",
                *(path, ", ".join(strange[:5])),
            )
        try:
            with atomic_write(path) as partial, partial.open("wb") as file:
                torch.save(plain, file)
        except (OSError, RuntimeError) as error:
            raise _cannot_save(path, error) from error

    def load_checkpoint(
        self, path: str | os.PathLike, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """A whole checkpoint, on the CPU. Raises FileNotFoundError or CheckpointError for a file that is none."""
        return read_training_state(path)

    def remove_checkpoint(self, path: str | os.PathLike) -> None:
        """Remove a file, if it is there."""
        Path(path).unlink(missing_ok=True)


def read_training_state(path: str | os.PathLike) -> dict[str, Any]:
    """All that a checkpoint of a run holds, tensors memory-mapped on the CPU (see `ldm.checkpoint.trainer_state`).

    Raises FileNotFoundError, or ValueError saying what it is instead, if a run cannot go on from the file.
    """
    path = Path(path)
    if not path.is_file() or kind_of_file(path) != "zip":
        read_checkpoint(path)  # says what is wrong with the file, if it is not just weights
        raise ValueError(_WEIGHTS_ONLY.format(path, ""))
    checkpoint = read_state(path)
    missing = [key for key in ("place", "loops", "optimizer_states") if key not in checkpoint]
    if missing:
        raise ValueError(_WEIGHTS_ONLY.format(path, f" ({', '.join(missing)})"))
    for key, kind in _KINDS.items():
        if not isinstance(checkpoint.get(key, kind()), kind):
            raise ValueError(f"{path} cannot be gone on from: its {key} is of type {type(checkpoint[key]).__name__}")
    place = checkpoint["place"]
    if not all(isinstance(place.get(key), int) and 0 <= place[key] < 2**53 for key in _PLACE):
        raise ValueError(f"{path} cannot be gone on from: it says of its place in the run {str(place)[:200]}")
    return checkpoint


_WEIGHTS_ONLY = (
    "{0} holds weights, but not the state of a run{1}: resume from last.ckpt, or start a new run from its weights with "
    "model.params.ckpt_path={0}"
)
_KINDS: dict[str, Any] = {
    **{"state_dict": dict, "place": dict, "loops": dict, "callbacks": dict},
    **{"optimizer_states": list, "lr_schedulers": list, "global_step": int, "epoch": int},
}
_PLACE = ("epoch", "batch", "total", "logged", "processes")


def remove_partial_files(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote a checkpoint."""
    for path in folder.glob(PARTIAL.format(name="*", pid="*")):
        logger.info("Removing %s, which was never completed", path)
        path.unlink(missing_ok=True)


def _cannot_save(path: Path, error: Exception) -> OSError:
    cause = error if isinstance(error, OSError) else error.__cause__ or error.__context__
    # torch's writer reports a full disk in words of its own
    code = cause.errno if isinstance(cause, OSError) and cause.errno else errno.ENOSPC
    return OSError(f"cannot write {path.name} to {path.parent}: {os.strerror(code)}")


def _plain(value: Any, at: str, strange: list[str]) -> Any:
    """`value` made of nothing that `read_state` refuses, as far as that is possible; `strange` gets what is, and where.

    at: the keys that lead to the value.
    """
    if isinstance(value, Mapping):
        return {
            _plain(key, at, strange): _plain(entry, f"{at}.{key}" if at else str(key), strange)
            for key, entry in value.items()
        }
    if type(value) in (list, tuple):
        return type(value)(_plain(entry, at, strange) for entry in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return str(value)
    if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided:
        return _whole(value)
    numbers = type(value) is np.ndarray and value.dtype.kind in "biufc"
    if not numbers and type(value) not in _READ_BACK:
        strange.append(f"a {type(value).__name__} in {at}")
    return value


_READ_BACK = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, set),
    *(torch.dtype, torch.device, torch.Size),
)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor with memory for each of its elements, which holds what it shows. Others share theirs as before."""
    tensor = tensor.resolve_conj().resolve_neg()
    if tensor.device.type != "meta" and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return tensor.contiguous()
    return tensor


class Checkpoints(Checkpoint):
    """Writes `last.ckpt`, and named checkpoints of which the best or the newest stay.

    dirpath: where. filename: format of the names, with epoch, step and logged metrics. monitor: the metric of
    validation that says which are best (mode: "min" or "max"); without it, or while nothing logs it, the newest count.
    save_top_k: how many named ones stay; -1 for all. save_last: write `last.ckpt` as well. every_n_train_steps: write
    after so many optimiser steps; by default after every validation, or every every_n_epochs-th epoch where there is
    none. save_weights_only: leave out what it takes to go on training. verbose: log every file.

    A checkpoint is only written between optimiser steps, when averages and gradients are settled: as soon as the next
    batch is at hand, in validation, or at the end of an epoch, whichever comes first.
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
        self.kept: dict[str, float | None] = {}  # name of a file -> its score, oldest first
        # While a file is written: what follows, the name it gets beside `last.ckpt` and the file that leaves for it.
        self._next: dict[str, Any] = {}
        self._saved_step = 0
        self._due = False

    @property
    def state_key(self) -> str:
        """Lightning's hook: what this callback's state is called in a checkpoint."""
        return self._generate_state_key(every_n_train_steps=self.every_n_train_steps, folder=self.dirpath.name)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's hook."""
        return {"kept": dict(self.kept), "next": self._next}

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook: what a kill left undone after this file was written is done now."""
        following = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("next")
        if not following or not trainer.is_global_zero:
            return
        name, leaving = following["name"], following["leaving"]
        if _is_ours(name) and trainer.ckpt_path and not (self.dirpath / name).exists():
            _same_file(Path(trainer.ckpt_path), self.dirpath / name)
        if leaving and _is_ours(leaving[0]) and _what(self.dirpath / leaving[0]) == leaving:  # no newer one
            (self.dirpath / leaving[0]).unlink()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lightning's hook."""
        kept = {name: score for name, score in state["kept"].items() if _is_ours(name)}
        self.kept = {name: score for name, score in kept.items() if (self.dirpath / name).is_file()}

    # ---- when ----

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lightning's hook: what was saved up to here is not due again."""
        self._saved_step = trainer.global_step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Lightning's hook. The batch before is behind the run only now, with what the model does after it."""
        every = self.every_n_train_steps
        if every and trainer.global_step // every > self._saved_step // every:
            self._due = True
        self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lightning's hook."""
        if trainer.sanity_checking:
            return
        if not self.every_n_train_steps and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._due = True
        self._save_if_due(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lightning's hook."""
        every = self.every_n_train_steps
        if every:
            self._due |= trainer.global_step // every > self._saved_step // every
        elif (trainer.current_epoch + 1) % self.every_n_epochs == 0 and self._score(trainer) is None:
            self._due = True
        self._save_if_due(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Lightning's hook: `last.ckpt` is where the run ended."""
        if self.save_last and not trainer.fast_dev_run and self._saved_step != trainer.global_step:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            self.save_last_now(trainer)

    def _score(self, trainer: pl.Trainer) -> float | None:
        metrics = trainer.callback_metrics
        return float(metrics[self.monitor]) if self.monitor is not None and self.monitor in metrics else None

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        if not self._due or trainer.fast_dev_run or not between_steps(trainer):  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            return
        self._due = False
        if trainer.global_step != self._saved_step:
            self._save(trainer)

    # ---- what ----

    def save_last_now(self, trainer: pl.Trainer) -> Path:
        """Write `last.ckpt`; returns its path. All processes must call this."""
        path = self.dirpath / LAST
        trainer.save_checkpoint(path, weights_only=self.save_weights_only)
        self._saved_step = trainer.global_step
        return path

    def _save(self, trainer: pl.Trainer) -> None:
        score = self._score(trainer)
        leaving = self._leaving(score)
        path = None if leaving is False else self._free_name(trainer)
        # what the first process finds, whose metrics and files count
        score, leaving, path = trainer.strategy.broadcast((score, leaving, path))
        if path is None:
            if self.save_last:
                self.save_last_now(trainer)
            return
        before = dict(self.kept)
        self.kept[path.name] = score
        if leaving:
            self.kept.pop(leaving, None)
        self._next = {"name": path.name, "leaving": _what(self.dirpath / leaving) if leaving else None}
        try:
            # `last.ckpt` first: it says what is yet to be done, should the process be killed now
            trainer.save_checkpoint(
                self.dirpath / LAST if self.save_last else path, weights_only=self.save_weights_only
            )
            self._next = {}
            self._saved_step = trainer.global_step
            if trainer.is_global_zero:
                if self.save_last:
                    _same_file(self.dirpath / LAST, path)
                if leaving:
                    (self.dirpath / leaving).unlink(missing_ok=True)
        except BaseException:  # what is saved hereafter must not speak of a file that is not there
            if not path.exists():
                self.kept = before
            raise
        finally:
            self._next = {}
        if self.verbose:
            logger.info("Saved %s", path)

    def _leaving(self, score: float | None) -> str | Literal[False]:
        """The name of the file that leaves for one with this score: "" if none has to, False if it is not good enough.

        Files without a score go first, then the worst.
        """
        if self.save_top_k == 0:
            return False
        if self.save_top_k < 0 or len(self.kept) < self.save_top_k:
            return ""
        scores = {name: kept for name, kept in self.kept.items() if kept is not None and not np.isnan(kept)}
        unscored = [name for name in self.kept if name not in scores]
        if unscored or score is None:
            return next(iter(unscored or self.kept))
        sign = 1 if self.mode == "min" else -1
        worst = max(scores, key=lambda name: sign * scores[name])
        return worst if sign * score < sign * scores[worst] else False

    def _free_name(self, trainer: pl.Trainer) -> Path:
        """A path that no file has."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        values |= {"epoch": trainer.current_epoch, "step": trainer.global_step}
        try:
            name = self.filename.format(**values)
        except KeyError as error:
            raise ValueError(f"modelcheckpoint.params.filename {self.filename!r}: nothing logs {error}") from error
        path = self.dirpath / f"{name}.ckpt"
        if path.exists():
            path = self.dirpath / f"{name}-{trainer.global_step:09}.ckpt"
        number = 1
        while path.exists():
            number += 1
            path = self.dirpath / f"{name}-{trainer.global_step:09}-{number}.ckpt"
        return path


def _is_ours(name: Any) -> bool:
    """Whether a name that a file tells can be one of a checkpoint in the folder: it may be made, and deleted."""
    return isinstance(name, str) and name == Path(name).name and name.endswith(".ckpt") and name != LAST


def _what(path: Path) -> list[Any] | None:
    """A file's name, size and time: another file of that name has others. None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [path.name, found.st_size, found.st_mtime_ns]


def _same_file(path: Path, link: Path) -> None:
    """Give a checkpoint a second name without a second copy, or with one where the file system has no hard links."""
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
