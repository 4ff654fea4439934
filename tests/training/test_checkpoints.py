"""Checkpoint files: complete or not there, of plain values, the right ones retained."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.checkpoint import read_checkpoint
from ldm.training import checkpoints
from ldm.training.checkpoints import AtomicCheckpointIO, Checkpoints, read_training_state, remove_partial_files
from tests.training.toys import assert_same_weights, config, run, start, two_players, weights

PLACE = {"epoch": 1, "batch": 2, "total": 7, "logged": 7, "batches": 5, "processes": 1}
STATE = {"state_dict": {"w": torch.ones(3)}, "loops": {}, "place": PLACE, "optimizer_states": [], "global_step": 7}


def test_files_hold_plain_values(tmp_path):
    odd = STATE | {"score": np.float64(0.5), "folder": Path("x/y"), "nested": [(np.int64(3), {"k": np.bool_(True)})]}
    AtomicCheckpointIO().save_checkpoint(odd, tmp_path / "new" / "a.ckpt")
    found = AtomicCheckpointIO().load_checkpoint(tmp_path / "new" / "a.ckpt")
    assert (found["score"], found["folder"], found["nested"]) == (0.5, "x/y", [(3, {"k": True})])
    assert read_checkpoint(tmp_path / "new" / "a.ckpt").global_step == 7


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("failed writing file")]
)
def test_a_full_disk_costs_nothing(tmp_path, monkeypatch, error):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)

    def full(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(OSError, match=f"cannot write last.ckpt to {tmp_path}: No space left on device"):
        AtomicCheckpointIO().save_checkpoint(STATE | {"global_step": 8}, path)
    assert read_training_state(path)["global_step"] == 7 and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


KILLED = """
import sys, time, torch
from ldm.training import checkpoints

save = torch.save
def slow(state, file):
    save(state, file)
    file.flush()
    print("written", flush=True)
    time.sleep(60)

