"""Diffusion models as Lightning modules: `DDPM` in pixels, `LatentDiffusion` in the latents of a first stage.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; Rombach et al. 2022, "High-Resolution Image Synthesis with
Latent Diffusion Models". A training step, read from top to bottom: `training_step`, `shared_step`, `get_input`,
`forward`, `p_losses`, and `_denoising_losses`, which computes the loss. Models with further inputs are in
`special_models`; their public names are here, too.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ldm.checkpoint import init_from_checkpoint
from ldm.models.autoencoder import VQModelInterface
from ldm.models.diffusion.batches import (
    CLASS_KEYS,
    CONTEXT,
    PLAIN_KEYS,
    TEXT_KEYS,
    ConditionDropout,
    entry_of,
    first_rows,
    image_sides,
    images_of,
)
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.distributed_rng import DistributedRNG, seeded
from ldm.models.diffusion.guidance import Condition
from ldm.models.diffusion.image_logs import (
    condition_images,
    diffuse,
    image_row,
    outer_mask,
    sampling_options,
    select_logs,
)
from ldm.models.diffusion.noise import NoiseSource
from ldm.models.model_info import ModelInfo
from ldm.models.training import (
    TimestepBuckets,
    averaged_weights,
    check_finite,
    colorize,
    disabled_train,
    freeze,
    freeze_all_but,
    lr_schedules,
    make_optimizer,
    random_stages,
)
from ldm.modules.diffusionmodules.schedule import (
    PARAMETERIZATIONS,
    extract_into_tensor,
    make_beta_schedule,
    min_snr_weights,
    rescale_zero_terminal_snr,
    schedule_buffers,
    vlb_weights,
)
from ldm.modules.diffusionmodules.util import noise_like
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, normal_kl
from ldm.modules.ema import LitEma
from ldm.util import FIRST_STAGE, UNCONDITIONAL, instantiate_from_config

__all__ = ["DDPM", "DiffusionWrapper", "LatentDiffusion", "disabled_train", "image_sides", "uniform_on_device"]

logger = logging.getLogger(__name__)

__conditioning_keys__ = {"concat": "c_concat", "crossattn": "c_crossattn", "adm": "y"}
CONDITIONING_KEYS = (None, "concat", "crossattn", "hybrid", "adm", "hybrid-adm", "crossattn-adm")
ADAMW = {"target": "torch.optim.AdamW"}
VALIDATION_SEED = 23  # validation uses the same random numbers in every epoch, so that its losses can be compared
LOADING_KEYS = ("ckpt_path", "ignore_keys", "load_only_unet", "train_only", "reset_ema", "reset_num_ema_updates")

Losses = tuple[Tensor, dict[str, Tensor]]


def uniform_on_device(r1: float, r2: float, shape: Sequence[int], device: torch.device | str) -> Tensor:
    """Uniform random numbers of `shape` between r1 and r2."""
    return (r1 - r2) * torch.rand(*shape, device=device) + r2


def pop_loading(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Take the keywords of `DDPM._load` out of a constructor's, which loads weights when all its modules exist."""
    return {name: kwargs.pop(name) for name in LOADING_KEYS if name in kwargs}


