"""Speed of training from cached latents: steps of scripts/train.py and of a plain loop over the same modules."""

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

from benchmarks.compare import Bench, explain, finish, release
from benchmarks.measure import PeakMemory, synchronized_clock
from benchmarks.settings import V1, Row, Scan, Settings, row_of

if TYPE_CHECKING:
    import numpy as np

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.training.settings import Settings as RunSettings

logger = logging.getLogger(__name__)

WARM_UP = 1  # steps that do not count
BATCHES = {False: (16,), True: (32,)}  # by whether on a GPU
OPTIMIZERS = {"adamw": "torch.optim.AdamW", "sgd": "torch.optim.SGD"}
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
CONFIGS = {"bundled": "models/ldm/shapes64/config.yaml", "v1": V1}
DEFAULTS = {"model": None, "steps": 50, "optimizer": "adamw"}  # None: v1 on a GPU, else the bundled one
RUN, PLAIN = "training run", "plain loop"


def train(bench: Bench) -> Iterator[Row]:
    """Measure images per second of both, interleaved."""
    settings = bench.settings
    options = {**DEFAULTS, **settings.train}
    model = options["model"] or ("v1" if settings.on_gpu else "bundled")
    sizes = (512,) if settings.on_gpu else (256,)
    for scan in settings.scans(sizes, BATCHES[settings.on_gpu], only_size=64 if model == "bundled" else None):
        if scan.precision not in PRECISIONS:
            logger.warning("training in %s: measured in bf16, which has the range of fp32", scan.precision)
            scan = Scan("bf16", scan.batch, scan.size)
        what = f"{model}, {options['optimizer']}, cached latents"
        more = {"items": scan.batch, "unit": "images"}
        found = {who: row_of("train", what, who, settings.device, scan, **more) for who in (PLAIN, RUN)}
        try:
            with (
                _quiet(),
                tempfile.TemporaryDirectory() as folder,
                torch.enable_grad(),
                PeakMemory(settings.device) as peak,
            ):
                pairs = measure(model, options, scan, settings.device, Path(folder))
        except (RuntimeError, MemoryError) as error:
            found[RUN].error = explain(error)
            yield found[RUN]
            continue
        found[RUN].memory = peak.extra
        found[RUN].note = f"{len(pairs)} steps"
        runs, plains = zip(*pairs)
        yield from finish(found, {RUN: runs, PLAIN: plains})
        release(settings)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the messages of a run."""
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
    """Dataset of random latents `entry` of `shape`, with a caption or with random contexts of shape `context`."""

    def __init__(self, length: int, entry: str, shape: Sequence[int], context: Sequence[int] | None = None) -> None:
        self.length, self.entry, self.shape, self.context = length, entry, tuple(shape), context

    def __len__(self) -> int:
        return self.length

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return item `index`."""
        item: dict[str, Any] = {self.entry: rng.standard_normal(self.shape, dtype="float32")}
        if self.context:
            return item | {"context": rng.standard_normal(self.context, dtype="float32")}
        return item | {"caption": "a small red circle to the left of a large blue square on a gray background"}


def model_and_latents(name: str, size: int = 256, recompute: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a config's `model` section and the arguments of `RandomLatents` for images of `size` pixels.

    recompute: use gradient checkpointing, as v1's config does.
    """
    model: dict[str, Any] = Settings(config=CONFIGS[name]).model_config["model"]
    model["base_learning_rate"] = 1e-6
    if name == "bundled":
        model["params"]["use_ema"] = True
        return model, {"entry": "moments", "shape": (16, 8, 8)}
    identity = {"target": "torch.nn.Identity"}  # latents and contexts are cached
    model["params"]["unet_config"]["params"]["use_checkpoint"] = recompute
    model["params"] |= {"image_size": size // 8, "cond_stage_config": identity}
    model["params"]["first_stage_config"] = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    return model, {"entry": "latents", "shape": (4, size // 8, size // 8), "context": (77, 768)}


def plain_step(model: LatentDiffusion, optimizer: torch.optim.Optimizer, batch: Mapping[str, Any], bf16: bool) -> None:
    """Take a training step as a short script would: noise, forward, loss, backward, optimizer, EMA."""
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
    """Measure pairs of (seconds of a step of a run, seconds of a plain step) on the same weights.

    Plain steps alternate with those of the run, which is one of scripts/train.py in `folder`, without image logs and
    checkpoints.
    """
    import pytorch_lightning as pl

    from ldm.training.run import build_data, build_model, build_trainer, set_learning_rate
    from ldm.training.signals import Signals
    from ldm.util import trust

    pairs: list[tuple[float, float]] = []
    now = synchronized_clock(device)

    class InTurns(pl.Callback):
        """Take a plain step after each of the run, and time both."""

        resumed: float | None = None

        def on_train_batch_end(self, trainer: pl.Trainer, model: Any, outputs: Any, batch: Any, index: int) -> None:
            """Time the step that ended, then a plain one."""
            stopped = now()
            plain_step(model, trainer.optimizers[0], batch, scan.precision == "bf16")
            resumed = now()
            if self.resumed is not None and index > WARM_UP:
                pairs.append((stopped - self.resumed, resumed - stopped))
            self.resumed = resumed

    trust(__name__)  # for RandomLatents in the run's config
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
