"""Diffusion models as Lightning modules: `DDPM` in pixels, `LatentDiffusion` in a first stage's latents.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models"; Ho et al. 2020 for the diffusion.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import init_from_checkpoint
from ldm.models.autoencoder import VQModelInterface
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.gaussian import Condition, GaussianDiffusion, square
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.util import FIRST_STAGE, UNCONDITIONAL, instantiate_from_config

logger = logging.getLogger(__name__)

TEXT_KEYS = ("txt", "caption", "coordinates_bbox")  # conditions that a batch holds as they are, not as images
CLASS_KEYS = ("class_label", "cls")  # conditions whose encoder takes the whole batch


class DDPM(GaussianDiffusion):
    """Denoising diffusion in the space of the batch itself.

    unet_config: the network. image_size, channels: of the space that diffusion happens in. first_stage_key: the
    batch's entry to model. parameterization: what the network predicts, "eps", "x0" or "v". loss_type: "l1" or "l2".
    original_elbo_weight, l_simple_weight: weights of the variational and the simple loss. learn_logvar: learn the
    loss's weight at every timestep. use_ema: keep an average of the weights, and use it in `ema_scope`.
    """

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
        self.scheduler_config = scheduler_config
        self.restarted_from_ckpt = False
        if monitor is not None:
            self.monitor = monitor

        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        logvar = torch.full((self.num_timesteps,), float(logvar_init), device="cpu")
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.model)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys, load_only_unet)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> None:
        """Load what fits from a checkpoint, but for keys that start with one of `ignore_keys`; log what is left out.

        only_model: load the network alone.
        """
        missing = init_from_checkpoint(
            self.model if only_model else self, path, ignore_keys, prefix="model." if only_model else ""
        )
        self.restarted_from_ckpt = True
        if self.use_ema and (only_model or any(key.startswith("model_ema.") for key in missing)):
            self.model_ema.reset(self.model)

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within it the network has its averaged weights, if there are any. `context` is named in the log."""
        if not self.use_ema:
            yield
            return
        self.model_ema.swap(self.model)
        logger.debug("%s: switched to EMA weights", context)
        try:
            yield
        finally:
            self.model_ema.swap(self.model)
            logger.debug("%s: restored training weights", context)

    # ---- training ----

    def get_loss(self, pred: Tensor, target: Tensor, mean: bool = True) -> Tensor:
        """L1 or L2 distance, averaged or elementwise."""
        loss = F.l1_loss if self.loss_type == "l1" else F.mse_loss
        return loss(pred, target, reduction="mean" if mean else "none")

    def get_target(self, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say, given what its input was made of."""
        if self.parameterization == "eps":
            return noise
        return x_start if self.parameterization == "x0" else self.get_v(x_start, noise, t)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """The network's output for x_noisy (B, C, H, W) at timesteps t (B,), which may be fractional."""
        return self.model(x_noisy, t)

    def p_losses(
        self, x_start: Tensor, cond: Condition, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss at timesteps t (B,), and its parts by name (Ho et al. 2020, eq. 12 and 14)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        output = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        error = self.get_loss(output, self.get_target(x_start, noise, t), mean=False).flatten(1).mean(dim=1)  # (B,)
        prefix = "train" if self.training else "val"
        parts = {f"{prefix}/loss_simple": error.mean()}

        logvar = self.logvar[t]
        gamma = error / logvar.exp() + logvar
        if self.learn_logvar:
            parts |= {f"{prefix}/loss_gamma": gamma.mean(), "logvar": self.logvar.detach().mean()}
        vlb = (self.lvlb_weights[t] * error).mean()
        loss = self.l_simple_weight * gamma.mean() + self.original_elbo_weight * vlb
        parts |= {f"{prefix}/loss_vlb": vlb, f"{prefix}/loss": loss}
        return loss, parts

    def forward(self, x: Tensor, c: Condition = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of a batch at random timesteps."""
        return self.p_losses(x, c, torch.randint(0, self.num_timesteps, (x.shape[0],), device=x.device).long())

    def get_input(self, batch: Mapping[str, Any], k: str) -> Any:
        """Images (B, H, W, C) of a batch as (B, C, H, W) float32."""
        x = batch[k]
        x = x[..., None] if x.ndim == 3 else x
        return x.movedim(-1, 1).to(self.device, memory_format=torch.contiguous_format).float()

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, in training or validation."""
        return self(self.get_input(batch, self.first_stage_key))

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Lightning's hook: the loss, with its parts logged."""
        loss, parts = self.shared_step(batch)
        self.log_dict(parts, prog_bar=True, logger=True, on_step=True, on_epoch=True)
        return loss

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Lightning's hook: losses with the trained and with the averaged weights."""
        _, parts = self.shared_step(batch)
        with self.ema_scope():
            _, averaged = self.shared_step(batch)
        averaged = {f"{name}_ema": value for name, value in averaged.items()}
        self.log_dict(parts | averaged, on_step=False, on_epoch=True)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: update the averaged weights."""
        if self.use_ema:
            self.model_ema(self.model)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimiser trains."""
        return [*self.model.parameters(), *([self.logvar] if self.learn_logvar else [])]

    def configure_optimizers(self) -> Any:
        """Lightning's hook: AdamW at `self.learning_rate`, with the config's schedule every step."""
        optimizer = torch.optim.AdamW(self.trainable_parameters(), lr=self.learning_rate)
        if self.scheduler_config is None:
            return optimizer
        factor = instantiate_from_config(self.scheduler_config).schedule
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 1}]


class LatentDiffusion(DDPM):
    """Diffusion in the latents of `first_stage_config`, conditioned by what `cond_stage_config` encodes.

    cond_stage_config: a config, or one of the markers `__is_first_stage__`, `__is_unconditional__`.
    cond_stage_key: the batch's entry that is the condition. cond_stage_trainable: train its encoder too.
    conditioning_key: how the network takes the condition; the default follows from the older `concat_mode`.
    scale_factor: what latents are multiplied by; with scale_by_std 1 / their standard deviation in the first batch.
    cond_stage_forward: the encoder's method to call, if not `encode`.
    """

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
        **kwargs: Any,
    ) -> None:
        if cond_stage_config == UNCONDITIONAL:
            conditioning_key = None
        elif conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        super().__init__(conditioning_key=conditioning_key, **kwargs)
        if num_timesteps_cond not in (None, 1):
            raise ValueError(
                f"num_timesteps_cond={num_timesteps_cond}: noisy conditions are not supported; leave it at 1"
            )
        self.cond_stage_key = cond_stage_key
        self.cond_stage_trainable = cond_stage_trainable
        self.cond_stage_forward = cond_stage_forward
        self.clip_denoised = False  # latents have no bounds
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor), device="cpu"))
        else:
            self.scale_factor = float(scale_factor)
        self.first_stage_model = freeze(instantiate_from_config(first_stage_config))
        if cond_stage_config == FIRST_STAGE:
            self.cond_stage_model = self.first_stage_model
        else:
            self.cond_stage_model = instantiate_from_config(cond_stage_config)
            if self.cond_stage_model is not None and not cond_stage_trainable:
                freeze(self.cond_stage_model)
            elif self.cond_stage_model is not None:
                self.cond_stage_model.requires_grad_(True)  # encoders that freeze themselves would not be trained
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def train(self, mode: bool = True) -> LatentDiffusion:
        """As `nn.Module.train`, but frozen stages stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if self.cond_stage_model is not None and not self.cond_stage_trainable:
            self.cond_stage_model.eval()
        return self

    # ---- first stage and condition ----

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latent of a picture; ValueError, naming the nearest sizes, if there is none."""
        f = self.first_stage_model.downsampling_factor
        for name, size in (("height", height), ("width", width)):
            if size < f or size % f:
                below, above = max(size // f, 1) * f, (size // f + 1) * f
                near = f"{below} or {above}" if size > f else str(f)
                raise ValueError(f"{name} {size} is not a multiple of {f}, which this model needs: use {near}")
        return height // f, width // f

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> DiagonalGaussianDistribution | Tensor:
        """Images (B, 3, H, W) in [-1, 1] to the first stage's own answer: a posterior, or latents."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: DiagonalGaussianDistribution | Tensor) -> Tensor:
        """Scaled latents (B, C, h, w): a draw from a posterior, or latents as they are."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            return self.scale_factor * encoder_posterior.sample()
        if isinstance(encoder_posterior, Tensor):
            return self.scale_factor * encoder_posterior
        raise ValueError(f"cannot take latents from a {type(encoder_posterior).__name__}")

    def differentiable_decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, f h, f w), about in [-1, 1]."""
        z = z / self.scale_factor
        if isinstance(self.first_stage_model, VQModelInterface):
            return self.first_stage_model.decode(z, force_not_quantize=force_not_quantize)
        return self.first_stage_model.decode(z)

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor, force_not_quantize: bool = False) -> Tensor:
        """The same without gradients."""
        return self.differentiable_decode_first_stage(z, force_not_quantize)

    def get_learned_conditioning(self, c: Any) -> Any:
        """What the condition's encoder makes of `c` (prompts, labels, images ...)."""
        if self.cond_stage_forward is not None:
            return getattr(self.cond_stage_model, self.cond_stage_forward)(c)
        encode = getattr(self.cond_stage_model, "encode", self.cond_stage_model)
        c = encode(c)
        return c.mode() if isinstance(c, DiagonalGaussianDistribution) else c

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Condition = None) -> Tensor:
        """The network's output for x_noisy (B, C, H, W) at t (B,) under `cond`."""
        if cond is None:
            return self.model(x_noisy, t)
        if not isinstance(cond, Mapping):
            name = "c_concat" if self.model.conditioning_key == "concat" else "c_crossattn"
            cond = {name: cond if isinstance(cond, (list, tuple)) else [cond]}
        return self.model(x_noisy, t, **cond)

    # ---- training ----

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, bs: int | None = None) -> tuple[Tensor, Any]:
        """(latents, condition) of the first `bs` items; the condition unencoded if its encoder is trained."""
        x = super().get_input(batch, k)[:bs]
        z = self.get_first_stage_encoding(self.encode_first_stage(x)).detach()
        if self.model.conditioning_key is None:
            return z, None
        key = self.cond_stage_key
        if key in TEXT_KEYS:
            c = batch[key][:bs]
        elif key in CLASS_KEYS:
            c = {name: value[:bs] for name, value in batch.items()}
        else:
            c = x if key == k else super().get_input(batch, key)[:bs]
        return z, c if self.cond_stage_trainable else self.get_learned_conditioning(c)

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch, in training or validation."""
        return self(*self.get_input(batch, self.first_stage_key))

    def forward(self, x: Tensor, c: Condition = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of latents (B, C, h, w) at random timesteps; encodes conditions whose encoder is trained."""
        if self.model.conditioning_key is not None and self.cond_stage_trainable:
            c = self.get_learned_conditioning(c)
        return super().forward(x, c)

    @torch.no_grad()
    def on_train_batch_start(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Lightning's hook: before the first batch of a new run, measure the latents' standard deviation."""
        started = self.trainer.current_epoch or self.global_step or batch_idx or self.restarted_from_ckpt
        if not self.scale_by_std or started:
            return
        self.scale_factor.fill_(1.0)
        z, _ = self.get_input(batch, self.first_stage_key)
        self.scale_factor.copy_(1.0 / z.flatten().std())
        logger.info("scale_factor set to %.5f, 1 / the latents' standard deviation", self.scale_factor.item())

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimiser trains."""
        extra = self.cond_stage_model.parameters() if self.cond_stage_trainable and self.cond_stage_model else ()
        return [*super().trainable_parameters(), *extra]

    # ---- sampling ----

    @torch.no_grad()
    def sample(
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
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
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


def freeze(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, without gradients."""
    return module.eval().requires_grad_(False)


def __getattr__(name: str) -> Any:
    # Public home of a class that has a file of its own, and builds on this one.
    if name == "LatentInpaintDiffusion":
        from ldm.models.diffusion.inpainting import LatentInpaintDiffusion

        return LatentInpaintDiffusion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
