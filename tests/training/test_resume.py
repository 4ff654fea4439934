"""A run that was stopped and resumed ends with the same weights as an uninterrupted one, bit for bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ldm.checkpoint import read_checkpoint
from ldm.training.checkpoints import ExactResume, Position, _counters
from tests.training.toys import assert_same_weights, autoencoder, config, diffusion, run, start, two_players, weights

STEPS = ("--max_steps", 8)


def stop_at(batch: int) -> dict:
    return {"stop": {"target": "tests.training.toys.SignalAt", "params": {"batch": batch}}}


def check(tmp_path, content, batches, *argv) -> None:
    """Compare an uninterrupted run with runs that are stopped after each of `batches`."""
    _, complete = start(tmp_path / "complete", content, *argv)
    for batch in batches:
        content["lightning"]["callbacks"] |= stop_at(batch)
        code, parts = start(tmp_path / f"stopped-{batch}", content, *argv)
        assert code == 130
        step = read_step(parts)
        assert run("--resume", parts, "-t") == 0
        assert step < read_step(parts) == read_step(complete)
        assert_same_weights(weights(parts), weights(complete))


def read_step(folder) -> int:
    return read_checkpoint(folder / "checkpoints/last.ckpt").global_step


@pytest.mark.parametrize("workers", [0, 2])
def test_latent_diffusion(tmp_path, workers):
    check(tmp_path, config(diffusion(), num_workers=workers), [2] if workers else [0, 4], *STEPS)


def test_in_the_middle_of_accumulated_gradients(tmp_path):
    """Seven batches an epoch in steps of three: the last step of every epoch has one batch."""
    content = config(diffusion(), length=14, validation=2)
    check(tmp_path, content, [1, 6, 8], "--max_steps", 6, "--accumulate_grad_batches", 3, "--val_check_interval", 2)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_manual_optimization(tmp_path, accumulate):
    content = config(two_players(), length=14, validation=2)
    batches = [0, 5, 6, 9] if accumulate == 1 else [3, 6, 8]
    check(tmp_path, content, batches, "--max_epochs", 2, "--accumulate_grad_batches", accumulate)


def test_autoencoder_and_discriminator(tmp_path):
    content = config(autoencoder(), validation=2)
    check(tmp_path, content, [3, 6], "--max_epochs", 2, "--accumulate_grad_batches", 2)


def resume(counters: dict, anyway: bool = False) -> dict:
    """The fit loop's counters that a run of one process resumes with from a checkpoint with `counters`."""
    place = {"epoch": 1, "batch": 2, "total": 7, "logged": 7, "batches": 5, "processes": 1}
    checkpoint = {"place": place, "loops": {"fit_loop": counters}, "optimizer_states": []}
    data = SimpleNamespace(start_at=lambda epoch, batch: None)
    ExactResume(anyway).on_load_checkpoint(SimpleNamespace(world_size=1, datamodule=data), None, checkpoint)
    return checkpoint["loops"]["fit_loop"]


def test_counters_of_other_releases_of_lightning():
    expected = _counters(Position(1, 2, 7), 7)
    older = _counters(Position(1, 2, 7), 7)
    del older["epoch_progress"]["current"]["ready"]
    assert resume(older) == expected
    newer = _counters(Position(1, 2, 7), 7) | {"val": {"x": 1}}
    newer["epoch_progress"]["current"]["new"] = 3
    found = resume(newer)
    assert found["epoch_progress"]["current"] == expected["epoch_progress"]["current"] | {"new": 3}
    assert found["val"] == {"x": 1} and found.keys() == newer.keys()


def test_counters_of_another_position(caplog):
    other = _counters(Position(1, 3, 8), 8) | {"state_dict": {}}
    for counters in (other, {}):
        with pytest.raises(ValueError, match="counters contradict its position .*or add --resume_anyway"):
            resume(counters)
    assert resume(other, anyway=True) == _counters(Position(1, 2, 7), 7) | {"state_dict": {}}
    assert "counters contradict its position" in caplog.text
