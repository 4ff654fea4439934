"""Code and settings for Lightning 1, and the Trainer settings of all public configs."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from ldm.training import run
from ldm.training.compat import TRAINER_KEYS, translate_trainer
from tests.training import toys
from tests.training.toys import TwoPlayers, config, start, two_players, write

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = json.loads((Path(__file__).parent.parent / "reference/public_configs.json").read_text())


def test_keys_are_those_of_the_trainer():
    assert set(TRAINER_KEYS) < set(inspect.signature(pl.Trainer).parameters)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_configs(name):
    settings = PUBLIC[name].get("lightning", {}).get("trainer", {})
    current, notes = translate_trainer(settings)
    assert current == settings and not notes
    assert pl.Trainer(**current, accelerator="cpu", logger=False, enable_checkpointing=False)


OLD = [
    ({"gpus": "0,"}, {"accelerator": "gpu", "devices": "0,"}),
    ({"gpus": 2, "distributed_backend": "ddp"}, {"accelerator": "gpu", "devices": 2, "strategy": "ddp"}),
    ({"gpus": "2"}, {"accelerator": "gpu", "devices": 2}),
    ({"gpus": 0}, {"accelerator": "cpu"}),
    ({"gpus": "0,1", "accelerator": "ddp"}, {"accelerator": "gpu", "devices": "0,1", "strategy": "ddp"}),
    ({"accelerator": "ddp_cpu", "num_processes": 2}, {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}),
    ({"accelerator": "cpu"}, {"accelerator": "cpu"}),
    ({"gpus": "0,", "devices": 1, "accelerator": "cpu"}, {"accelerator": "cpu", "devices": 1}),
    ({"progress_bar_refresh_rate": 0}, {"enable_progress_bar": False}),
    ({"max_epochs": 3, "benchmark": True, "accumulate_grad_batches": 2, "gradient_clip_val": None}, None),
    ({"weights_summary": "full", "terminate_on_nan": True, "increase_log_steps": False}, {}),
]


@pytest.mark.parametrize("old, expected", OLD)
def test_older_settings(old, expected):
    current, notes = translate_trainer(old)
    if expected is None:
        expected = {key: value for key, value in old.items() if value is not None}
    assert current == expected
    assert len(notes) == len([key for key in old if old[key] is not None and current.get(key) != old[key]])


def test_mistakes():
    with pytest.raises(ValueError, match="no setting 'max_stepps': did you mean max_steps"):
        translate_trainer({"max_stepps": 3})
    with pytest.raises(ValueError, match="distributed_backend=dpd is not one of"):
        translate_trainer({"distributed_backend": "dpd"})


# ---- hooks and names ----


class OldStyle(TwoPlayers):
    """Hooks as Lightning 1 called them."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[tuple] = []

    def on_train_batch_start(self, batch, batch_idx, dataloader_idx):
        self.called.append(("start", batch_idx, dataloader_idx))

    def on_train_batch_end(self, outputs, batch, batch_idx, dataloader_idx):
        self.called.append(("end", batch_idx, dataloader_idx))

    def validation_step(self, batch, batch_idx, dataloader_idx):
        self.called.append(("validation", batch_idx, dataloader_idx))


class OldCallback(pl.Callback):
    """A callback of a public main.py."""

    called: list[tuple] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx):
        self.called.append((batch_idx, dataloader_idx))


def test_hooks_of_lightning_1_are_called(tmp_path, monkeypatch):
    content = config({"target": "tests.training.test_compat.OldStyle", "base_learning_rate": 1e-3}, 4, validation=2)
    content["lightning"]["callbacks"]["old"] = {"target": "tests.training.test_compat.OldCallback"}
    models = []
    build = run.build_model
    monkeypatch.setattr(run, "build_model", lambda settings: models.append(build(settings)) or models[0])
    OldCallback.called.clear()
    code, _ = start(tmp_path, content, "--max_epochs", 1)
    assert code == 0 and OldCallback.called == [(0, 0), (1, 0)]
    steps = [("start", 0, 0), ("end", 0, 0), ("start", 1, 0), ("end", 1, 0)]
    assert models[0].called == [*steps, ("validation", 0, 0)]


class OptimizerIndex(TwoPlayers):
    def training_step(self, batch, batch_idx, optimizer_idx):
        return None


def test_optimizer_idx_names_the_line(tmp_path, capsys):
    content = config({"target": "tests.training.test_compat.OptimizerIndex", "base_learning_rate": 1e-3})
    assert start_failing(tmp_path, content) == 2
    line = inspect.getsourcelines(OptimizerIndex.training_step)[1]
    error = capsys.readouterr().err
    assert f"{__file__}, line {line}: training_step of OptimizerIndex takes optimizer_idx" in error
    assert "self.automatic_optimization = False" in error and error.count("\n") == 1


def start_failing(folder: Path, content: dict) -> int:
    return toys.run("--base", write(folder, content), "-t", "-l", folder / "logs")


OLD_SCRIPT = """
import argparse, sys
from ldm.training.compat import support_lightning_1; support_lightning_1()
import torch
import pytorch_lightning as pl
from pytorch_lightning.trainer import Trainer
from pytorch_lightning.utilities.distributed import rank_zero_only

class Old(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
    def on_train_batch_start(self, batch, batch_idx, dataloader_idx):
        self.seen.append(dataloader_idx)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

class Callback(pl.Callback):
    @rank_zero_only
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx):
        pl_module.seen.append(batch_idx)

parser = Trainer.add_argparse_args(argparse.ArgumentParser())
opt = parser.parse_args(sys.argv[1:])
default = Trainer.add_argparse_args(argparse.ArgumentParser()).parse_args([])
print([name for name in vars(opt) if getattr(opt, name) != getattr(default, name)])
trainer = Trainer.from_argparse_args(opt, callbacks=[Callback()], logger=False, enable_checkpointing=False)
model = Old()
trainer.fit(model, torch.utils.data.DataLoader(torch.ones(2, 1), 1))
print(model.seen, trainer.max_epochs, trainer.accumulate_grad_batches)
"""


@pytest.mark.subprocess
def test_a_script_for_lightning_1(tmp_path):
    command = [sys.executable, "-c", OLD_SCRIPT, "--gpus", "0", "--max_epochs", "1", "--accumulate_grad_batches", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert printed == ["['max_epochs', 'accumulate_grad_batches', 'gpus']", "[0, 0, 0, 1] 1 2"]


@pytest.mark.subprocess
def test_main_is_train_under_its_public_name(tmp_path):
    content = config(two_players())
    content["lightning"].pop("trainer")
    base = write(tmp_path, content)
    command = [sys.executable, ROOT / "scripts/main.py", "--base", base, "-t", "--trust-config", "tests", "-l"]
    command += [tmp_path / "logs", "--max_steps", 2, "--gpus"]
    for gpus, code in (("0", 0), ("0,", 2)):  # the CPU; a GPU
        done = subprocess.run([*map(str, command), gpus], cwd=ROOT, capture_output=True, text=True)
        if gpus == "0," and torch.cuda.is_available():
            code = 0
        assert done.returncode == code, done.stderr
    assert torch.cuda.is_available() or "Train on the CPU with --accelerator cpu" in done.stderr
    assert len(list((tmp_path / "logs").iterdir())) >= 1