state = torch.load(sys.argv[1], weights_only=True)
checkpoints.torch.save = slow
checkpoints.AtomicCheckpointIO().save_checkpoint(state | {"global_step": 8}, sys.argv[1])
"""


@pytest.mark.subprocess
def test_a_kill_while_saving_costs_nothing(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(STATE, path)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.wait()
    assert read_training_state(path)["global_step"] == 7 and len(list(tmp_path.iterdir())) == 2
    remove_partial_files(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_files_that_no_run_can_resume_from(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "weights.ckpt")
    with pytest.raises(ValueError, match=r"holds weights, but not the state of a run .*model\.params\.ckpt_path"):
        read_training_state(tmp_path / "weights.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint at all")
    with pytest.raises(ValueError, match="is a text file, not a checkpoint"):
        read_training_state(tmp_path / "text.ckpt")


class FakeTrainer(SimpleNamespace):
    """Counters of a Trainer, and a `save_checkpoint` that writes the step."""

    def __init__(self) -> None:
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(), epoch_progress=SimpleNamespace())
        super().__init__(
            callback_metrics={},
            current_epoch=0,
            fast_dev_run=False,
            fit_loop=loop,
            global_step=0,
            is_global_zero=True,
            sanity_checking=False,
            strategy=SimpleNamespace(broadcast=lambda x: x),
        )

    def save_checkpoint(self, path, weights_only=False) -> None:
        Path(path).write_text(str(self.global_step))


@pytest.fixture
def trainer(monkeypatch) -> FakeTrainer:
    monkeypatch.setattr(checkpoints, "between_steps", lambda trainer: trainer.global_step % 10 != 9)
    return FakeTrainer()


def validate(saver: Checkpoints, trainer: FakeTrainer, epoch: int, score: float | None) -> None:
    trainer.current_epoch, trainer.global_step = epoch, 10 * epoch + 5
    trainer.callback_metrics = {} if score is None else {"val/loss": torch.tensor(score)}
    saver.on_validation_end(trainer, None)
    saver.on_train_epoch_end(trainer, None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_best_stay(tmp_path, trainer):
    saver = Checkpoints(tmp_path, monitor="val/loss", save_top_k=2)
    for epoch, score in enumerate([3.0, 1.0, float("nan"), 2.0, 5.0]):
        validate(saver, trainer, epoch, score)
        assert (tmp_path / "last.ckpt").read_text() == str(trainer.global_step)
    assert names(tmp_path) == ["000001.ckpt", "000003.ckpt", "last.ckpt"]
    again = Checkpoints(tmp_path, monitor="val/loss", save_top_k=2)
    again.load_state_dict(saver.state_dict())
    validate(again, trainer, 5, 1.5)
    assert names(tmp_path) == ["000001.ckpt", "000005.ckpt", "last.ckpt"]


def test_the_newest_stay_without_a_monitored_metric(tmp_path, trainer):
    saver = Checkpoints(tmp_path, monitor="val/other")
    for epoch in range(3):
        validate(saver, trainer, epoch, 1.0)
    assert names(tmp_path) == ["000002.ckpt", "last.ckpt"]


def test_every_so_many_steps_between_optimiser_steps(tmp_path, trainer):
    saver = Checkpoints(tmp_path, "{step:04}", every_n_train_steps=3, save_top_k=-1, save_last=False)
    for trainer.global_step in range(12):  # 9 is not between two steps
        saver.on_train_batch_start(trainer)
    assert names(tmp_path) == ["0003.ckpt", "0006.ckpt", "0010.ckpt"]


def test_nothing_is_overwritten(tmp_path, trainer):
    (tmp_path / "000000.ckpt").write_text("another run's")
    saver = Checkpoints(tmp_path)
    validate(saver, trainer, 0, None)
    assert names(tmp_path) == ["000000-000000005.ckpt", "000000.ckpt", "last.ckpt"]
    assert (tmp_path / "000000.ckpt").read_text() == "another run's"


class Killed(BaseException):
    """Ends a process in the middle."""


class StateTrainer(FakeTrainer):
    """Writes the state of a callback."""

    saver: Checkpoints
    ckpt_path = None

    def save_checkpoint(self, path, weights_only=False) -> None:
        state = {"callbacks": {self.saver.state_key: self.saver.state_dict()}, "step": self.global_step}
        AtomicCheckpointIO().save_checkpoint(state, path)


@pytest.mark.parametrize("moment, last", [("before its name", True), ("before the other goes", True), ("never", False)])
def test_what_was_pending_at_a_kill_is_done_on_resuming(tmp_path, monkeypatch, moment, last):
    trainer = StateTrainer()
    monkeypatch.setattr(checkpoints, "between_steps", lambda trainer: True)
    trainer.saver = saver = Checkpoints(tmp_path, save_top_k=1, save_last=last)
    validate(saver, trainer, 0, None)

    def kill(*args, **options):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before its name":
            patch.setattr(checkpoints, "_link", kill)
        elif moment == "before the other goes":
            same = checkpoints._link

            def link_and_die(*paths):
                same(*paths)
                kill()

            patch.setattr(checkpoints, "_link", link_and_die)
        with pytest.raises(Killed) if moment != "never" and last else contextlib.nullcontext():
            validate(saver, trainer, 1, None)
    trainer.ckpt_path = tmp_path / ("last.ckpt" if last else "000001.ckpt")
    found = torch.load(trainer.ckpt_path, weights_only=True)
    assert found["step"] == 15
    again = Checkpoints(tmp_path, save_top_k=1, save_last=last)
    again.on_load_checkpoint(trainer, None, found)
    again.load_state_dict(found["callbacks"][again.state_key])
    assert names(tmp_path) == ["000001.ckpt"] + ["last.ckpt"] * last and list(again.retained) == ["000001.ckpt"]
    assert torch.load(tmp_path / "000001.ckpt", weights_only=True)["step"] == 15
    trainer.saver = again
    validate(again, trainer, 2, None)
    assert names(tmp_path) == ["000002.ckpt"] + ["last.ckpt"] * last


@pytest.mark.parametrize("failing", ["the file", "its name"])
def test_a_failed_save_leaves_nothing_pending(tmp_path, monkeypatch, failing):
    """`last.ckpt`, saved because of an error, must not list a pending file: on resuming, a good one would go."""
    trainer = StateTrainer()
    monkeypatch.setattr(checkpoints, "between_steps", lambda trainer: True)
    trainer.saver = saver = Checkpoints(tmp_path, save_top_k=1)
    validate(saver, trainer, 0, None)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(*((checkpoints.torch, "save") if failing == "the file" else (checkpoints, "_link")), full)
        with pytest.raises(OSError, match="No space left"):
            validate(saver, trainer, 1, None)
    saver.save_last_now(trainer)
    trainer.ckpt_path = tmp_path / "last.ckpt"
    found = torch.load(trainer.ckpt_path, weights_only=True)
    assert found["callbacks"][saver.state_key] == {"kept": {"000000.ckpt": None}, "next": {}}
    again = Checkpoints(tmp_path, save_top_k=1)
    again.on_load_checkpoint(trainer, None, found)
    again.load_state_dict(found["callbacks"][again.state_key])
    assert names(tmp_path) == ["000000.ckpt", "last.ckpt"] and list(again.retained) == ["000000.ckpt"]


def test_a_newer_file_of_that_name_stays(tmp_path):
    (tmp_path / "a.ckpt").write_text("newer")
    os.utime(tmp_path / "a.ckpt", (1, 1))
    saver, trainer = Checkpoints(tmp_path), StateTrainer()
    trainer.ckpt_path = tmp_path / "last.ckpt"
    (tmp_path / "last.ckpt").write_text("x")
    for leaving in (["a.ckpt", 5, 0], ["a.ckpt", 4, 10**9], ["b.ckpt", 5, 10**9]):
        state = {"kept": {}, "next": {"name": "last.ckpt", "leaving": leaving}}
        saver.on_load_checkpoint(trainer, None, {"callbacks": {saver.state_key: state}})
    assert names(tmp_path) == ["a.ckpt", "last.ckpt"]


def test_no_file_elsewhere_is_made_or_deleted(tmp_path, trainer):
    """A checkpoint lists the run's files, and a hostile one could list any."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    other = tmp_path / "mine.ckpt"
    other.write_text("x")
    (folder / "text.txt").write_text("x")
    found = [str(other), 1, other.stat().st_mtime_ns]
    saver, trainer.ckpt_path = Checkpoints(folder, save_top_k=1), other
    for name in ("../mine.ckpt", str(other), "text.txt", "last.ckpt", 3, "../new.ckpt"):
        state = {"kept": {name: 0.0}, "next": {"name": name, "leaving": [name, *found[1:]]}}
        saver.on_load_checkpoint(trainer, None, {"callbacks": {saver.state_key: state}})
        saver.load_state_dict(state)
        assert saver.retained == {}
    validate(saver, trainer, 0, None)
    assert other.exists() and names(folder) == ["000000.ckpt", "last.ckpt", "text.txt"]
    assert names(tmp_path) == ["checkpoints", "mine.ckpt"]