class DiffusionWrapper(pl.LightningModule):
    """The network, given its condition in the way that `conditioning_key` names.

    Args:
        diff_model_config: the network; `sequential_crossattn: true` passes several contexts as a list.
        conditioning_key: None, concat, crossattn, hybrid, adm, hybrid-adm or crossattn-adm.
    """

    def __init__(self, diff_model_config: Mapping[str, Any], conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING_KEYS:
            raise ValueError(
                f"conditioning_key {conditioning_key!r} is not one of {', '.join(map(str, CONDITIONING_KEYS))}"
            )
        self.sequential_cross_attn = bool(diff_model_config.get("sequential_crossattn", False))
        self.diffusion_model: Any = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Sequence[Tensor] | None = None,
        c_crossattn: Sequence[Tensor] | None = None,
        c_adm: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, H, W), t (B,), c_concat (B, C', H, W) each, c_crossattn (B, M, D) each, c_adm as the UNet's y."""
        key = self.conditioning_key
        inputs: dict[str, Any] = {}
        if key == "adm":  # as published, labels of a class-conditional network come as the cross-attention list
            inputs["y"] = self._need(c_crossattn, "c_crossattn")[0]
        elif key is not None:
            if "hybrid" in key or key == "concat":
                x = torch.cat([x, *self._need(c_concat, "c_concat")], dim=1)
            if key != "concat":
                contexts = list(self._need(c_crossattn, "c_crossattn"))
                # a single context stays the same tensor object, which caches of its keys and values look for
                joined = contexts[0] if len(contexts) == 1 else torch.cat(contexts, dim=1)
                inputs["context"] = contexts if self.sequential_cross_attn else joined
            if key.endswith("-adm"):
                inputs["y"] = self._need(c_adm, "c_adm")
        return self.diffusion_model(x, t, **inputs)

    def _need(self, value: Any, name: str) -> Any:
        if value is None:
            raise ValueError(f"conditioning_key {self.conditioning_key!r} needs {name!r} in the condition")
        return value


class DDPM(pl.LightningModule):
    """Denoising diffusion in the space of the batch itself (Ho et al. 2020).

    In all methods x is (B, C, H, W) and t (B,) int64.

    Args:
        unet_config: the network.
        loss_type: "l1" or "l2".
        ckpt_path, ignore_keys, load_only_unet: a checkpoint to start from, see `init_from_ckpt`.
        use_ema: average the weights; `ema_scope` uses the average.
        first_stage_key: the batch's entry to model.
        image_size, channels: of the space of diffusion.
        original_elbo_weight, l_simple_weight: weights of the variational and of the simple loss.
        parameterization: prediction of the network: "eps", "x0" or "v".
        scheduler_config: the learning-rate schedule.
        use_positional_encodings: add `compute_latent_shifts(batch)`, a subclass's method, to conditions.
        learn_logvar: learn the loss's weight of every timestep, starting from `logvar_init`.
        ucg_training: conditions to drop in training, `{caption: {p: 0.1, val: ""}}`.
        reset_ema, reset_num_ema_updates: start the average again from the weights, or its warm-up, after `ckpt_path`.

    Not in the original, and off by default:
        min_snr_gamma: cap the loss's weights (Hang et al. 2023).
        rescale_betas_zero_snr: make the last timestep pure noise (Lin et al. 2023).
        noise_offset: add noise that is constant over each channel (Guttenberg 2023).
        optimizer_config: `{target, params}` of another optimizer than AdamW.
        train_only: globs of the parameters to train.
        ema_every_micro_batch: update averages with every micro-batch, as the original did.
    """

    model: DiffusionWrapper
    alphas_cumprod: Tensor
    logvar: Tensor
    lvlb_weights: Tensor
    min_snr_weights: Tensor
    learning_rate: float  # set by the training script

    _buckets: TimestepBuckets | None = None
    _bucket_suffix: str | None = None  # set while validation collects losses by timestep
    _averaged_step = 0  # the optimizer step of the last update of the averages

    def __init__(
        self,
        unet_config: Mapping[str, Any],
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int | Sequence[int] = 256,
        channels: int = 3,
        log_every_t: int = 100,
        clip_denoised: bool = True,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Sequence[float] | None = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping[str, Any] | None = None,
        use_positional_encodings: bool = False,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        make_it_fit: bool = False,
        ucg_training: Mapping[str, Mapping[str, Any]] | None = None,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
        *,
        min_snr_gamma: float | None = None,
        rescale_betas_zero_snr: bool = False,
        noise_offset: float = 0.0,
        optimizer_config: Mapping[str, Any] | None = None,
        train_only: Sequence[str] | None = None,
        ema_every_micro_batch: bool = False,
    ) -> None:
        super().__init__()
        if parameterization not in PARAMETERIZATIONS:
            raise ValueError(f"parameterization {parameterization!r} is not one of {', '.join(PARAMETERIZATIONS)}")
        if loss_type not in ("l1", "l2"):
            raise ValueError(f"loss_type {loss_type!r} is not one of l1, l2")
        if make_it_fit:
            raise ValueError("make_it_fit is not supported: finetune_keys of LatentFinetuneDiffusion widens weights")
        self.parameterization = parameterization
        self.loss_type = loss_type
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.log_every_t = log_every_t
        self.clip_denoised = clip_denoised
        self.original_elbo_weight = original_elbo_weight
        self.v_posterior = v_posterior
        self.l_simple_weight = l_simple_weight
        self.use_positional_encodings = use_positional_encodings
        self.learn_logvar = learn_logvar
        self.min_snr_gamma = min_snr_gamma
        self.rescale_betas_zero_snr = rescale_betas_zero_snr
        self.noise_offset = noise_offset
        self.ucg_training = dict(ucg_training or {})
        self.condition_dropout = ConditionDropout(ucg_training)
        self.use_scheduler = scheduler_config is not None
        self.scheduler_config = scheduler_config
        self.optimizer_config = optimizer_config or ADAMW
        self.restarted_from_ckpt = False
        self.frozen_stages: list[str] = []  # children that stay in evaluation mode
        self.acceleration: list[Any] = []  # handles of what is attached from outside
        if monitor is not None:
            self.monitor = monitor

        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.use_ema = use_ema
        self.ema_every_micro_batch = ema_every_micro_batch
        if use_ema:
            self.model_ema = LitEma(self.model)
        self.register_schedule(
            given_betas=given_betas,
            beta_schedule=beta_schedule,
            timesteps=timesteps,
            linear_start=linear_start,
            linear_end=linear_end,
            cosine_s=cosine_s,
        )
        logvar = torch.full((self.num_timesteps,), float(logvar_init), device="cpu")
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self._load(ckpt_path, ignore_keys, load_only_unet, train_only, reset_ema, reset_num_ema_updates)

    # ---- weights: files, averages, what is trained ----

    def _load(
        self,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        train_only: Sequence[str] | None = None,
        reset_ema: bool = False,
        reset_num_ema_updates: bool = False,
    ) -> None:
        """Finish a constructor, when all modules exist; subclasses take these keywords (`LOADING_KEYS`) from theirs."""
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys=ignore_keys, only_model=load_only_unet)
        for average, module in self.averages():
            if reset_ema:
                average.reset(module)
            if reset_num_ema_updates:
                average.reset_num_updates()
        if train_only is not None:
            self.train_only(train_only)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> list[str]:
        """Load the weights of a checkpoint that fit; log the others.

        Args:
            path: the checkpoint.
            ignore_keys: prefixes of keys to leave out.
            only_model: load the network alone.

        Returns:
            Keys of this model that the file has no weights for.
        """
        missing = init_from_checkpoint(
            self.model if only_model else self,
            path,
            ignore_keys,
            prefix="model." if only_model else "",
            widen=self.widened_keys(),
        )
        self.restarted_from_ckpt = True
        for average, module in self.averages():
            name = next(name for name, child in self.named_children() if child is average)
            if only_model or any(key.startswith(f"{name}.") for key in missing):
                average.reset(module)
        return missing

    def widened_keys(self) -> dict[str, int]:
        """Weights that may have fewer input channels in `ckpt_path`, and how many of those to take."""
        return {}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        logvar = None if self.learn_logvar else state_dict.pop(f"{prefix}logvar", None)  # some forks save the buffer
        if logvar is not None and logvar.shape == self.logvar.shape:
            self.logvar.copy_(logvar)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def averages(self) -> list[tuple[LitEma, nn.Module]]:
        """Every running average, with the module whose weights it averages."""
        return [(self.model_ema, self.model)] if self.use_ema else []

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Use the averaged weights, if there are any, inside the context; `context` names it for the debug log."""
        if context is not None and self.use_ema:
            logger.debug("%s: using averaged weights", context)
        with averaged_weights(self.averages()):
            yield

    def train(self, mode: bool = True) -> Any:
        """As `nn.Module.train`, but frozen stages stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen_stages:
            stage = getattr(self, name)
            if stage is not None:
                stage.eval()
        return self

    def trained_modules(self) -> dict[str, nn.Module]:
        """The modules to train, by name."""
        return {"model": self.model}

    def train_only(self, globs: str | Sequence[str]) -> None:
        """Freeze every trained parameter whose name matches none of `globs`."""
        freeze_all_but(
            {
                f"{prefix}.{name}": parameter
                for prefix, module in self.trained_modules().items()
                for name, parameter in module.named_parameters()
            },
            globs,
        )

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer gets."""
        modules = self.trained_modules().values()
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        return [*parameters, *([self.get_parameter("logvar")] if self.learn_logvar else [])]

    def configure_optimizers(self) -> Any:
        """AdamW, or `optimizer_config`, at `self.learning_rate`, with `scheduler_config` at every step."""
        optimizer = make_optimizer(self.trainable_parameters(), self.learning_rate, self.optimizer_config)
        return ([optimizer], lr_schedules([optimizer], self.scheduler_config)) if self.use_scheduler else optimizer

    # ---- the noise schedule and its formulas ----

    def register_schedule(
        self,
        given_betas: Sequence[float] | np.ndarray | None = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Compute and register the buffers of a noise schedule, named or given as betas."""
        if given_betas is None:
            betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        else:
            betas = np.asarray(given_betas, dtype=np.float64)
        if self.rescale_betas_zero_snr:
            if self.parameterization == "eps":
                raise ValueError(
                    "rescale_betas_zero_snr needs parameterization v or x0: at the last timestep the input is the "
                    "noise, and predicting it teaches an eps model nothing"
                )
            betas = rescale_zero_terminal_snr(betas)
        self.num_timesteps = len(betas)
        self.linear_start = linear_start
        self.linear_end = linear_end
        buffers = schedule_buffers(betas, self.v_posterior)
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self.register_buffer("lvlb_weights", vlb_weights(buffers, self.parameterization), persistent=False)
        if self.min_snr_gamma is not None:
            weights = min_snr_weights(self.alphas_cumprod, self.min_snr_gamma, self.parameterization)
            self.register_buffer("min_snr_weights", weights, persistent=False)

    def _at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """The buffer `name` at timesteps t (B,), shaped to broadcast over x."""
        return extract_into_tensor(getattr(self, name), t, x.shape)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x_0)."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = 1.0 - self._at("alphas_cumprod", t, x_start)
        return mean, variance, self._at("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """A sample of q(x_t | x_0) = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (eq. 4)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = self._at("sqrt_alphas_cumprod", t, x_start)
        return signal * x_start + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_t and eps."""
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * noise
        )

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022)."""
        return self._at("sqrt_alphas_cumprod", t, x) * noise - self._at("sqrt_one_minus_alphas_cumprod", t, x) * x

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 from x_t and v."""
        return self._at("sqrt_alphas_cumprod", t, x_t) * x_t - self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * v

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """eps from x_t and v."""
        return self._at("sqrt_alphas_cumprod", t, x_t) * v + self._at("sqrt_one_minus_alphas_cumprod", t, x_t) * x_t

    def _predict_start(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x_0 from x_t and the network's output."""
        if self.parameterization == "eps":
            return self.predict_start_from_noise(x_t, t=t, noise=output)
        return self.predict_start_from_z_and_v(x_t, t, output) if self.parameterization == "v" else output

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0) (eq. 6 and 7)."""
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        return mean, self._at("posterior_variance", t, x_t), self._at("posterior_log_variance_clipped", t, x_t)

    # ---- the loss ----

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """The network's output for x_noisy at timesteps t, which may be fractional."""
        return self.model(x_noisy, t)

    def get_input(self, batch: Mapping[str, Any], k: str) -> Any:
        """Images `batch[k]` (B, H, W, C) as (B, C, H, W) float32."""
        return images_of(batch, k, self.device)

    def shared_step(self, batch: Mapping[str, Any]) -> Losses:
        """Loss of a batch and its parts by name, in training or validation."""
        return self(self.get_input(batch, self.first_stage_key))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Losses:
        """Loss of x at random timesteps."""
        return self.p_losses(x, self._random_timesteps(x), *args, **kwargs)

    def p_losses(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Losses:
        """Loss of x_start at timesteps t, and its parts by name."""
        return self._denoising_losses(x_start, None, t, noise)

    def _random_timesteps(self, x: Tensor) -> Tensor:
        return DistributedRNG.for_module(self).timesteps(x.shape[0], self.num_timesteps, x.device)

    def _denoising_losses(self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None) -> Losses:
        """The simple and the variational loss (Ho et al. 2020, eq. 14 and 12) under `cond`."""
        noise = self.training_noise(x_start) if noise is None else noise
        x_noisy = self.q_sample(x_start=x_start, t=t, noise=noise)
        output = self.apply_model(x_noisy, t, cond)
        if self.parameterization == "eps":
            target = noise
        else:
            target = x_start if self.parameterization == "x0" else self.get_v(x_start, noise, t)
        error = self.get_loss(output, target, mean=False).flatten(1).mean(dim=1)  # (B,)
        if self._buckets is not None and self._bucket_suffix is not None:
            self._buckets.add(self._bucket_suffix, t, error)

        prefix = "train" if self.training else "val"
        logvar = self.logvar[t]
        weighted = error if self.min_snr_gamma is None else self.min_snr_weights[t] * error
        gamma = (weighted / logvar.exp() + logvar).mean()
        vlb = (self.lvlb_weights[t] * error).mean()
        loss = self.l_simple_weight * gamma + self.original_elbo_weight * vlb
        parts = {f"{prefix}/loss_simple": error.mean()}
        if self.learn_logvar:
            parts |= {f"{prefix}/loss_gamma": gamma, "logvar": self.logvar.detach().mean()}
        return loss, parts | {f"{prefix}/loss_vlb": vlb, f"{prefix}/loss": loss}

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """L1 or L2 distance, averaged or elementwise."""
        loss = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        return loss(pred, target, reduction="mean" if mean else "none")

    def training_noise(self, x: Tensor) -> Tensor:
        """Noise for x: normal, plus `noise_offset` times a normal constant for each channel.

        The offset teaches a model to change an image's mean color, which plain noise leaves nearly untouched
        (Guttenberg 2023, "Diffusion with offset noise").
        """
        rng = DistributedRNG.for_module(self)
        noise = rng.randn_like(x)
        return noise + self.noise_offset * rng.randn_like(x[:, :, :1, :1]) if self.noise_offset else noise

    # ---- training ----

    def drop_conditions(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch with some of its conditions replaced, by `ucg_training`."""
        return self.condition_dropout(batch, DistributedRNG.for_module(self))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Compute and log the loss; raise FloatingPointError if it is not finite."""
        loss, parts = self.shared_step(self.drop_conditions(batch))
        check_finite(self, loss, parts)
        self._log(parts, batch, prog_bar=True, on_step=True)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Log losses of the weights and of their averages, from random numbers that are the same in every epoch."""
        if self._buckets is None:
            self._buckets = TimestepBuckets(self.num_timesteps)
        logged: dict[str, Tensor] = {}
        for suffix, weights in (("", nullcontext()), ("_ema", self.ema_scope())):
            if suffix and not self.use_ema:  # public configs monitor val/loss_simple_ema all the same
                logged |= {f"{name}{suffix}": value for name, value in logged.items()}
                break
            self._bucket_suffix = suffix
            try:
                with weights, seeded(VALIDATION_SEED + batch_idx, self.device):
                    _, parts = self.shared_step(batch)
            finally:
                self._bucket_suffix = None
            logged |= {f"{name}{suffix}": value for name, value in parts.items()}
        self._log(logged, batch, on_step=False)

    def _log(self, parts: Mapping[str, Tensor], batch: Mapping[str, Any], **options: Any) -> None:
        size = len(next(iter(batch.values())))
        self.log_dict(parts, on_epoch=True, batch_size=size, sync_dist=self.trainer.world_size > 1, **options)

    def on_train_start(self) -> None:
        """Remember the steps of a resumed run; warn of frozen stages that a new run leaves with random weights."""
        self._averaged_step = self.global_step
        names = random_stages(self)
        if names and self.global_step == 0 and self.trainer.is_global_zero:
            logger.warning(
                "%s: frozen, but with random weights: give each a ckpt_path in its config, or one to the model",
                ", ".join(names),
            )

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the averages: after every optimizer step, or with `ema_every_micro_batch` after every batch."""
        if self.ema_every_micro_batch or self.global_step > self._averaged_step:
            for average, module in self.averages():
                average(module)
        self._averaged_step = self.global_step

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss of every tenth of the timesteps: val/loss_simple_t000-099, ..."""
        if self._buckets is not None:
            means = self._buckets.means(lambda totals: self.trainer.strategy.reduce(totals, reduce_op="sum"))
            self.log_dict({f"val/loss_simple_{name}": value for name, value in means.items()}, sync_dist=True)

    # ---- ancestral sampling (algorithm 2) ----

    def p_mean_variance(self, x: Tensor, t: Tensor, clip_denoised: bool) -> tuple[Tensor, ...]:
        """Mean, variance and log variance of p(x_{t-1} | x_t)."""
        x_recon = self._predict_start(x, t, self.apply_model(x, t))
        if clip_denoised:
            x_recon = x_recon.clamp(-1.0, 1.0)
        return self.q_posterior(x_start=x_recon, x_t=x, t=t)

    @torch.no_grad()
    def p_sample(self, x: Tensor, t: Tensor, clip_denoised: bool = True, repeat_noise: bool = False) -> Any:
        """A sample of p(x_{t-1} | x_t); the mean at t = 0."""
        mean, _, log_variance = self.p_mean_variance(x=x, t=t, clip_denoised=clip_denoised)
        return self._add_noise(mean, log_variance, t, noise_like(x.shape, x.device, repeat_noise))

    def _add_noise(self, mean: Tensor, log_variance: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        nonzero = (t != 0).float().reshape(-1, *(1,) * (mean.ndim - 1))
        return mean + nonzero * (0.5 * log_variance).exp() * noise

    @torch.no_grad()
    def p_sample_loop(self, shape: Sequence[int], return_intermediates: bool = False) -> Any:
        """Sample images of `shape` (B, C, H, W); with `return_intermediates` also a list of x_t on the way."""
        x = torch.randn(tuple(shape), device=self.device)
        intermediates = [x]
        for i in tqdm(reversed(range(self.num_timesteps)), desc="Sampling", total=self.num_timesteps):
            t = torch.full((shape[0],), i, device=self.device, dtype=torch.long)
            x = self.p_sample(x, t, clip_denoised=self.clip_denoised)
            if i % self.log_every_t == 0 or i == self.num_timesteps - 1:
                intermediates.append(x)
        return (x, intermediates) if return_intermediates else x

    @torch.no_grad()
    def sample(self, batch_size: int = 16, return_intermediates: bool = False) -> Any:
        """Sample images of the model's own size."""
        shape = (batch_size, self.channels, *image_sides(self.image_size))
        return self.p_sample_loop(shape, return_intermediates=return_intermediates)

    # ---- images of training ----

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 2,
        sample: bool = True,
        return_keys: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Images (B, C, H, W), about in [-1, 1], by name: inputs, diffusion_row, samples, denoise_row.

        Args:
            batch: as in training.
            N: number of items.
            n_row: number of items in the one image that a `..._row` is.
            sample: sample, too.
            return_keys: only these, if there are such.
            **kwargs: options of latent models, ignored.
        """
        x = self.get_input(batch, self.first_stage_key)[:N]
        log = {"inputs": x, "diffusion_row": self._get_rows_from_list(diffuse(self, x[:n_row]))}
        if sample:
            with self.ema_scope("Plotting"):
                log["samples"], steps = self.sample(batch_size=len(x), return_intermediates=True)
            log["denoise_row"] = self._get_rows_from_list([x[:n_row] for x in steps])
        return select_logs(log, return_keys)

    def _get_rows_from_list(self, samples: Sequence[Tensor]) -> Tensor:
        """One image (1, C, n H, T W) of T tensors (n, C, H, W): a row for every item."""
        return image_row(samples)


class LatentDiffusion(DDPM):
    """Diffusion in the latents of a first stage, conditioned on what an encoder makes of the batch.

    A batch may hold, in place of images, a first stage's outputs, not scaled: `moments` (B, 2C, h, w) of a KL posterior
    or `latents` (B, C, h, w); and `context` (B, L, D), the encoded condition.

    Args:
        first_stage_config: the autoencoder.
        cond_stage_config: the condition's encoder, or `__is_first_stage__` or `__is_unconditional__`.
        num_timesteps_cond: above 1, noise conditions too, at this many levels over the first timesteps.
        cond_stage_key: the batch's entry that is the condition.
        cond_stage_trainable: train the encoder, too.
        concat_mode: the older form of `conditioning_key`: "concat" if true, otherwise "crossattn".
        cond_stage_forward: the encoder's method to call in place of `encode`.
        conditioning_key: see `DiffusionWrapper`.
        scale_factor: factor of latents.
        scale_by_std: measure it, 1 / the standard deviation, in the first batch.
        force_null_conditioning: give the network no condition, whatever its conditioning_key.
        ema_cond_stage: average the weights of a trained encoder as well (not in the original).
    """

    info: ModelInfo | None = None  # of a model that was loaded from a file
    cond_ids: Tensor
    first_stage_model: Any
    cond_stage_model: Any
    scale_factor: float | Tensor

    def __init__(
        self,
        first_stage_config: Mapping[str, Any],
        cond_stage_config: Mapping[str, Any] | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        force_null_conditioning: bool = False,
        *args: Any,
        ema_cond_stage: bool = False,
        **kwargs: Any,
    ) -> None:
        loading = pop_loading(kwargs)
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == UNCONDITIONAL and not force_null_conditioning:
            conditioning_key = None
        self.num_timesteps_cond = num_timesteps_cond or 1
        super().__init__(*args, conditioning_key=conditioning_key, **kwargs)  # type: ignore[misc]  # args: those before
        self.concat_mode = concat_mode
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_forward = cond_stage_forward
        self.force_null_conditioning = force_null_conditioning
        self.clip_denoised = False  # latents have no bounds
        ddconfig = (first_stage_config.get("params") or {}).get("ddconfig") or {}
        self.num_downs = max(len(ddconfig.get("ch_mult", ())) - 1, 0)
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor), device="cpu"))
        else:
            self.scale_factor = float(scale_factor)
        self._empty_contexts: dict[Any, Tensor] = {}
        self.instantiate_first_stage(first_stage_config)
        self.instantiate_cond_stage(cond_stage_config)
        self.ema_cond_stage = ema_cond_stage
        if ema_cond_stage:
            if not (self.use_ema and "cond_stage_model" in self.trained_modules()):
                raise ValueError("ema_cond_stage needs use_ema and a condition's encoder with cond_stage_trainable")
            self.cond_stage_ema = LitEma(self.cond_stage_model)
        self._load(**loading)

    # ---- stages ----

    def add_frozen_stage(self, name: str, config: Mapping[str, Any]) -> None:
        """Build a child module that is not trained and stays in evaluation mode."""
        setattr(self, name, freeze(instantiate_from_config(config)))
        self.frozen_stages.append(name)

    def instantiate_first_stage(self, config: Mapping[str, Any]) -> None:
        """Build `first_stage_model`, frozen."""
        self.add_frozen_stage("first_stage_model", config)

    def instantiate_cond_stage(self, config: Mapping[str, Any] | str) -> None:
        """Build `cond_stage_model`: None if unconditional, frozen unless `cond_stage_trainable`."""
        if config == FIRST_STAGE:
            self.cond_stage_model = self.first_stage_model
        elif config == UNCONDITIONAL:
            self.cond_stage_model = None
        elif not self.cond_stage_trainable:
            self.add_frozen_stage("cond_stage_model", config)  # type: ignore[arg-type]  # no marker here
        else:
            self.cond_stage_model = instantiate_from_config(config)
            self.cond_stage_model.requires_grad_(True)  # some encoders freeze themselves
            for name in getattr(self.cond_stage_model, "spare_weights", ()):  # they would never get gradients
                self.cond_stage_model.get_parameter(name).requires_grad_(False)

    def averages(self) -> list[tuple[LitEma, nn.Module]]:
        """Every running average, with the module whose weights it averages."""
        text = [(self.cond_stage_ema, self.cond_stage_model)] if getattr(self, "ema_cond_stage", False) else []
        return [*super().averages(), *text]

    def trained_modules(self) -> dict[str, nn.Module]:
        """The modules to train, by name: with `cond_stage_trainable` the encoder, too."""
        trains_encoder = self.cond_stage_trainable and self.cond_stage_model is not None
        return super().trained_modules() | ({"cond_stage_model": self.cond_stage_model} if trains_encoder else {})

    def configure_optimizers(self) -> Any:
        """As in `DDPM`; defined here, too, since research code overrides and calls it under this name."""
        return super().configure_optimizers()

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of an image's latent; ValueError, with the nearest sizes, if there is none."""
        f = self.first_stage_model.downsampling_factor
        for name, size in (("height", height), ("width", width)):
            if size < f or size % f:
                below, above = max(size // f, 1) * f, (size // f + 1) * f
                near = f"{below} or {above}" if size > f else str(f)
                raise ValueError(f"{name} {size} is not a multiple of {f}, which this model needs: use {near}")
        return height // f, width // f

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Images (B, 3, H, W) in [-1, 1] to the first stage's output: a posterior, or latents."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """Scaled latents (B, C, h, w): a sample of a posterior, or latents as they are."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            return self.scale_factor * DistributedRNG.for_module(self).sample(encoder_posterior)
        if isinstance(encoder_posterior, Tensor):
            return self.scale_factor * encoder_posterior
        raise ValueError(f"cannot take latents from a {type(encoder_posterior).__name__}")

    def differentiable_decode_first_stage(
        self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False
    ) -> Tensor:
        """`decode_first_stage` with gradients."""
        if predict_cids:
            indices = z.argmax(dim=1) if z.ndim == 4 else z
            entries = self.first_stage_model.quantize.get_codebook_entry(indices.long(), None)
            z = entries.movedim(-1, 1).contiguous()
        z = z / self.scale_factor
        if isinstance(self.first_stage_model, VQModelInterface):
            return self.first_stage_model.decode(z, force_not_quantize=predict_cids or force_not_quantize)
        return self.first_stage_model.decode(z)

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, predict_cids: bool = False, force_not_quantize: bool = False) -> Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, f h, f w), about in [-1, 1].

        Args:
            z: the latents.
            predict_cids: z are logits (B, n_embed, h, w) or indices (B, h, w) of codebook entries.
            force_not_quantize: a VQ first stage decodes z as it is.
        """
        return self.differentiable_decode_first_stage(z, predict_cids, force_not_quantize)

    def get_learned_conditioning(self, c: Any) -> Any:
        """Encode the condition `c`: prompts, images, a batch of labels, or the prompts in its `c_crossattn`.

        Without an encoder (torch.nn.Identity) a batch's labels (B,) are the condition, which `adm` networks embed.
        """
        if isinstance(c, Mapping) and "c_crossattn" in c:
            return {**c, "c_crossattn": [self.get_learned_conditioning(part) for part in c["c_crossattn"]]}
        if isinstance(self.cond_stage_model, nn.Identity) and isinstance(c, Mapping):
            return entry_of(c, self.cond_stage_key).to(self.device)
        if self.cond_stage_forward is not None:
            return getattr(self.cond_stage_model, self.cond_stage_forward)(c)
        encode = getattr(self.cond_stage_model, "encode", None)
        c = encode(c) if callable(encode) else self.cond_stage_model(c)
        return c.mode() if isinstance(c, DiagonalGaussianDistribution) else c

    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Tensor:
        """The encoding (batch_size, L, D) of no condition.

        Args:
            batch_size: number of rows.
            null_label: encode this; by default the replacement in `ucg_training`, the empty prompt, or what the
                encoder offers.

        Raises:
            ValueError: none of these exists.
        """
        if isinstance(null_label, (list, tuple)):  # public configs write [""]
            if len(null_label) != 1:
                raise ValueError(f"guidance needs one label for no {self.cond_stage_key}, not {null_label}")
            null_label = null_label[0]
        if null_label is None:
            null_label = self.condition_dropout.value_of(self.cond_stage_key)
        if null_label is None and self.cond_stage_key in TEXT_KEYS:
            null_label = ""
        if null_label is not None:
            encoding = self.empty_context(null_label)
            return encoding.expand(batch_size, *encoding.shape[1:])
        encoder = getattr(self.cond_stage_model, "get_unconditional_conditioning", None)
        if encoder is None:
            raise ValueError(
                f"guidance needs an unconditional {self.cond_stage_key}, and this model does not define one: "
                "name it (null_class; unconditional_guidance_label in log_images), or use scale 1"
            )
        return self.get_learned_conditioning(encoder(batch_size, device=self.device))

    @torch.no_grad()
    def empty_context(self, value: Any) -> Tensor:
        """The encoding (1, L, D) of a prompt or label that means none; cached if the encoder is frozen."""
        known = self._empty_contexts.get(value)
        if known is None or known.device != self.device or self.cond_stage_trainable:
            key = self.cond_stage_key
            c = {key: torch.tensor([value], device=self.device)} if key in CLASS_KEYS else [value]
            known = self._empty_contexts[value] = self.get_learned_conditioning(c)
        return known

    # ---- conditions that are noised, too ----

    def register_schedule(self, *args: Any, **kwargs: Any) -> None:
        """As `DDPM.register_schedule`, with the noise levels of conditions if `num_timesteps_cond` is above 1."""
        super().register_schedule(*args, **kwargs)
        self.shorten_cond_schedule = self.num_timesteps_cond > 1
        if self.shorten_cond_schedule:
            self.make_cond_schedule()

    def make_cond_schedule(self) -> None:
        """Register `cond_ids` (T,), the condition's noise level at every timestep."""
        if self.num_timesteps_cond > self.num_timesteps or self.model.conditioning_key not in ("concat", "crossattn"):
            raise ValueError(
                f"num_timesteps_cond={self.num_timesteps_cond} noises conditions: that needs at least as many "
                f"timesteps (not {self.num_timesteps}), and conditioning_key concat or crossattn, not "
                f"{self.model.conditioning_key!r}"
            )
        last = self.num_timesteps - 1
        ids = torch.full((self.num_timesteps,), last, dtype=torch.long, device="cpu")
        ids[: self.num_timesteps_cond] = torch.linspace(0, last, self.num_timesteps_cond, device="cpu").round().long()
        self.register_buffer("cond_ids", ids, persistent=False)

    def condition_at(self, cond: Condition, t: Tensor) -> Condition:
        """`cond` as the network gets it at timesteps t: unchanged, or noised by `num_timesteps_cond`."""
        if not self.shorten_cond_schedule:
            return cond
        if isinstance(cond, (list, tuple)):
            return [self.condition_at(c, t) for c in cond]
        noise = DistributedRNG.for_module(self).randn_like(cond.float())
        return self.q_sample(x_start=cond, t=self.cond_ids[t], noise=noise)

    # ---- a training step ----

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """With `scale_by_std`, measure the latents' scale in the first batch of a new run, over all processes."""
        started = self.trainer.current_epoch or self.global_step or batch_idx or self.restarted_from_ckpt
        if not self.scale_by_std or started:
            return
        scale = self.get_buffer("scale_factor").fill_(1.0)
        z = torch.as_tensor(self.all_gather(self._images_and_latents(batch, self.first_stage_key)[1]))
        scale.copy_(1.0 / z.flatten().std())
        logger.info("scale_factor set to %.5f, 1 / the latents' standard deviation", scale.item())

    def drop_conditions(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch with some of its conditions, or their cached encodings, replaced by `ucg_training`."""
        rng = DistributedRNG.for_module(self)
        return self.condition_dropout(batch, rng, self.cond_stage_key, self.empty_context)

    def shared_step(self, batch: Mapping[str, Any], **kwargs: Any) -> Losses:
        """Loss of a batch and its parts by name; the keywords go to `get_input`."""
        x, c = self.get_input(batch, self.first_stage_key, **kwargs)[:2]
        return self(x, c)

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        return_first_stage_outputs: bool = False,
        force_c_encode: bool = False,
        cond_key: str | None = None,
        return_original_cond: bool = False,
        bs: int | None = None,
        return_x: bool = False,
    ) -> list[Any]:
        """Latents and condition of a batch, `[z, c, (x, xrec), (x), (xc)]`.

        Args:
            batch: images (B, H, W, 3), conditions, or their cached encodings.
            k: the entry with images.
            return_first_stage_outputs: add the images x and their reconstructions xrec, both (B, 3, H, W); x is None
                where latents are cached.
            force_c_encode: encode the condition even if its encoder is trained; `forward` does that otherwise.
            cond_key: the entry with conditions, `cond_stage_key` by default.
            return_original_cond: add the condition before encoding; None where its encoding is cached.
            bs: use only the first `bs` items.
            return_x: add the images.
        """
        x, z = self._images_and_latents(batch, k, bs)
        c = xc = None
        if self.model.conditioning_key is not None and not self.force_null_conditioning:
            if CONTEXT in batch:
                if self.cond_stage_trainable:
                    raise ValueError(
                        "batches hold a context that was computed beforehand, but cond_stage_trainable would change "
                        "its encoder: turn that off, or cache no context"
                    )
                c = batch[CONTEXT][:bs].to(self.device).float()
            else:
                cond_key = cond_key or self.cond_stage_key
                xc = x if cond_key == k and x is not None else self._original_condition(batch, cond_key, bs)
                encode = force_c_encode or not self.cond_stage_trainable
                c = self.get_learned_conditioning(xc) if encode else xc
        if self.use_positional_encodings:
            pos_x, pos_y = self.compute_latent_shifts(batch)
            key = __conditioning_keys__.get(self.model.conditioning_key or "")
            c = {"pos_x": pos_x, "pos_y": pos_y, **({key: c} if key else {})}
        out = [z, c]
        if return_first_stage_outputs:
            out += [x, self.decode_first_stage(z)]
        if return_x:
            out += [x]
        if return_original_cond:
            out += [xc]
        return out

    def _images_and_latents(
        self, batch: Mapping[str, Any], k: str, bs: int | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Images `batch[k]` (B, 3, H, W), or None, and their scaled latents (B, C, h, w), which may be cached."""
        if "moments" in batch:
            posterior = DiagonalGaussianDistribution(batch["moments"][:bs].to(self.device).float())
            return None, self.get_first_stage_encoding(posterior)
        if "latents" in batch:
            return None, self.get_first_stage_encoding(batch["latents"][:bs].to(self.device).float())
        x = super().get_input(batch, k)[:bs]
        return x, self.get_first_stage_encoding(self.encode_first_stage(x)).detach()

    def _original_condition(self, batch: Mapping[str, Any], key: str, bs: int | None) -> Any:
        """The condition before encoding: prompts, images, or the batch itself for labels."""
        if key in PLAIN_KEYS:
            return entry_of(batch, key)[:bs]
        if key in CLASS_KEYS:
            return {name: value[:bs] for name, value in batch.items()}
        return super().get_input(batch, key)[:bs]

    def compute_latent_shifts(self, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        """Positions (x, y) of the latents, for `use_positional_encodings`; a subclass defines them."""
        raise NotImplementedError(f"use_positional_encodings: {type(self).__name__} has no compute_latent_shifts")

    def forward(self, x: Tensor, c: Condition = None, *args: Any, **kwargs: Any) -> Losses:
        """Loss of latents at random timesteps under `c`, which is encoded here if its encoder is trained."""
        t = self._random_timesteps(x)
        if self.model.conditioning_key is not None and not self.force_null_conditioning:
            if self.cond_stage_trainable:
                c = self.get_learned_conditioning(c)
            c = self.condition_at(c, t)
        return self.p_losses(x, c, t, *args, **kwargs)

    def p_losses(  # type: ignore[override]  # a condition, as published
        self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None
    ) -> Losses:
        """Loss of latents x_start at timesteps t under `cond`, and its parts by name."""
        return self._denoising_losses(x_start, cond, t, noise)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition = None, return_ids: bool = False) -> Any:
        """The network's output for x_noisy at t (B,) under `cond`.

        Args:
            x_noisy: the latents.
            t: timesteps, which may be fractional.
            cond: a tensor, a list of tensors, or `DiffusionWrapper`'s keywords.
            return_ids: return all outputs of a network that has several, not only the first.
        """
        if cond is None:
            cond = {}
        elif not isinstance(cond, Mapping):
            name = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {name: cond if isinstance(cond, (list, tuple)) else [cond]}
        output = self.model(x_noisy, t, **cond)
        return output[0] if isinstance(output, tuple) and not return_ids else output

    # ---- formulas of the original ----

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """eps from x_t and x_0."""
        scaled = self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return (scaled - pred_xstart) / self._at("sqrt_recipm1_alphas_cumprod", t, x_t)

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, I)) in bits per dimension, (B,)."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return normal_kl(mean, log_variance, 0.0, 0.0).flatten(1).mean(dim=1) / math.log(2.0)

    # ---- sampling ----

    def p_mean_variance(  # type: ignore[override]
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        clip_denoised: bool,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, ...]:
        """Mean, variance and log variance of p(x_{t-1} | x_t, c).

        Args:
            x, c, t: x_t, the condition, timesteps.
            clip_denoised: clip the predicted x_0 to [-1, 1].
            return_codebook_ids: add the second output of the network.
            quantize_denoised: quantize the predicted x_0 by the first stage's codebook.
            return_x0: add the predicted x_0.
            score_corrector: its `modify_score(model, eps, x, t, c, **corrector_kwargs)` changes the prediction.
        """
        ids = {"return_ids": True} if return_codebook_ids else {}
        output, *more = result if isinstance(result := self.apply_model(x, t, c, **ids), tuple) else (result,)
        if score_corrector is not None:
            if self.parameterization != "eps":
                raise ValueError(f"score_corrector needs parameterization eps, not {self.parameterization}")
            output = score_corrector.modify_score(self, output, x, t, c, **(corrector_kwargs or {}))
        x0 = self._predict_start(x, t, output)
        if clip_denoised:
            x0 = x0.clamp(-1.0, 1.0)
        if quantize_denoised:
            x0 = self.first_stage_model.quantize(x0)[0]
        posterior = self.q_posterior(x_start=x0, x_t=x, t=t)
        return (*posterior, *more[:1]) if return_codebook_ids else (*posterior, *([x0] if return_x0 else []))

    @torch.no_grad()
    def p_sample(  # type: ignore[override]
        self,
        x: Tensor,
        c: Condition,
        t: Tensor,
        clip_denoised: bool = False,
        repeat_noise: bool = False,
        return_codebook_ids: bool = False,
        quantize_denoised: bool = False,
        return_x0: bool = False,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        *,
        noise: NoiseSource | None = None,
    ) -> Any:
        """A sample of p(x_{t-1} | x_t, c), the mean at t = 0; with `return_x0` also the predicted x_0.

        Args:
            x, c, t: x_t, the condition, timesteps.
            repeat_noise: the same noise for all items.
            temperature, noise_dropout: scale the noise; set some of it to zero.
            noise: random numbers from elsewhere than torch's global generator.
        """
        if return_codebook_ids:
            raise ValueError("return_codebook_ids: ancestral sampling does not support it, as in the original")
        mean, _, log_variance, *x0 = self.p_mean_variance(
            x=x,
            c=c,
            t=t,
            clip_denoised=clip_denoised,
            return_codebook_ids=return_codebook_ids,
            quantize_denoised=quantize_denoised,
            return_x0=return_x0,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )
        eps = noise_like(x.shape, x.device, repeat_noise) if noise is None else noise(x.shape, x.device)
        eps = F.dropout(temperature * eps, p=noise_dropout) if noise_dropout > 0.0 else temperature * eps
        x_prev = self._add_noise(mean, log_variance, t, eps)
        return (x_prev, x0[0]) if return_x0 else x_prev

    def _ancestral_loop(
        self,
        cond: Condition,
        x: Tensor,
        steps: int,
        verbose: bool,
        callbacks: tuple[Callable[[int], None] | None, Callable[[Tensor, int], None] | None],
        mask: Tensor | None,
        x0: Tensor | None,
        log_every_t: int | None,
        temperature: float | Sequence[float] | None = None,
        **options: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        """Sample from timestep steps - 1 down to 0: x_0, and x_t, or its predicted x_0, every `log_every_t` steps."""
        if mask is not None and (x0 is None or x0.shape[2:] != mask.shape[2:]):
            raise ValueError("mask needs x0, of the same height and width")
        callback, img_callback = callbacks
        logged = []
        for i in tqdm(reversed(range(steps)), desc="Sampling", total=steps, disable=not verbose, leave=None):
            t = torch.full((x.shape[0],), i, device=self.device, dtype=torch.long)
            if temperature is not None:
                options["temperature"] = temperature[i] if isinstance(temperature, Sequence) else temperature
            x = self.p_sample(x, self.condition_at(cond, t), t, clip_denoised=self.clip_denoised, **options)
            x, predicted = x if isinstance(x, tuple) else (x, None)
            if mask is not None and x0 is not None:
                x = self.q_sample(x0, t) * mask + (1.0 - mask) * x
            if i % (log_every_t or self.log_every_t) == 0 or i == steps - 1:
                logged.append(x if predicted is None else predicted)
            if callback:
                callback(i)
            if img_callback:
                img_callback(x, i)
        return x, logged

    @torch.no_grad()
    def p_sample_loop(  # type: ignore[override]
        self,
        cond: Condition,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
        *,
        noise: NoiseSource | None = None,
    ) -> Any:
        """Ancestral sampling (Ho et al. 2020, algorithm 2) of latents of `shape` (B, C, h, w) under `cond`.

        Args:
            return_intermediates: return also a list of x_t, one every `log_every_t` steps.
            x_T: start from this latent.
            verbose: show progress.
            callback, img_callback: called as callback(t) and img_callback(x, t) after each step.
            timesteps, start_T: start at this timestep instead of the last.
            mask, x0: keep the latent x0 where mask is 1.
            noise: random numbers from elsewhere than torch's global generator.
        """
        if x_T is None:
            x_T = torch.randn(tuple(shape), device=self.device) if noise is None else noise(shape, self.device)
        steps = min(n for n in (timesteps, start_T, self.num_timesteps) if n is not None)
        options: dict[str, Any] = {"quantize_denoised": quantize_denoised} | ({"noise": noise} if noise else {})
        x, logged = self._ancestral_loop(
            cond, x_T, steps, verbose, (callback, img_callback), mask, x0, log_every_t, **options
        )
        return (x, [x_T, *logged]) if return_intermediates else x

    @torch.no_grad()
    def progressive_denoising(
        self,
        cond: Condition,
        shape: Sequence[int],
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        quantize_denoised: bool = False,
        img_callback: Callable[[Tensor, int], None] | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float | Sequence[float] = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        x_T: Tensor | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Ancestral samples, and the predicted x_0 every `log_every_t` steps.

        Args:
            shape: (B, C, h, w), or (C, h, w) with `batch_size`.
            temperature: of the noise; one number, or one for every timestep.
            Others as in `p_sample_loop`.
        """
        if batch_size is not None:
            shape, cond = (batch_size, *shape[-3:]), first_rows(cond, batch_size)
        x_T = torch.randn(tuple(shape), device=self.device) if x_T is None else x_T
        return self._ancestral_loop(
            cond,
            x_T,
            min(start_T or self.num_timesteps, self.num_timesteps),
            verbose,
            (callback, img_callback),
            mask,
            x0,
            log_every_t,
            temperature,
            quantize_denoised=quantize_denoised,
            return_x0=True,
            noise_dropout=noise_dropout,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
        )

    @torch.no_grad()
    def sample(  # type: ignore[override]
        self,
        cond: Condition = None,
        batch_size: int = 16,
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        timesteps: int | None = None,
        quantize_denoised: bool = False,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        shape: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Ancestral samples (B, C, h, w) under the first rows of `cond`; arguments as in `p_sample_loop`."""
        if shape is None:
            shape = (batch_size, self.channels, *image_sides(self.image_size))
        return self.p_sample_loop(
            first_rows(cond, shape[0]),
            shape,
            return_intermediates=return_intermediates,
            x_T=x_T,
            verbose=verbose,
            timesteps=timesteps,
            quantize_denoised=quantize_denoised,
            mask=mask,
            x0=x0,
        )

    @torch.no_grad()
    def sample_log(
        self, cond: Condition, batch_size: int, ddim: bool, ddim_steps: int | None, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Samples and intermediates, by DDIM in `ddim_steps` steps or by ancestral sampling.

        Args:
            **kwargs: of the sampler; `shape` (C, h, w) replaces the model's own size.
        """
        shape = tuple(kwargs.pop("shape", None) or (self.channels, *image_sides(self.image_size)))
        if ddim:
            kwargs["quantize_x0"] = kwargs.pop("quantize_denoised", False)
            steps = ddim_steps or self.num_timesteps
            return DDIMSampler(self).sample(steps, batch_size, shape, cond, verbose=False, **kwargs)
        kwargs = {"verbose": False, **kwargs}
        return self.sample(
            cond=cond, batch_size=batch_size, return_intermediates=True, shape=(batch_size, *shape), **kwargs
        )

    # ---- images of training ----

    @torch.no_grad()
    def log_images(  # type: ignore[override]
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int | None = 200,
        ddim_eta: float = 1.0,
        return_keys: Iterable[str] | None = None,
        quantize_denoised: bool = True,
        inpaint: bool = True,
        plot_denoise_rows: bool = False,
        plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True,
        unconditional_guidance_scale: float = 1.0,
        unconditional_guidance_label: Any = None,
        use_ema_scope: bool = True,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Images (B, 3, H, W), about in [-1, 1], by name.

        Always inputs (if the batch holds images), reconstruction and, if there is one, conditioning.

        Args:
            batch: as in training.
            N: number of items.
            n_row: number of items in the one image that a `..._row` is.
            sample: log samples.
            ddim_steps, ddim_eta: DDIM steps and noise; ancestral sampling if `ddim_steps` is None.
            return_keys: only these, if there are such.
            quantize_denoised: log samples_x0_quantized, if the first stage has a codebook.
            inpaint: log samples_inpainting, samples_outpainting and their mask.
            plot_denoise_rows: log denoise_row, the latents on the way.
            plot_progressive_rows: log progressive_row, the predicted x_0 of ancestral sampling.
            plot_diffusion_rows: log diffusion_row, noised latents.
            unconditional_guidance_scale: above 1, log samples_cfg_scale_X.
            unconditional_guidance_label: the label that means no condition.
            use_ema_scope: use the averaged weights.
        """
        with self.ema_scope("Plotting") if use_ema_scope else nullcontext():
            z, c, log = self._log_inputs(batch, N)
            n_row = min(n_row, len(z))
            if plot_diffusion_rows:
                log["diffusion_row"] = self._get_denoise_row_from_list(diffuse(self, z[:n_row]))
            if sample:
                options = sampling_options(self, c, z, ddim_steps, ddim_eta)
                samples, steps = self.sample_log(**options)
                log["samples"] = self.decode_first_stage(samples)
                if plot_denoise_rows:
                    steps = steps["x_inter"] if isinstance(steps, Mapping) else steps
                    log["denoise_row"] = self._get_denoise_row_from_list([x[:n_row] for x in steps])
                if quantize_denoised and isinstance(self.first_stage_model, VQModelInterface):
                    quantized, _ = self.sample_log(**options, quantize_denoised=True)
                    log["samples_x0_quantized"] = self.decode_first_stage(quantized)
                if unconditional_guidance_scale > 1.0 and c is not None:
                    uncond = self._unconditional_like(c, len(z), unconditional_guidance_label)
                    guided, _ = self.sample_log(
                        **sampling_options(self, c, z, ddim_steps or self.num_timesteps, ddim_eta),
                        unconditional_guidance_scale=unconditional_guidance_scale,
                        unconditional_conditioning=uncond,
                    )
                    log[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = self.decode_first_stage(guided)
                if inpaint:
                    log |= self._log_inpainting(z, options)
            if plot_progressive_rows:
                _, predictions = self.progressive_denoising(c, z.shape[1:], verbose=False, batch_size=n_row)
                log["progressive_row"] = self._get_denoise_row_from_list(predictions)
        return select_logs(log, return_keys)

    def _get_denoise_row_from_list(
        self, samples: Sequence[Tensor], desc: str = "", force_no_decoder_quantization: bool = False
    ) -> Tensor:
        """One image (1, 3, n H, T W) of T latents (n, C, h, w): a row for every item."""
        decoded = [
            self.decode_first_stage(z.to(self.device), force_not_quantize=force_no_decoder_quantization)
            for z in (tqdm(samples, desc=desc) if desc else samples)
        ]
        return self._get_rows_from_list(decoded)

    def _log_inputs(self, batch: Mapping[str, Any], N: int) -> tuple[Tensor, Condition, dict[str, Tensor]]:
        """Latents, encoded condition, and images of what the batch holds."""
        z, c, x, xrec, xc = self._get_input_to_log(batch, N)
        log = {"reconstruction": xrec}
        if x is None and self.first_stage_key in batch:  # only its latents were cached
            x = images_of(batch, self.first_stage_key, self.device)[:N]
        if x is not None:
            log = {"inputs": x} | log
        return z, c, log if c is None else log | condition_images(self, batch, xc, xrec)

    def _get_input_to_log(self, batch: Mapping[str, Any], N: int) -> Sequence[Any]:
        """(z, c, x, xrec, xc) of `get_input`, with c encoded."""
        return self.get_input(
            batch,
            self.first_stage_key,
            return_first_stage_outputs=True,
            force_c_encode=True,
            return_original_cond=True,
            bs=N,
        )

    def to_rgb(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) as colors (B, 3, H, W) in [-1, 1], by a random projection."""
        if not hasattr(self, "colorize"):
            self.colorize = torch.randn(3, x.shape[1], 1, 1).to(x)
        return colorize(x, self.colorize)

    def _unconditional_like(self, cond: Condition, count: int, label: Any) -> Condition:
        """The unconditional counterpart of `cond`."""
        uncond = self.get_unconditional_conditioning(count, label)
        return {**cond, "c_crossattn": [uncond]} if isinstance(cond, Mapping) else uncond

    def _log_inpainting(self, z: Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
        """Samples that keep all of z (B, C, h, w) but its middle, and samples that keep only that."""
        mask = outer_mask(z)
        inside, _ = self.sample_log(**options, mask=mask, x0=z)
        outside, _ = self.sample_log(**options, mask=1.0 - mask, x0=z)
        inside, outside = self.decode_first_stage(inside), self.decode_first_stage(outside)
        mask_image = F.interpolate(2.0 * mask - 1.0, size=inside.shape[2:]).expand(-1, 3, -1, -1)
        return {"samples_inpainting": inside, "mask": mask_image, "samples_outpainting": outside}


SPECIAL_MODELS = (
    "ImageEmbeddingConditionedLatentDiffusion",
    "LatentDepth2ImageDiffusion",
    "LatentFinetuneDiffusion",
    "LatentInpaintDiffusion",
    "LatentUpscaleDiffusion",
    "LatentUpscaleFinetuneDiffusion",
    "Layout2ImgDiffusion",
)


def __getattr__(name: str) -> Any:
    if name in SPECIAL_MODELS:  # they derive from the classes above
        return getattr(importlib.import_module("ldm.models.diffusion.special_models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
