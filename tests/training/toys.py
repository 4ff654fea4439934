"""Small models, images that are quick to make, and callbacks that send signals or fail, for the tests of training."""

from __future__ import annotations

import builtins
import copy
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm import cli
from ldm.checkpoint import read_checkpoint
from scripts import train
from tests.golden import golden_configs
from tests.tiny import tiny_config

WARM_UP = {
    "target": "ldm.lr_scheduler.LambdaLinearScheduler",
    "params": {"warm_up_steps": [4], "cycle_lengths": [100], "f_start": [0.1], "f_max": [1.0], "f_min": [0.1]},
}


class Pictures(torch.utils.data.Dataset):
    """Coloured noise (16, 16, 3), shifted by numpy's global state, with captions; NaN from item `nan_from` on."""

    def __init__(self, length: int = 10, nan_from: int | None = None) -> None:
        self.length, self.nan_from = length, nan_from

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = np.random.default_rng(index).uniform(-1, 1, (16, 16, 3)) + 0.1 * np.random.standard_normal()
        if self.nan_from is not None and index >= self.nan_from:
            image[0, 0] = np.nan
        return {"jpg": image.astype(np.float32), "txt": ("a red circle", "a blue square")[index % 2]}


class TwoPlayers(pl.LightningModule):
    """A stand-in for an autoencoder with a discriminator: two optimizers by hand, noise, an average, norms.

    Like those, it accumulates `accumulate_grad_batches` gradients itself, also over the last batches of an epoch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate_grad_batches = 1
        self.net = nn.Conv2d(3, 3, 3, padding=1)
        self.critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Conv2d(4, 1, 3))
        self.register_buffer("average", torch.zeros(3, 3, 3, 3))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(part.parameters(), lr=self.learning_rate) for part in (self.net, self.critic)]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x = batch["jpg"].movedim(-1, 1)
        rebuilt = self.net(x + 0.1 * torch.randn_like(x))
        every = self.accumulate_grad_batches
        last = batch_idx + 1 == self.trainer.num_training_batches
        for optimizer, loss in zip(self.optimizers(), (self.player(x, rebuilt), self.judge(x, rebuilt.detach()))):
            self.toggle_optimizer(optimizer)
            if batch_idx % every == 0:
                optimizer.zero_grad()
            self.manual_backward(loss / every)
            if (batch_idx + 1) % every == 0 or last:
                optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log("train/loss", self.player(x, rebuilt).detach(), batch_size=len(x))

    def player(self, x: Tensor, rebuilt: Tensor) -> Tensor:
        return (x - rebuilt).square().mean() - 0.1 * self.critic(rebuilt).mean()

    def judge(self, x: Tensor, rebuilt: Tensor) -> Tensor:
        return self.critic(rebuilt).relu().mean() - self.critic(x).mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", self.net(batch["jpg"].movedim(-1, 1) + torch.randn(1)).square().mean(), batch_size=2)

    def on_train_batch_end(self, *args: Any) -> None:
        self.average.lerp_(self.net.weight.detach(), 0.1)


class KilledWorker(Pictures):
    """Pictures of which number 7 kills the process that makes it, as the system does where memory runs out."""

    def __init__(self, length: int = 10, name: str = "SIGKILL") -> None:
        super().__init__(length)
        self.signal = getattr(signal, name)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 7 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), self.signal)
        return super().__getitem__(index)


class SignalAt(pl.Callback):
    """Sends this process a signal during the batch of that number."""

    def __init__(self, batch: int, name: str = "SIGINT") -> None:
        self.batch, self.signal = batch, getattr(signal, name)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), self.signal)


class FailAt(pl.Callback):
    """Raises an error, given as "Kind: text", in the batch of that number."""

    def __init__(self, batch: int, error: str) -> None:
        name, _, text = error.partition(": ")
        self.batch = batch
        self.error = getattr(torch, name, None) or getattr(builtins, name)
        self.text = text

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise self.error(self.text)


def diffusion(**changes: Any) -> dict[str, Any]:
    """A LatentDiffusion with latents 8x8 and everything that has a state: averages, a schedule, dropout."""
    config = tiny_config(use_ema=True, scheduler_config=WARM_UP, image_size=8, **changes)
    unet = config["params"]["unet_config"]["params"]
    unet |= {"image_size": 8, "channel_mult": [1], "attention_resolutions": [1], "dropout": 0.1}
    return config | {"base_learning_rate": 1e-3}


def two_players() -> dict[str, Any]:
    return {"target": "tests.training.toys.TwoPlayers", "base_learning_rate": 1e-3}


def autoencoder() -> dict[str, Any]:
    """A small AutoencoderKL of 16x16 pictures whose discriminator starts after two steps."""
    ddconfig = golden_configs("diffusion")["kl"] | {"resolution": 16}
    loss = {"disc_start": 2, "perceptual_weight": 0.0, "disc_weight": 0.5, "disc_num_layers": 1}
    params = {
        "embed_dim": 4,
        "image_key": "jpg",
        "ddconfig": ddconfig,
        "lossconfig": {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": loss},
    }
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params, "base_learning_rate": 1e-4}


def config(model: dict[str, Any], length: int = 10, validation: int = 0, **data: Any) -> dict[str, Any]:
    """A complete config: `model` on `length` images in batches of two."""
    params = {"batch_size": 2, "num_workers": 0, "train": pictures(length)} | data
    if validation:
        params["validation"] = pictures(validation)
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    return {
        "model": copy.deepcopy(model),
        "data": {"target": "main.DataModuleFromConfig", "params": params},
        "lightning": {"trainer": trainer, "callbacks": {"image_logger": {"params": {"disabled": True}}}},
    }


def pictures(length: int) -> dict[str, Any]:
    return {"target": "tests.training.toys.Pictures", "params": {"length": length}}


def write(folder: Path, content: dict[str, Any], name: str = "toy.yaml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(content, folder / name)
    return folder / name


def run(*argv: Any) -> int:
    """Run the script in this process; returns its exit code. Curves are not plotted, which would take longer."""
    with mock.patch("ldm.training.metrics.plot_run"):
        return cli.run(train.main, [str(arg) for arg in argv])


def start(folder: Path, content: dict[str, Any], *argv: Any) -> tuple[int, Path]:
    """Start a run below `folder`; returns exit code and run folder."""
    code = run("--base", write(folder, content), "-t", "-l", folder / "logs", *argv)
    (found,) = (folder / "logs").iterdir()
    return code, found


def weights(run_folder: Path, name: str = "last.ckpt") -> dict[str, Tensor]:
    return read_checkpoint(run_folder / "checkpoints" / name).state


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    differing = [key for key, value in expected.items() if not torch.equal(found[key], value)]
    assert not differing