def test_mistakes(tmp_path, trainer):
    with pytest.raises(ValueError, match="mode 'best' is not one of min, max"):
        Checkpoints(tmp_path, mode="best")
    with pytest.raises(ValueError, match="no metric 'val/psnr' is logged"):
        validate(Checkpoints(tmp_path, "{val/psnr:.2f}"), trainer, 0, None)


def test_an_earlier_checkpoint_leads_to_the_same_end(tmp_path):
    """Written in the middle of an epoch, at its end and after a validation: all resume exactly."""
    content = config(two_players(), length=14, validation=2)
    content["lightning"]["modelcheckpoint"] = {"params": {"every_n_train_steps": 5, "save_top_k": -1}}
    content["lightning"]["modelcheckpoint"]["params"]["filename"] = "{step:06}"
    _, folder = start(tmp_path, content, "--max_steps", 30)  # two optimisers: two steps a batch
    end = weights(folder)
    saved = sorted(path.name for path in (folder / "checkpoints").glob("0*.ckpt"))
    assert len(saved) >= 5
    for name in saved[:3]:
        time.sleep(1.1 if name == saved[1] else 0)  # names of renamed files hold the second
        assert run("--resume", folder / "checkpoints" / name, "-t") == 0
        assert_same_weights(weights(folder), end)
    kept = list((folder / "checkpoints").glob("last-until-*.ckpt"))
    assert kept and all(os.path.getsize(path) for path in kept)
