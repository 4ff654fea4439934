"""Training from cached latents: steps of a run of scripts/train.py, and of a plain loop over the same modules."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from benchmarks.comparing import Bench, explain, finished, release
from benchmarks.memory import Peak
from benchmarks.rows import Row, row_of
from benchmarks.settings import V1, Scan, Settings
from benchmarks.timing import clock_of

if TYPE_CHECKING:
    import numpy as np

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.training.settings import Settings as RunSettings

logger = logging.getLogger(__name__)

WARM_UP = 1  # steps that are not counted
BATCHES = {False: (16,), True: (32,)}  # on a GPU
OPTIMIZERS = {"adamw": "torch.optim.AdamW", "sgd": "torch.optim.SGD"}
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
CONFIGS = {"bundled": "models/ldm/shapes64/config.yaml", "v1": V1}
DEFAULTS = {"model": None, "steps": 50, "optimizer": "adamw"}  # None: v1 on a GPU, else the bundled one
RUN, PLAIN = "training run", "plain loop"


def rows(bench: Bench) -> Iterator[Row]:
    """Images a second of both, in turns, of every scan."""
    settings = bench.settings
    options = {**DEFAULTS, **settings.train}
    model = options["model"] or ("v1" if settings.on_gpu else "bundled")
    sizes = (512,) if settings.on_gpu else (256,)
    for scan in settings.scans(sizes, BATCHES[settings.on_gpu], only_size=64 if model == "bundled" else None):
        if scan.precision not in PRECISIONS:
            logger.warning("training in %s: measured in bf16, which keeps its range", scan.precision)
            scan = Scan("bf16", scan.batch, scan.size)
        what = f"{model}, {options['optimizer']}, cached latents"
        more = {"items": scan.batch, "unit": "images"}
        found = {who: row_of("train", what, who, settings.device, scan, **more) for who in (PLAIN, RUN)}
        try:
            with _quiet(), tempfile.TemporaryDirectory() as folder, torch.enable_grad(), Peak(settings.device) as peak:
                pairs = measure(model, options, scan, settings.device, Path(folder))
        except (RuntimeError, MemoryError) as error:
            found[RUN].error = explain(error)
            yield found[RUN]
            continue
        found[RUN].memory = peak.extra
        found[RUN].note = f"{len(pairs)} steps"
        runs, plains = zip(*pairs)
        yield from finished(found, {RUN: runs, PLAIN: plains})
        release(settings)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it nothing is told of a run's settings and its end."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "ldm.training")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            yield
    finally:
        for each, level in zip(loggers, levels):
            each.setLevel(level)


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


def model_and_latents(name: str, size: int = 256, recompute: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `model` section to train, and what `RandomLatents` is to hold for it, of pictures of `size` pixels.

    recompute: as v1's config has it, what the backward pass needs is computed again, to save memory.
    """
    model: dict[str, Any] = Settings(config=CONFIGS[name]).model_config["model"]
    model["base_learning_rate"] = 1e-6
    if name == "bundled":
        model["params"]["use_ema"] = True
        return model, {"entry": "moments", "shape": (16, 8, 8)}
    nothing = {"target": "torch.nn.Identity"}  # latents and contexts are there already
    model["params"]["unet_config"]["params"]["use_checkpoint"] = recompute
    model["params"] |= {"image_size": size // 8, "cond_stage_config": nothing}
    model["params"]["first_stage_config"] = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    return model, {"entry": "latents", "shape": (4, size // 8, size // 8), "context": (77, 768)}


def plain_step(model: LatentDiffusion, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any], bf16: bool) -> None:
    """One step of training as a short script would do it: noise, forward, loss, backward, optimiser, averages."""
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


def measure(
    model_name: str, options: Mapping[str, Any], scan: Scan, device: torch.device, folder: Path
) -> list[tuple[float, float]]:
    """Seconds of (a step of a run, a plain step) on the same weights, as many pairs as `options` have steps.

    Plain steps are taken between those of a run, so that both meet the same machine. The run is one of
    scripts/train.py in all but pictures and checkpoints; `folder` is its folder.
    """
    import pytorch_lightning as pl

    from ldm.training.run import build_data, build_model, build_trainer, set_learning_rate
    from ldm.training.signals import Signals

    pairs: list[tuple[float, float]] = []
    now = clock_of(device)

    class InTurns(pl.Callback):
        """Takes a plain step after each of the run, and the time of both."""

        resumed: float | None = None

        def on_train_batch_end(self, trainer: pl.Trainer, model: Any, outputs: Any, batch: Any, index: int) -> None:
            """Lightning's hook."""
            stopped = now()
            plain_step(model, trainer.optimizers[0], batch, scan.precision == "bf16")
            resumed = now()
            if self.resumed is not None and index > WARM_UP:
                pairs.append((stopped - self.resumed, resumed - stopped))
            self.resumed = resumed

    settings = _run_settings(model_name, options, scan, device)
    data, model = build_data(settings), build_model(settings)
    trainer = build_trainer(settings, model, folder, now="benchmark")
    set_learning_rate(model, settings, data.batch_size, 1)
    unwanted = (pl.callbacks.Checkpoint, Signals)  # Ctrl-C has nothing to save
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning declares it nowhere
    callbacks[:] = [*(c for c in callbacks if not isinstance(c, unwanted)), InTurns()]
    trainer.fit(model, datamodule=data)
    return pairs


def _run_settings(model_name: str, options: Mapping[str, Any], scan: Scan, device: torch.device) -> RunSettings:
    from ldm.training.settings import Settings as RunSettings

    model, latents = model_and_latents(model_name, scan.size, recompute=device.type != "cuda")
    model["params"]["optimizer_config"] = {"target": OPTIMIZERS[options["optimizer"]]}
    steps = options["steps"] + WARM_UP + 1
    items = {"length": steps * scan.batch, **latents}
    trainer = {
        "accelerator": {"cuda": "gpu"}.get(device.type, device.type),
        "devices": [device.index or 0] if device.type == "cuda" else 1,
        "precision": PRECISIONS[scan.precision],
        "max_steps": steps,
        "enable_progress_bar": False,
    }
    data = {
        "target": "ldm.data.loading.DataModuleFromConfig",
        "params": {
            "batch_size": scan.batch,
            "num_workers": 0,
            "train": {"target": f"{__name__}.RandomLatents", "params": items},
        },
    }
    lightning = {
        "trainer": trainer,
        "seed": 23,
        "scale_lr": False,
        "callbacks": {"image_logger": {"params": {"disabled": True}}},
    }
    return RunSettings({"model": model, "data": data}, lightning)
