"""A run built from its settings."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor

from ldm.cli.train import parse_train
from ldm.training.callbacks import ImageLogger
from ldm.training.checkpoints import Checkpoints
from ldm.training.run import build_trainer
from ldm.training.settings import read_settings
from ldm.util import get_obj_from_str
from tests.training.toys import TwoPlayers, config, start, two_players, write

PUBLIC = json.loads((Path(__file__).parent.parent / "reference/public_configs.json").read_text())
AUTOLOG = "enable_autolog_hparams"


class Logging(TwoPlayers):
    """A model with `log_images`."""

    monitor = "val/rec_loss"

    def log_images(self, batch, **kwargs):
        return {}


def built(tmp_path: Path, *configs: dict, model=None, argv=()):
    paths = [write(tmp_path, content, f"{i}.yaml") for i, content in enumerate(configs)]
    settings = read_settings(parse_train(["-t", *map(str, argv), "--base", *map(str, paths)]))
    return settings, build_trainer(settings, model or Logging(), tmp_path, "now")


@pytest.mark.parametrize("name", sorted(name for name in PUBLIC if "lightning" in PUBLIC[name]))
def test_public_lightning_sections(tmp_path, name):
    toy = config(two_players())
    toy["lightning"] = {"trainer": {"accelerator": "cpu"}}
    section = PUBLIC[name]["lightning"]
    settings, trainer = built(tmp_path, toy, {"lightning": section})
    (images,) = (callback for callback in trainer.callbacks if isinstance(callback, ImageLogger))
    assert images.batch_frequency == section["callbacks"]["image_logger"]["params"]["batch_frequency"]
    assert any(isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks)
    savers = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoints)]
    assert (savers[0].monitor, savers[0].save_top_k) == ("val/rec_loss", 3)
    if "modelcheckpoint" in section:
        assert [saver.every_n_train_steps for saver in savers] == [5000, 10000]
        assert [saver.save_weights_only for saver in savers] == [False, True]


@pytest.mark.parametrize(
    "name", ["DataModuleFromConfig", "WrappedDataset", "ImageLogger", "SetupCallback", "CUDACallback"]
)
def test_public_names(name):
    assert get_obj_from_str(f"main.{name}").__name__ == name


def test_a_trainer_of_lightning_2_4(tmp_path, monkeypatch):
    """Which has no `enable_autolog_hparams`."""
    plain = {name: value for name, value in inspect.signature(pl.Trainer).parameters.items() if name != AUTOLOG}
    given = {}

    def older(**options):
        assert set(options) <= set(plain), "an unexpected keyword argument"
        given.update(options)

    older.__signature__ = inspect.Signature(list(plain.values()))
    toy = config(two_players())
    toy["lightning"] = {"trainer": {"accelerator": "cpu"}}
    _, trainer = built(tmp_path, toy)
    assert not getattr(trainer, AUTOLOG, False)
    monkeypatch.setattr(pl, "Trainer", older)
    built(tmp_path, toy)
    assert given["accelerator"] == "cpu" and given["callbacks"]


def test_manual_optimization_accumulates_itself(tmp_path):
    settings, trainer = built(tmp_path, config(two_players()), argv=("--accumulate_grad_batches", 4))
    assert trainer.accumulate_grad_batches == 1 and settings.trainer["accumulate_grad_batches"] == 4


def test_defaults(tmp_path, capsys):
    _, trainer = built(tmp_path, config(two_players()), model=TwoPlayers())
    assert trainer.max_epochs == 1000 and trainer.max_steps == -1
    assert not any(isinstance(callback, ImageLogger) for callback in trainer.callbacks)
    _, trainer = built(tmp_path, config(two_players()), model=TwoPlayers(), argv=("--max_steps", 7))
    assert trainer.max_steps == 7


@pytest.mark.parametrize("target", ["pytorch_lightning.loggers.TestTubeLogger", None])
def test_removed_logger(tmp_path, caplog, target):
    content = config(two_players())
    content["lightning"]["logger"] = {"params": {"name": "testtube"}} | ({"target": target} if target else {})
    caplog.set_level("INFO", logger="ldm")
    _, trainer = built(tmp_path, content)
    assert "metrics are written as CSV" in caplog.text
    assert trainer.loggers[0].log_dir == str(tmp_path / "metrics")


@pytest.mark.parametrize("name", ["SIGKILL", "SIGBUS"])
def test_a_killed_worker(tmp_path, capfd, name):
    dying = {"target": "tests.training.toys.KilledWorker", "params": {"length": 10, "name": name}}
    code, _ = start(tmp_path, config(two_players(), train=dying, num_workers=1), "--max_epochs", 2)
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert (
        code == 1
        and "a worker process that loads data was killed by signal" in message
        and "memory runs out" in message
    )
    assert ("/dev/shm is full, or a file of a cache was cut short" in message) == (name == "SIGBUS"), message
