#!/usr/bin/env python
"""Measure how fast this machine does what the other scripts do, and what of it is this code's share."""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ldm import cli
from ldm.devices import DEVICES

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ldm.models.diffusion.ddpm import LatentDiffusion

WARM_UP = 1  # steps that are not counted
OPTIMIZERS = {"adamw": "torch.optim.AdamW", "sgd": "torch.optim.SGD"}
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of this script."""
    parser = cli.ArgumentParser(description=__doc__)
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    count = cli.number(int, 1)
    training = suites.add_parser(
        "training",
        help="images per second of training, against a plain loop over the same modules",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    training.add_argument(
        "--model", choices=("bundled", "v1"), default="bundled", help="v1: its UNet at 256x256, latents 32x32"
    )
    training.add_argument("--steps", type=count, default=50, help="steps of each kind, taken in turns")
    training.add_argument("--batch", type=count, default=16, help="images a step")
    training.add_argument("--precision", choices=PRECISIONS, default="fp32")
    training.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="sgd keeps no state: less memory")
    training.add_argument("--device", default="auto", help=", ".join(DEVICES))
    return parser.parse_args(argv)


class RandomLatents:
    """A data set of cached latents `entry` of `shape` and captions, or contexts of shape `context`: all random."""

    def __init__(self, length: int, entry: str, shape: Sequence[int], context: Sequence[int] | None = None) -> None:
        self.length, self.entry, self.shape, self.context = length, entry, tuple(shape), context

    def __len__(self) -> int:
        return self.length

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """One item."""
        item: dict[str, Any] = {self.entry: rng.standard_normal(self.shape, dtype="float32")}
        if self.context:
            return item | {"context": rng.standard_normal(self.context, dtype="float32")}
        return item | {"caption": "a small red circle to the left of a large blue square on a gray background"}


def training_configs(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `model` section to train, and what `RandomLatents` is to hold for it."""
    from omegaconf import OmegaConf

    from ldm.util import public_path

    places = {"bundled": "models/ldm/shapes64/config.yaml", "v1": "configs/stable-diffusion/v1-inference.yaml"}
    model = OmegaConf.to_container(OmegaConf.load(public_path(places[name])).model, resolve=True)
    model["base_learning_rate"] = 1e-6
    if name == "bundled":
        model["params"]["use_ema"] = True
        return model, {"entry": "moments", "shape": (16, 8, 8)}
    nothing = {"target": "torch.nn.Identity"}  # latents and contexts are there already
    model["params"] |= {"image_size": 32, "cond_stage_config": nothing}
    model["params"]["first_stage_config"] = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    return model, {"entry": "latents", "shape": (4, 32, 32), "context": (77, 768)}


def plain_step(model: LatentDiffusion, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any], bf16: bool) -> None:
    """One step of training as a short script would do it: noise, forward, loss, backward, optimiser, averages."""
    import torch
    import torch.nn.functional as F

    if "moments" in batch:
        mean, logvar = batch["moments"].chunk(2, dim=1)
        z = model.scale_factor * (mean + (0.5 * logvar).exp() * torch.randn_like(mean))
    else:
        z = model.scale_factor * batch["latents"]
    with torch.autocast(z.device.type, torch.bfloat16, enabled=bf16):
        context = batch["context"] if "context" in batch else model.cond_stage_model(batch["caption"])
        noise = torch.randn_like(z)
        t = torch.randint(0, model.num_timesteps, (len(z),), device=z.device)
        clean, noisy = (
            x[t][:, None, None, None] for x in (model.sqrt_alphas_cumprod, model.sqrt_one_minus_alphas_cumprod)
        )
        output = model.model.diffusion_model(clean * z + noisy * noise, t, context=context)
        loss = F.mse_loss(output.float(), noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for average, module in model.averages():
        average(module)


def measure_training(args: argparse.Namespace, device: torch.device, folder: Path) -> list[tuple[float, float]]:
    """Seconds of (a step of a run, a plain step) on the same weights, `args.steps` pairs.

    Plain steps are taken between those of a run, so that both meet the same machine. The run is one of
    scripts/train.py in all but pictures and checkpoints; `folder` is its folder.
    """
    import pytorch_lightning as pl
    import torch

    from ldm.training.run import build_data, build_model, build_trainer, set_learning_rate
    from ldm.training.stopping import Signals

    pairs: list[tuple[float, float]] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    class InTurns(pl.Callback):
        resumed: float | None = None

        def on_train_batch_end(self, trainer: pl.Trainer, model: Any, outputs: Any, batch: Any, index: int) -> None:
            stopped = now()
            plain_step(model, trainer.optimizers[0], batch, args.precision == "bf16")
            resumed = now()
            if self.resumed is not None and index > WARM_UP:
                pairs.append((stopped - self.resumed, resumed - stopped))
            self.resumed = resumed

    settings = _settings(args, device)
    data, model = build_data(settings), build_model(settings)
    trainer = build_trainer(settings, model, folder, now="benchmark")
    set_learning_rate(model, settings, data.batch_size, 1)
    unwanted = (pl.callbacks.Checkpoint, Signals)  # Ctrl-C has nothing to save
    trainer.callbacks = [*(c for c in trainer.callbacks if not isinstance(c, unwanted)), InTurns()]
    trainer.fit(model, datamodule=data)
    return pairs


def _settings(args: argparse.Namespace, device: torch.device) -> Any:
    from ldm.training.configs import Settings
    from ldm.util import trust

    trust("scripts.benchmark")
    model, latents = training_configs(args.model)
    model["params"]["optimizer_config"] = {"target": OPTIMIZERS[args.optimizer]}
    steps = args.steps + WARM_UP + 1
    train = {"target": "scripts.benchmark.RandomLatents", "params": {"length": steps * args.batch, **latents}}
    trainer = {
        "accelerator": {"cuda": "gpu"}.get(device.type, device.type),
        "devices": [device.index or 0] if device.type == "cuda" else 1,
        "precision": PRECISIONS[args.precision],
        "max_steps": steps,
    }
    data = {
        "target": "ldm.data.loading.DataModuleFromConfig",
        "params": {"batch_size": args.batch, "num_workers": 0, "train": train},
    }
    lightning = {
        "trainer": trainer,
        "seed": 23,
        "scale_lr": False,
        "callbacks": {"image_logger": {"params": {"disabled": True}}},
    }
    return Settings({"model": model, "data": data}, lightning)


def training(args: argparse.Namespace) -> None:
    """Print images per second of a run and of a plain loop by their median steps, and the median of the ratios."""
    import torch

    from ldm.devices import choose_device

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        pairs = measure_training(args, device, Path(folder))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{args.model}, batch {args.batch}, {args.precision}, {args.optimizer}, {device} ({where}), {len(pairs)} steps"
    )
    for name, seconds in zip(("training run", "plain loop"), zip(*pairs)):
        step = statistics.median(seconds)
        print(f"{name:13} {args.batch / step:8.2f} images/s {1000 * step:9.1f} ms a step")
    print(f"run / plain   {statistics.median(plain / run for run, plain in pairs):8.3f} of the speed")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    {"training": training}[args.suite](args)


if __name__ == "__main__":
    sys.exit(cli.run(main))
