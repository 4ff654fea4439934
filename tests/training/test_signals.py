"""Signals: which process handles them, and when."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldm.training import signals as ldm_signals
from ldm.training.signals import Signals, Stopped


class Saver:
    def __init__(self) -> None:
        self.saved = 0
        self.path = Path("RUN/checkpoints/last.ckpt")

    def save_last_now(self, trainer) -> str:
        self.saved += 1
        return self.path


@pytest.fixture
def signals(monkeypatch):
    monkeypatch.setattr(ldm_signals, "between_steps", lambda trainer: trainer.between)
    before = [signal.getsignal(number) for number in ldm_signals.STOP + ldm_signals.SAVE]
    callback = Signals(Saver())
    callback.on_train_start()
    yield callback
    callback.teardown()
    assert [signal.getsignal(number) for number in ldm_signals.STOP + ldm_signals.SAVE] == before


def trainer(**changes) -> SimpleNamespace:
    return SimpleNamespace(
        **{"default_root_dir": "RUN", "between": True, "sanity_checking": False, "fast_dev_run": 0, "world_size": 1}
        | changes
    )


@pytest.mark.parametrize("number", ldm_signals.STOP)
def test_stop(signals, number):
    """Between two steps only, and the message is a command that resumes the run."""
    os.kill(os.getpid(), number)
    signals.on_train_batch_start(trainer(between=False))
    assert signals.checkpoints.saved == 0
    with pytest.raises(Stopped, match=r"Stopped\. Resume with: python scripts/train\.py --resume RUN -t"):
        signals.on_train_batch_start(trainer())
    assert signals.checkpoints.saved == 1
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # a second Ctrl-C ends the process at once


def test_save_once_and_continue(signals):
    os.kill(os.getpid(), signal.SIGUSR1)
    for _ in range(2):
        signals.on_train_batch_start(trainer())
    assert signals.checkpoints.saved == 1


def test_nothing_is_saved_before_the_first_step(signals):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped, match="before the first step"):
        signals.on_validation_batch_end(trainer(sanity_checking=True))
    assert signals.checkpoints.saved == 0


@pytest.mark.parametrize("received", [None, signal.SIGTERM])
def test_one_process_stops_all(signals, received):
    """Another process received a signal, or this one was: the decision is common."""
    decisions = []

    def anyone(decision, all):
        decisions.append(decision)
        return True

    signals._received = received
    with pytest.raises(Stopped):
        signals.on_train_batch_start(trainer(world_size=2, strategy=SimpleNamespace(reduce_boolean_decision=anyone)))
    assert decisions == [received is not None]


def test_a_checkpoint_elsewhere_is_named_itself(signals):
    signals.checkpoints.path = Path("elsewhere/last.ckpt")
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped, match=r"--resume elsewhere/last\.ckpt -t"):
        signals.on_train_batch_start(trainer())
