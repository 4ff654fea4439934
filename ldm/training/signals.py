"""Signals: Ctrl-C and SIGTERM save and stop, SIGUSR1 saves and goes on."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from ldm.training.checkpoints import Checkpoints
from ldm.training.resume import between_steps

logger = logging.getLogger(__name__)

STOP = (signal.SIGINT, signal.SIGTERM)
SAVE = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))


class Stopped(Exception):
    """A run that a signal ended, after `path` was written (None: before anything was trained)."""

    def __init__(self, path: Path | None) -> None:
        super().__init__(f"stopped; {path} is where it goes on" if path else "stopped before the first step")
        self.path = path


class Signals(pl.Callback):
    """Saves `last.ckpt` when a signal asks for it, and ends the run if it is one of `STOP`.

    A signal is answered between two optimiser steps, by all processes at once, whichever of them it reached. A second
    Ctrl-C kills the process at once; files are written whole or not at all, so it harms none.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def on_sanity_check_start(self, *_: Any) -> None:
        """Lightning's hook."""
        self._install()

    def on_train_start(self, *_: Any) -> None:
        """Lightning's hook."""
        self._install()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Lightning's hook."""
        self.uninstall()

    def on_exception(self, *_: Any) -> None:
        """Lightning's hook."""
        self.uninstall()

    def _install(self) -> None:
        if not self._before:
            self._before = {number: signal.signal(number, self._note) for number in STOP + SAVE}

    def uninstall(self) -> None:
        """Give signals their meaning back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in STOP:
            self._received = number
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            logger.info("Saving and stopping after this step; Ctrl-C again stops at once")
        elif self._received is None:
            self._received = number

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Lightning's hook."""
        self._answer(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Lightning's hook."""
        self._answer(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Lightning's hook."""
        self._answer(trainer)

    def _answer(self, trainer: pl.Trainer) -> None:
        if not trainer.sanity_checking and not between_steps(trainer):
            return
        stop = _anyone(trainer, self._received in STOP)
        save = stop or _anyone(trainer, self._received in SAVE)
        if not save:
            return
        self._received = None
        if trainer.sanity_checking or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            path = None
        else:
            path = self.checkpoints.save_last_now(trainer)
            logger.info("Saved %s", path)
        if stop:
            raise Stopped(path)


def _anyone(trainer: pl.Trainer, decision: bool) -> bool:
    return decision if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(decision, all=False)
