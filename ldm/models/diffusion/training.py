"""What training a diffusion model needs: losses, Lightning's hooks, what the optimiser gets, the averages' updates."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.diffusion.buckets import TimestepBuckets
from ldm.models.diffusion.cond_dropout import ConditionDropout
from ldm.models.diffusion.distributed_rng import DistributedRNG, seeded
from ldm.models.diffusion.gaussian import Condition, GaussianDiffusion
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.ema import LitEma
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

VALIDATION_SEED = 23  # validation draws the same in every epoch, so that its losses can be compared


class DiffusionTraining(GaussianDiffusion):
    """The training side of `DDPM`, which explains the settings and makes the networks."""

    model: DiffusionWrapper
    model_ema: LitEma
    logvar: Tensor
    min_snr_weights: Tensor
    lvlb_weights: Tensor
    loss_type: str
    l_simple_weight: float
    original_elbo_weight: float
    learn_logvar: bool
    min_snr_gamma: float | None
    noise_offset: float
    use_ema: bool
    ema_every_micro_batch: bool
    condition_dropout: ConditionDropout
    scheduler_config: Mapping[str, Any] | None
    optimizer_config: Mapping[str, Any] | None
    learning_rate: float

    _watch: tuple[TimestepBuckets, str] | None = None  # where validation gathers losses by timestep
    _averaged_step = 0  # the optimiser step at which the averages were last updated

    # ---- losses ----

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """L1 or L2 distance, averaged or elementwise."""
        loss = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        return loss(pred, target, reduction="mean" if mean else "none")

    def get_target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say, given what its input was made of."""
        if self.parameterization == "eps":
            return noise
        return x_start if self.parameterization == "x0" else self.get_v(x_start, noise, t)

    def training_noise(self, x: Tensor) -> Tensor:
        """Noise for x (B, C, H, W): normal, with `noise_offset` times a normal constant a channel on top.

        The offset teaches a model to change a picture's mean colour, which plain noise leaves nearly untouched
        (Guttenberg 2023, "Diffusion with offset noise").
        """
        draws = DistributedRNG.of(self)
        noise = draws.randn_like(x)
        return noise + self.noise_offset * draws.randn_like(x[:, :, :1, :1]) if self.noise_offset else noise

    def p_losses(
        self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss at timesteps t (B,), and its parts by name (Ho et al. 2020, eq. 12 and 14)."""
        noise = self.training_noise(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        error = self.get_loss(output, self.get_target(x_start, noise, t), mean=False).flatten(1).mean(dim=1)  # (B,)
        if self._watch is not None:
            buckets, suffix = self._watch
            buckets.add(suffix, t, error)
        return self.weigh(error, t)

    def weigh(self, error: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss made of errors (B,) at timesteps t (B,), and its parts; "loss_simple" is the errors' plain mean."""
        prefix = "train" if self.training else "val"
        parts = {f"{prefix}/loss_simple": error.mean()}
        logvar = self.logvar[t]
        weighted = error if self.min_snr_gamma is None else self.min_snr_weights[t] * error
        gamma = weighted / logvar.exp() + logvar
        if self.learn_logvar:
            parts |= {f"{prefix}/loss_gamma": gamma.mean(), "logvar": self.logvar.detach().mean()}
        vlb = (self.lvlb_weights[t] * error).mean()
        loss = self.l_simple_weight * gamma.mean() + self.original_elbo_weight * vlb
        parts |= {f"{prefix}/loss_vlb": vlb, f"{prefix}/loss": loss}
        return loss, parts

    def draw_timesteps(self, x: Tensor) -> Tensor:
        """Random timesteps (B,) for x (B, ...)."""
        return DistributedRNG.of(self).timesteps(x.shape[0], self.num_timesteps, x.device)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch and its parts, in training or validation."""
        raise NotImplementedError

    def drop_conditions(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch with some of its conditions replaced, as `ucg_training` says."""
        return self.condition_dropout(batch, DistributedRNG.of(self))

    # ---- Lightning's hooks ----

    def on_train_start(self) -> None:
        """Note which steps are done already, in a resumed run; name frozen stages that a new run leaves random."""
        self._averaged_step = self.global_step
        names = self.random_stages()
        if names and self.global_step == 0 and self.trainer.is_global_zero:
            logger.warning(
                "%s: frozen, and of random weights, for no file gave any: name one as ckpt_path in the config of each, "
                "or of the whole model",
                ", ".join(names),
            )

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss, its parts logged. FloatingPointError, before any weight changes, if it is not finite."""
        loss, parts = self.shared_step(self.drop_conditions(batch))
        self._check_finite(loss, parts)
        self._log(parts, batch, prog_bar=True, on_step=True)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Losses with the trained and with the averaged weights, of draws that are the same in every epoch."""
        if not hasattr(self, "_buckets"):
            self._buckets = TimestepBuckets(self.num_timesteps)
        logged: dict[str, Tensor] = {}
        for suffix, weights in (("", nullcontext()), ("_ema", self.ema_scope())):
            if suffix and not self.use_ema:  # public configs watch val/loss_simple_ema all the same
                logged |= {f"{name}{suffix}": value for name, value in logged.items()}
                break
            with weights, seeded(VALIDATION_SEED + batch_idx, self.device), self._watching(suffix):
                _, parts = self.shared_step(batch)
            logged |= {f"{name}{suffix}": value for name, value in parts.items()}
        self._log(logged, batch, on_step=False)

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss of every tenth of the timesteps: val/loss_simple_t000-099, ..."""
        if hasattr(self, "_buckets"):
            means = self._buckets.means(lambda totals: self.trainer.strategy.reduce(totals, reduce_op="sum"))
            self.log_dict({f"val/loss_simple_{name}": value for name, value in means.items()}, sync_dist=True)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the averages: once an optimiser step, or as the original with every micro-batch."""
        if self.ema_every_micro_batch or self.global_step > self._averaged_step:
            for average, module in self.averages():
                average(module)
        self._averaged_step = self.global_step

    @contextmanager
    def _watching(self, suffix: str) -> Iterator[None]:
        self._watch = (self._buckets, suffix)
        try:
            yield
        finally:
            self._watch = None

    def _log(self, parts: Mapping[str, Tensor], batch: Mapping[str, Any], **options: Any) -> None:
        size = len(next(iter(batch.values())))
        self.log_dict(parts, on_epoch=True, batch_size=size, sync_dist=self.trainer.world_size > 1, **options)

    def _check_finite(self, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        # Reading one number makes the CPU wait for the forward pass, a few per cent of a small model's step on CUDA;
        # to look later would be to train on what is wrong. All processes stop together, or the others would wait for
        # this one forever.
        finite = bool(torch.isfinite(loss.detach()))
        if self.trainer.world_size > 1:
            finite = self.trainer.strategy.reduce_boolean_decision(finite, all=True)
        if finite:
            return
        bad = [f"{name} = {float(value.detach()):g}" for name, value in parts.items() if not torch.isfinite(value)]
        spoilt = [name for name, parameter in self.named_parameters() if not torch.isfinite(parameter).all()]
        weights = f"; {len(spoilt)} weights are not finite either, {spoilt[0]} first" if spoilt else ""
        raise FloatingPointError(
            f"loss is not finite at step {self.global_step}: {', '.join(bad) or 'in another process'}{weights}; "
            "try a lower learning rate, or lightning.trainer.gradient_clip_val=1.0"
        )

    def random_stages(self) -> list[str]:
        """The names of parts that are not trained, and that no file gave weights."""
        if hasattr(self, "checkpoint_path"):  # what it lacked was said when it was read
            return []
        return [
            name
            for name, part in self.named_children()
            if (weights := list(part.parameters()))
            and not any(weight.requires_grad for weight in weights)
            and not any(hasattr(module, "checkpoint_path") for module in part.modules())
        ]

    # ---- averages ----

    def averages(self) -> list[tuple[LitEma, nn.Module]]:
        """Every running average, with the module that it is one of."""
        return [(self.model_ema, self.model)] if self.use_ema else []

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within it the networks have their averaged weights, if there are any. `context` is public, and of no use."""
        for average, module in self.averages():
            average.swap(module)
        try:
            yield
        finally:
            for average, module in self.averages():
                average.swap(module)

    # ---- the optimiser ----

    def trained_modules(self) -> dict[str, nn.Module]:
        """The modules that are trained, by their names."""
        return {"model": self.model}

    def train_only(self, globs: Sequence[str]) -> None:
        """Freeze all that would be trained but the parameters whose names match one of `globs`.

        Raises ValueError, with names that are near, for a glob that matches none.
        """
        trained = {
            f"{prefix}.{name}": parameter
            for prefix, module in self.trained_modules().items()
            for name, parameter in module.named_parameters()
        }
        kept: set[str] = set()
        for glob in [globs] if isinstance(globs, str) else globs:
            matches = {name for name in trained if fnmatchcase(name, glob)}
            if not matches:
                raise ValueError(f"train_only: no trained parameter is called {glob!r}; {_near(glob, list(trained))}")
            kept |= matches
        for name in trained.keys() - kept:
            trained[name].requires_grad_(False)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimiser trains."""
        modules = self.trained_modules().values()
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        return [*parameters, *([self.get_parameter("logvar")] if self.learn_logvar else [])]

    def configure_optimizers(self) -> Any:
        """AdamW, or `optimizer_config`, at `self.learning_rate`, with the config's schedule every step."""
        config = self.optimizer_config or {"target": "torch.optim.AdamW"}
        if "lr" in (config.get("params") or {}):
            raise ValueError("optimizer_config: the learning rate is model.base_learning_rate; leave out params.lr")
        optimizer = instantiate_from_config(config, params=self.trainable_parameters(), lr=self.learning_rate)
        if self.scheduler_config is None:
            return optimizer
        factor = instantiate_from_config(self.scheduler_config).schedule
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 1}]


def _near(glob: str, names: Sequence[str]) -> str:
    """Names like `glob`, for a message: those with a part like the first part of it that none has."""
    parts = sorted({part for name in names for part in name.split(".")})
    wrong = (piece for piece in re.findall(r"[^*?.\[\]]+", glob) if not any(piece in part for part in parts))
    like = next((part for piece in wrong for part in difflib.get_close_matches(piece, parts, n=1, cutoff=0.0)), "")
    near = [name for name in names if like in name.split(".")] if like else names
    return f"near are {', '.join(near[:3])}"
