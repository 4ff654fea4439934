"""Diffusion models as Lightning modules: `DDPM` in pixels, `LatentDiffusion` in a first stage's latents.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; Ho et al. 2020 for the diffusion.
What they inherit: the formulas (`gaussian`), losses and training steps (`training`), pictures of progress (`pictures`).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import init_from_checkpoint
from ldm.models.diffusion.cond_dropout import CONTEXT, ConditionDropout
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.distributed_rng import DistributedRNG
from ldm.models.diffusion.gaussian import Condition, square
from ldm.models.diffusion.loaded import Loaded
from ldm.models.diffusion.pictures import DiffusionPictures, LatentPictures
from ldm.models.diffusion.stages import freeze, images_of
from ldm.models.diffusion.training import DiffusionTraining
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.attention import seeing_themselves_alone
from ldm.modules.diffusionmodules.schedule import min_snr_weights
from ldm.modules.ema import LitEma
from ldm.util import UNCONDITIONAL, instantiate_from_config

logger = logging.getLogger(__name__)


class DDPM(DiffusionPictures, DiffusionTraining):
    """Denoising diffusion in the space of the batch itself.

    unet_config: the network. image_size, channels: of the space that diffusion happens in. first_stage_key: the
    batch's entry to model. parameterization: what the network predicts, "eps", "x0" or "v". loss_type: "l1" or "l2".
    original_elbo_weight, l_simple_weight: weights of the variational and the simple loss. learn_logvar: learn the
    loss's weight at every timestep. use_ema: keep an average of the weights, and use it in `ema_scope`.
    ckpt_path, ignore_keys, load_only_unet: start from a file, see `init_from_ckpt`. scheduler_config: of the learning
    rate. ucg_training: conditions to drop in training, `{caption: {p: 0.1, val: ""}}`.

    Beyond the public settings, and off unless asked for: min_snr_gamma caps the loss's weights (Hang et al. 2023),
    rescale_betas_zero_snr makes the last timestep pure noise (Lin et al. 2023), noise_offset shifts whole channels of
    the noise, optimizer_config `{target, params}` replaces AdamW, train_only lists globs of the parameters to train,
    ema_every_micro_batch counts the averages' updates as the original did, accumulated batches singly.
    """

    model: DiffusionWrapper
    alphas_cumprod: Tensor
    min_snr_weights: Tensor

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
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        ucg_training: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        min_snr_gamma: float | None = None,
        rescale_betas_zero_snr: bool = False,
        noise_offset: float = 0.0,
        optimizer_config: Mapping[str, Any] | None = None,
        train_only: Sequence[str] | None = None,
        ema_every_micro_batch: bool = False,
    ) -> None:
        super().__init__()
        if loss_type not in ("l1", "l2"):
            raise ValueError(f"loss_type {loss_type!r} is not one of l1, l2")
        self.parameterization = parameterization
        self.v_posterior = v_posterior
        self.clip_denoised = clip_denoised
        self.log_every_t = log_every_t
        self.first_stage_key = first_stage_key
        self.image_size = image_size
        self.channels = channels
        self.loss_type = loss_type
        self.original_elbo_weight = original_elbo_weight
        self.l_simple_weight = l_simple_weight
        self.learn_logvar = learn_logvar
        self.min_snr_gamma = min_snr_gamma
        self.noise_offset = noise_offset
        self.condition_dropout = ConditionDropout(ucg_training)
        self.scheduler_config = scheduler_config
        self.optimizer_config = optimizer_config
        self.restarted_from_ckpt = False
        if monitor is not None:
            self.monitor = monitor

        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.register_schedule(
            given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s, rescale_betas_zero_snr
        )
        if min_snr_gamma is not None:
            weights = min_snr_weights(self.alphas_cumprod, min_snr_gamma, parameterization)
            self.register_buffer("min_snr_weights", weights, persistent=False)
        logvar = torch.full((self.num_timesteps,), float(logvar_init), device="cpu")
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.use_ema = use_ema
        self.ema_every_micro_batch = ema_every_micro_batch
        if use_ema:
            self.model_ema = LitEma(self.model)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)
        if train_only is not None:
            self.train_only(train_only)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> list[str]:
        """Load what fits from a checkpoint, but for keys that start with one of `ignore_keys`; log what is left out.

        only_model: load the network alone. Gives the keys of what was to be loaded that the file has nothing for.
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
        """Weights that may have fewer input channels in a file to start from, and how many of these to take."""
        return {}

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """The network's output for x_noisy (B, C, H, W) at timesteps t (B,), which may be fractional."""
        return self.model(x_noisy, t)

    # ---- training ----

    def forward(self, x: Tensor, c: Condition = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of x (B, C, H, W) at random timesteps."""
        return self.p_losses(x, c, self.draw_timesteps(x))

    def get_input(self, batch: Mapping[str, Any], k: str) -> Any:
        """Images (B, H, W, C) of a batch as (B, C, H, W) float32."""
        return images_of(batch, k, self.device)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch and its parts, in training or validation."""
        return self(self.get_input(batch, self.first_stage_key))


class LatentDiffusion(Loaded, LatentPictures, DDPM):
    """Diffusion in the latents of `first_stage_config`, conditioned by what `cond_stage_config` encodes.

    cond_stage_config: a config, or one of the markers `__is_first_stage__`, `__is_unconditional__`.
    cond_stage_key: the batch's entry that is the condition. cond_stage_trainable: train its encoder too.
    conditioning_key: how the network takes the condition; the default follows from the older `concat_mode`.
    scale_factor: what latents are multiplied by; with scale_by_std 1 / their standard deviation in the first batch.
    num_timesteps_cond: above 1, conditions are noised too, at this many levels over the first timesteps and wholly
    after. cond_stage_forward: the encoder's method to call, if not `encode`.
    ema_cond_stage (not public): average the weights of a trained encoder as well; the public average leaves it out.

    A batch may hold, instead of images, a first stage's answers, `moments` (B, 2C, h, w) of a KL posterior or `latents`
    (B, C, h, w), neither scaled, and `context` (B, L, D) beside or instead of what it encodes.
    """

    cond_ids: Tensor

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
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        load_only_unet: bool = False,
        *,
        train_only: Sequence[str] | None = None,
        ema_cond_stage: bool = False,
        **kwargs: Any,
    ) -> None:
        if cond_stage_config == UNCONDITIONAL:
            conditioning_key = None
        elif conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(conditioning_key=conditioning_key, **kwargs)
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_forward = cond_stage_forward
        self.clip_denoised = False  # latents have no bounds
        self.num_timesteps_cond = num_timesteps_cond or 1
        self.shorten_cond_schedule = self.num_timesteps_cond > 1
        if self.shorten_cond_schedule:
            self.make_cond_schedule()
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor), device="cpu"))
        else:
            self.scale_factor = float(scale_factor)
        self.first_stage_model = freeze(instantiate_from_config(first_stage_config))
        self._make_cond_stage(cond_stage_config)
        self._empty_contexts: dict[Any, Tensor] = {}
        self.ema_cond_stage = ema_cond_stage
        if ema_cond_stage:
            if not (self.use_ema and "cond_stage_model" in self.trained_modules()):
                raise ValueError("ema_cond_stage needs use_ema and a condition's encoder with cond_stage_trainable")
            self.cond_stage_ema = LitEma(self.cond_stage_model)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)
        if train_only is not None:
            self.train_only(train_only)

    def make_cond_schedule(self) -> None:
        """The noise level of the condition at every timestep, `cond_ids` (T,)."""
        if self.num_timesteps_cond > self.num_timesteps or self.model.conditioning_key not in ("concat", "crossattn"):
            raise ValueError(
                f"num_timesteps_cond={self.num_timesteps_cond} noises conditions: that needs as many of the "
                f"{self.num_timesteps} timesteps, and conditioning_key concat or crossattn, not "
                f"{self.model.conditioning_key!r}"
            )
        last = self.num_timesteps - 1
        ids = torch.full((self.num_timesteps,), last, dtype=torch.long, device="cpu")
        ids[: self.num_timesteps_cond] = torch.linspace(0, last, self.num_timesteps_cond, device="cpu").round().long()
        self.register_buffer("cond_ids", ids, persistent=False)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """As `nn.Module.train`, but frozen stages stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """The network's output for x_noisy (B, C, H, W) at t (B,) under `cond`."""
        if cond is None:
            return self.model(x_noisy, t)
        if not isinstance(cond, Mapping):
            name = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {name: cond if isinstance(cond, (list, tuple)) else [cond]}
        return self.model(x_noisy, t, **cond)

    def condition_at(self, cond: Condition, t: Tensor) -> Condition:
        """`cond` at timesteps t (B,) of the picture: itself, or noised where `num_timesteps_cond` asks for it."""
        if not self.shorten_cond_schedule:
            return cond
        if isinstance(cond, (list, tuple)):
            return [self.condition_at(c, t) for c in cond]
        return self.q_sample(cond, self.cond_ids[t], DistributedRNG.of(self).randn_like(cond.float()))

    # ---- training ----

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, bs: int | None = None) -> tuple[Tensor, Any]:
        """(latents, condition) of the first `bs` items; the condition unencoded if its encoder is trained."""
        z = self.get_latents(batch, k, bs)
        if self.model.conditioning_key is None:
            return z, None
        c = self.get_condition(batch, bs)
        return z, c if self.cond_stage_trainable or CONTEXT in batch else self.get_learned_conditioning(c)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch and its parts, in training or validation."""
        return self(*self.get_input(batch, self.first_stage_key))

    def forward(self, x: Tensor, c: Condition = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of latents (B, C, h, w) at random timesteps; encodes conditions whose encoder is trained."""
        t = self.draw_timesteps(x)
        if self.model.conditioning_key is not None:
            if self.cond_stage_trainable:
                c = self.get_learned_conditioning(c)
            c = self.condition_at(c, t)
        return self.p_losses(x, c, t)

    def drop_conditions(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """The batch with some of its conditions, or their cached encodings, replaced as `ucg_training` says."""
        return self.condition_dropout(batch, DistributedRNG.of(self), self.cond_stage_key, self.empty_context)

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Before the first batch of a new run, measure the latents' standard deviation, over all processes."""
        started = self.trainer.current_epoch or self.global_step or batch_idx or self.restarted_from_ckpt
        if not self.scale_by_std or started:
            return
        scale = self.get_buffer("scale_factor").fill_(1.0)
        z = torch.as_tensor(self.all_gather(self.get_latents(batch, self.first_stage_key)))
        scale.copy_(1.0 / z.flatten().std())
        logger.info("scale_factor set to %.5f, 1 / the latents' standard deviation", scale.item())

    def averages(self) -> list[tuple[LitEma, nn.Module]]:
        """Every running average, with the module that it is one of."""
        text = [(self.cond_stage_ema, self.cond_stage_model)] if getattr(self, "ema_cond_stage", False) else []
        return [*super().averages(), *text]

    def trained_modules(self) -> dict[str, nn.Module]:
        """The modules that are trained, by their names."""
        trains_encoder = self.cond_stage_trainable and self.cond_stage_model is not None
        return super().trained_modules() | ({"cond_stage_model": self.cond_stage_model} if trains_encoder else {})

    # ---- sampling ----

    def perturbed_attention(self) -> AbstractContextManager[None]:
        """A context in which self-attention in the network's middle is the identity, as `pag` guidance wants it."""
        return seeing_themselves_alone(self.model.diffusion_model.middle_block)

    @torch.no_grad()
    def sample(  # type: ignore[override]  # a condition first, as published
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
    ) -> Any:
        """Ancestral samples (B, C, h, w) under `cond`; the other arguments as in `p_sample_loop`."""
        return self.p_sample_loop(
            cond,
            shape or (batch_size, self.channels, *square(self.image_size)),
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
        self, cond: Condition, batch_size: int, ddim: bool, ddim_steps: int, eta: float = 0.0, **kwargs: Any
    ) -> tuple[Tensor, Any]:
        """Samples and intermediates, by DDIM in `ddim_steps` steps of noise `eta`, or by ancestral sampling."""
        if not ddim:
            return self.sample(cond, batch_size, return_intermediates=True, **kwargs)
        shape = (self.channels, *square(self.image_size))
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, eta=eta, verbose=False, **kwargs)


# Public names of classes that have files of their own, and build on those here.
_ELSEWHERE = {
    "LatentFinetuneDiffusion": "finetuning",
    "LatentInpaintDiffusion": "inpainting",
    "LatentDepth2ImageDiffusion": "depth",
    "LatentUpscaleDiffusion": "upscaling",
    "ImageEmbeddingConditionedLatentDiffusion": "unclip",
}


def __getattr__(name: str) -> Any:
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(f"ldm.models.diffusion.{_ELSEWHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
