"""Signals: Ctrl-C and SIGTERM save and stop, SIGUSR1 saves and continues."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from ldm.training.checkpoints import Checkpoints, between_steps

logger = logging.getLogger(__name__)

STOP = (signal.SIGINT, signal.SIGTERM)
SAVE = tuple(getattr(signal, name) for name in ("SIGUSR1",) if hasattr(signal, name))


class Stopped(Exception):
    """A run that a signal stopped; `resume` is what it resumes from, None if nothing was trained yet."""

    def __init__(self, resume: Path | None) -> None:
        command = f"Stopped. Resume with: python scripts/train.py --resume {resume} -t"
        super().__init__(command if resume else "stopped before the first step")
        self.resume = resume


class Signals(pl.Callback):
    """Saves `last.ckpt` on a signal, and ends the run if it is one of `STOP`.

    A signal takes effect between two optimizer steps, in all processes at once, whichever of them received it. A
    second Ctrl-C kills the process at once, which harms no file.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def on_sanity_check_start(self, *_: Any) -> None:
        """Install the handlers."""
        self._install()

    def on_train_start(self, *_: Any) -> None:
        """Install the handlers."""
        self._install()

    def teardown(self, *_: Any, **__: Any) -> None:
        """Restore the handlers."""
        self.uninstall()

    def on_exception(self, *_: Any) -> None:
        """Restore the handlers."""
        self.uninstall()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save or stop."""
        self._handle(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save or stop."""
        self._handle(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save or stop."""
        self._handle(trainer)

    def _install(self) -> None:
        if not self._before:
            self._before = {number: signal.signal(number, self._note) for number in STOP + SAVE}

    def uninstall(self) -> None:
        """Restore the handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in STOP:
            self._received = number
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            logger.info("Saving and stopping after this step; press Ctrl-C again to stop at once")
        elif self._received is None:
            self._received = number

    def _handle(self, trainer: pl.Trainer) -> None:
        if not trainer.sanity_checking and not between_steps(trainer):
            return
        stop = _any_process(trainer, self._received in STOP)
        save = stop or _any_process(trainer, self._received in SAVE)
        if not save:
            return
        self._received = None
        resume = None
        if not (trainer.sanity_checking or trainer.fast_dev_run):  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            path = self.checkpoints.save_last_now(trainer)
            logger.info("Saved %s", path)
            run = Path(trainer.default_root_dir)
            resume = run if path.parent == run / "checkpoints" else path
        if stop:
            raise Stopped(resume)


def _any_process(trainer: pl.Trainer, decision: bool) -> bool:
    return decision if trainer.world_size == 1 else trainer.strategy.reduce_boolean_decision(decision, all=False)
