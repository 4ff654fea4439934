"""Training parts that all models share: optimizers, averaged weights, checks of the loss, losses by timestep."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.modules.ema import LitEma
from ldm.util import instantiate_from_config


def disabled_train(self: Any, mode: bool = True) -> Any:
    """Stand in for `train` of a frozen module; the published name. `freeze` and `DDPM.train` do this work here."""
    return self


def freeze(module: nn.Module) -> nn.Module:
    """Put `module` in evaluation mode, without gradients."""
    return module.eval().requires_grad_(False)


@contextmanager
def averaged_weights(averages: Iterable[tuple[LitEma, nn.Module]]) -> Iterator[None]:
    """Give modules their averaged weights inside the context; weights and averages swap places meanwhile."""
    pairs = list(averages)
    for average, module in pairs:
        average.swap(module)
    try:
        yield
    finally:
        for average, module in pairs:
            average.swap(module)


def random_stages(module: nn.Module) -> list[str]:
    """Names of children that are not trained and got no weights from a file."""
    if hasattr(module, "checkpoint_path"):  # loading reported what the file lacks
        return []
    return [
        name
        for name, part in module.named_children()
        if (weights := list(part.parameters()))
        and not any(weight.requires_grad for weight in weights)
        and not any(hasattr(child, "checkpoint_path") for child in part.modules())
    ]


# ---- optimizers ----


def make_optimizer(
    parameters: Iterable[nn.Parameter], learning_rate: float, config: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """Build the optimizer of a `{target, params}` config, which must leave the learning rate to the model."""
    if "lr" in (config.get("params") or {}):
        raise ValueError("optimizer_config: the learning rate is model.base_learning_rate; leave out params.lr")
    return instantiate_from_config(config, params=list(parameters), lr=learning_rate)


def lr_schedules(
    optimizers: Sequence[torch.optim.Optimizer], scheduler_config: Mapping[str, Any] | None
) -> list[dict[str, Any]]:
    """Lightning's entries for a schedule that multiplies every optimizer's learning rate at every step."""
    if scheduler_config is None:
        return []
    factor = instantiate_from_config(scheduler_config).schedule
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor) for optimizer in optimizers]
    return [{"scheduler": schedule, "interval": "step", "frequency": 1} for schedule in schedules]


def freeze_all_but(parameters: Mapping[str, nn.Parameter], globs: str | Sequence[str]) -> None:
    """Freeze the parameters whose names match none of `globs`.

    Raises:
        ValueError: a glob matches no name; the message lists similar names.
    """
    trained: set[str] = set()
    for glob in [globs] if isinstance(globs, str) else globs:
        matches = {name for name in parameters if fnmatchcase(name, glob)}
        if not matches:
            raise ValueError(
                f"train_only: no trained parameter is called {glob!r}; {_similar_names(glob, list(parameters))}"
            )
        trained |= matches
    for name in parameters.keys() - trained:
        parameters[name].requires_grad_(False)


def _similar_names(glob: str, names: Sequence[str]) -> str:
    """Names for an error message: those whose parts resemble the first part of `glob` that no name has."""
    parts = sorted({part for name in names for part in name.split(".")})
    wrong = (piece for piece in re.findall(r"[^*?.\[\]]+", glob) if not any(piece in part for part in parts))
    like = next((part for piece in wrong for part in difflib.get_close_matches(piece, parts, n=1, cutoff=0.0)), "")
    similar = [name for name in names if like in name.split(".")] if like else names
    return f"similar names: {', '.join(similar[:3])}"


# ---- the loss ----


def check_finite(module: pl.LightningModule, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
    """Raise FloatingPointError, before any weight changes, if the loss is not finite in any process.

    Reading the number makes the CPU wait for the forward pass, a few per cent of a small model's step on CUDA; a later
    check would come after the damage. All processes stop together, or the others would wait for this one forever.
    """
    finite = bool(torch.isfinite(loss.detach()))
    if module.trainer.world_size > 1:
        finite = module.trainer.strategy.reduce_boolean_decision(finite, all=True)
    if finite:
        return
    bad = [f"{name} = {float(value.detach()):g}" for name, value in parts.items() if not torch.isfinite(value)]
    broken = [name for name, parameter in module.named_parameters() if not torch.isfinite(parameter).all()]
    weights = f"; {len(broken)} weights are not finite either, {broken[0]} first" if broken else ""
    raise FloatingPointError(
        f"loss is not finite at step {module.global_step}: {', '.join(bad) or 'in another process'}{weights}; "
        "try a lower learning rate, or lightning.trainer.gradient_clip_val=1.0"
    )


class TimestepBuckets:
    """Means of per-item losses over equal ranges of timesteps, gathered over batches and processes."""

    def __init__(self, num_timesteps: int, count: int = 10) -> None:
        self.num_timesteps = num_timesteps
        self.count = min(count, num_timesteps)
        self.totals: dict[str, Tensor] = {}  # by suffix: (2, count), sums and numbers of losses

    def add(self, suffix: str, t: Tensor, errors: Tensor) -> None:
        """Count the losses `errors` (B,) of items at timesteps t (B,)."""
        index = t * self.count // self.num_timesteps
        values = torch.stack([errors.detach(), torch.ones_like(errors)]).float()  # (2, B)
        totals = self.totals.setdefault(suffix, values.new_zeros(2, self.count))
        totals.index_add_(1, index, values)

    def means(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Mean losses by "t000-099" and suffix, without empty ranges; start again from zero.

        Args:
            reduce_sum: sums a tensor over all processes, so that all of them log the same ranges.
        """
        means = {}
        for suffix, totals in self.totals.items():
            sums, counts = reduce_sum(totals)
            for i in torch.nonzero(counts).flatten().tolist():
                means[f"{self._name(i)}{suffix}"] = sums[i] / counts[i]
        self.totals = {}
        return means

    def _name(self, index: int) -> str:
        # the timesteps t with t * count // num_timesteps == index
        first, after = (-(-i * self.num_timesteps // self.count) for i in (index, index + 1))
        digits = len(str(self.num_timesteps - 1))
        return f"t{first:0{digits}}-{after - 1:0{digits}}"


# ---- images for people ----


def colorize(maps: Tensor, projection: Tensor) -> Tensor:
    """Maps (B, C, H, W) as colors (B, 3, H, W) in [-1, 1], by a projection (3, C, 1, 1)."""
    x = nn.functional.conv2d(maps.float(), projection)
    return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0
