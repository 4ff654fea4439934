"""First stages: KL-regularized and vector-quantized autoencoders, with their training steps, and the identity.

Esser et al. 2021, "Taming Transformers for High-Resolution Image Synthesis"; Rombach et al. 2022, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import init_from_checkpoint
from ldm.models.diffusion.distributed_rng import DistributedRNG
from ldm.models.model_info import ModelInfo
from ldm.models.training import averaged_weights, check_finite, colorize, lr_schedules, make_optimizer
from ldm.modules.diffusionmodules.model import Decoder, Encoder, regroup
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.quantize import VectorQuantizer
from ldm.util import instantiate_from_config

if TYPE_CHECKING:
    from pytorch_lightning.core.optimizer import LightningOptimizer

ADAM = {"target": "torch.optim.Adam", "params": {"betas": (0.5, 0.9)}}


class FirstStage(pl.LightningModule):
    """Base of both autoencoders: image batches, training by Lightning's manual optimization, loading.

    A subclass has `encoder`, `decoder`, `loss` and the other modules of `NETWORKS`, and `losses`. The loss is called
    like the public ones, and may have a `discriminator`.

    One backward pass serves autoencoder and discriminator, on the same reconstructions; the original computed them
    twice. `global_step` counts batches, or groups of `accumulate_grad_batches` of them, as in the original with its two
    optimizers, so `disc_start`, schedules and `max_steps` keep their meaning.

    `learning_rate` and the next three attributes are set by the training script. The three replace Trainer options
    that Lightning does not offer with manual optimization.
    """

    NETWORKS: tuple[str, ...] = ("encoder", "decoder", "quant_conv", "post_quant_conv")

    info: ModelInfo | None = None  # of a model that was loaded from a file
    encoder: Encoder
    decoder: Decoder
    loss: Any
    colorize: Tensor
    learning_rate: float
    accumulate_grad_batches: int = 1
    gradient_clip_val: float = 0.0  # of the autoencoder's gradient, and of the discriminator's
    gradient_clip_algorithm: str = "norm"

    def __init__(
        self,
        image_key: str,
        monitor: str | None,
        colorize_nlabels: int | None,
        optimizer_config: Mapping[str, Any] | None,
        scheduler_config: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.image_key = image_key
        self.optimizer_config = optimizer_config or ADAM
        self.scheduler_config = scheduler_config
        self.lr_g_factor = 1.0
        self.use_ema = False
        self.acceleration: list[Any] = []  # handles of what is attached from outside
        self._stepped = False  # whether the last batch ended with an optimizer step
        if monitor is not None:
            self.monitor = monitor
        if colorize_nlabels is not None:
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))

    @property
    def downsampling_factor(self) -> int:
        """Pixels per latent position along a side."""
        return 2 ** (len(self.encoder.down) - 1)

    def networks(self) -> nn.ModuleDict:
        """The modules of the autoencoder, without its loss."""
        return nn.ModuleDict({name: self.get_submodule(name) for name in self.NETWORKS})

    def get_last_layer(self) -> Tensor:
        """The weight on which the adversarial loss balances gradients."""
        return self.decoder.last_layer

    def losses(self, x: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, dict[str, Tensor]]]]:
        """The reconstruction of x (B, C, H, W), and the loss as a function of (optimizer_idx, global_step, ...)."""
        raise NotImplementedError

    # ---- weights ----

    def _build_loss(self, lossconfig: Mapping[str, Any]) -> nn.Module:
        # a model on the meta device is for inference, and many files hold no weights for a loss
        return nn.Identity() if torch.empty(0).is_meta else instantiate_from_config(lossconfig)

    def _finish(self, use_ema: bool, decay: float, ckpt_path: str | None, ignore_keys: Sequence[str]) -> None:
        """Finish a constructor, when all modules exist."""
        self.use_ema = use_ema
        if use_ema:
            self.model_ema = LitEma(self.networks(), decay=decay)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys=ignore_keys)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load the weights of a checkpoint that fit, without keys that start with one of `ignore_keys`."""
        missing = init_from_checkpoint(self, path, ignore_keys=ignore_keys)
        if self.use_ema and any(key.startswith("model_ema.") for key in missing):
            self.model_ema.reset(self.networks())

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Use the averaged weights, if there are any, inside the context; `context` is as published, unused."""
        with averaged_weights([(self.model_ema, self.networks())] if self.use_ema else []):
            yield

    # ---- training ----

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """Images `batch[k]`, (B, H, W, C) or (B, H, W), as (B, C, H, W) float32; ValueError for a wrong size."""
        x = batch[k]
        if x.ndim == 3:
            x = x[..., None]
        height, width, f = x.shape[1], x.shape[2], self.downsampling_factor
        if height % f or width % f:
            raise ValueError(f"images of {width} x {height} pixels do not fit: both sides must be multiples of {f}")
        return x.movedim(-1, 1).to(memory_format=torch.contiguous_format).float()

    def on_fit_start(self) -> None:
        """Refuse to train without a loss."""
        if isinstance(self.loss, nn.Identity):
            raise ValueError(
                f"this {type(self).__name__} has no loss to train with: its lossconfig is torch.nn.Identity, or it was "
                "built without memory for weights from a file; ldm.modules.losses has losses"
            )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the gradients of a batch, and step the optimizers where a step is due.

        Called with a third argument `optimizer_idx`, as Lightning 1 did, it only computes and logs the loss of the
        autoencoder (0) or of the discriminator (1). Lightning 2 refuses a parameter of that name.
        """
        x = self.get_input(batch, self.image_key)
        optimizer_idx = args[0] if args else kwargs.get("optimizer_idx")
        if optimizer_idx is not None:
            return self._loss_of_one_optimizer(x, optimizer_idx)
        _, loss_of = self.losses(x)
        optimizers = _as_list(self.optimizers())
        # without the discriminator's weights in this graph, one backward pass gives each side its own gradient
        self.toggle_optimizer(optimizers[0])
        aeloss, parts = loss_of(0, self.global_step, last_layer=self.get_last_layer(), split="train")
        self.untoggle_optimizer(optimizers[0])
        loss, shown = aeloss, {"aeloss": aeloss.detach()}
        if len(optimizers) > 1:
            discloss, disc_parts = loss_of(1, self.global_step, last_layer=self.get_last_layer(), split="train")
            loss, shown, parts = aeloss + discloss, shown | {"discloss": discloss.detach()}, parts | disc_parts
        check_finite(self, loss, parts)

        number = batch_idx + 1
        last = self.trainer.is_last_batch or number >= self.trainer.num_training_batches
        self._stepped = number % self.accumulate_grad_batches == 0 or last
        # processes need to agree on gradients only before a step
        sync = nullcontext() if self._stepped else getattr(self.trainer.strategy, "block_backward_sync", nullcontext)()
        with sync:
            self.manual_backward(loss / self.accumulate_grad_batches)
        if self._stepped:
            self._step(optimizers)
        self._log_losses(shown, x, prog_bar=True, on_step=True)
        self._log_losses(parts, x, on_step=True)
        return aeloss.detach()

    def _loss_of_one_optimizer(self, x: Tensor, optimizer_idx: int) -> Tensor:
        _, loss_of = self.losses(x)
        loss, parts = loss_of(optimizer_idx, self.global_step, last_layer=self.get_last_layer(), split="train")
        self._log_losses({"discloss" if optimizer_idx else "aeloss": loss.detach()}, x, prog_bar=True, on_step=True)
        self._log_losses(parts, x, on_step=True)
        return loss

    def _log_losses(self, parts: Mapping[str, Tensor], x: Tensor, **options: Any) -> None:
        sync = self._trainer is not None and self.trainer.world_size > 1
        self.log_dict(parts, on_epoch=True, batch_size=len(x), sync_dist=sync, **options)

    def _step(self, optimizers: Sequence[LightningOptimizer]) -> None:
        """Step every optimizer on the gradients of one backward pass, then the schedules."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # float16 has one
        scale = None if scaler is None else scaler.get_scale()
        for i, optimizer in enumerate(optimizers):
            if i == 0:
                optimizer.step()
            else:
                if scaler is not None:
                    # the first step may have changed the scale, but these gradients have the old one
                    _multiply_gradients(optimizer.optimizer, scaler.get_scale() / scale)
                # not through Lightning's wrapper, whose every step counts in global_step
                self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)
            optimizer.zero_grad()
        for scheduler in _as_list(self.lr_schedulers()):
            scheduler.step()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip gradients, which are unscaled here in every precision."""
        if self.gradient_clip_val:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Update the averaged weights after an optimizer step."""
        if self.use_ema and self._stepped:
            self.model_ema(self.networks())

    def configure_optimizers(self) -> Any:
        """An optimizer for the autoencoder and, if the loss has a discriminator, another for that."""
        parameters, lr = self.trained_parameters(), self.lr_g_factor * self.learning_rate
        optimizers = [make_optimizer(parameters, lr, self.optimizer_config)]
        discriminator = getattr(self.loss, "discriminator", None)
        if discriminator is not None:
            optimizers.append(make_optimizer(discriminator.parameters(), self.learning_rate, self.optimizer_config))
        return optimizers, lr_schedules(optimizers, self.scheduler_config)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters of the autoencoder's optimizer."""
        return [parameter for parameter in self.networks().parameters() if parameter.requires_grad]

    # ---- validation, images ----

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Log losses and PSNR of the weights, and of their averages as val_ema/..."""
        self._validation_step(batch, batch_idx)
        if self.use_ema:
            with self.ema_scope():
                self._validation_step(batch, batch_idx, "_ema")

    def _validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, postfix: str = "") -> dict[str, Tensor]:
        split = f"val{postfix}"
        x = self.get_input(batch, self.image_key)
        reconstructions, loss_of = self.losses(x)
        logged = {f"{split}/psnr": psnr(reconstructions, x).mean()}
        for optimizer_idx in range(1 if getattr(self.loss, "discriminator", None) is None else 2):
            loss, parts = loss_of(optimizer_idx, self.global_step, last_layer=self.get_last_layer(), split=split)
            logged |= parts if optimizer_idx else {f"{split}/aeloss": loss} | parts
        self._log_losses(logged, x, on_step=False)
        return logged

    def to_rgb(self, x: Tensor) -> Tensor:
        """Maps with more than 3 channels as colors (B, 3, H, W) in [-1, 1]; other images unchanged."""
        if x.shape[1] <= 3:
            return x
        if not hasattr(self, "colorize"):
            raise ValueError(f"to show maps of {x.shape[1]} channels a model needs colorize_nlabels: {x.shape[1]}")
        return colorize(x, self.colorize)


class AutoencoderKL(FirstStage):
    """KL-regularized autoencoder (Rombach et al. 2022): `encode` gives a distribution, `decode` an image.

    Args:
        ddconfig: arguments of `Encoder` and `Decoder`.
        lossconfig: the loss; `torch.nn.Identity` without training.
        embed_dim: channels of the latent.
        ckpt_path, ignore_keys: a checkpoint to start from.
        image_key: the batch's entry with images.
        colorize_nlabels: channels of segmentation maps, to show them as colors.
        ema_decay: average the weights.
        learn_logvar: train the loss's variance, too.

    Not in the original:
        channels_per_group: group size of the norms in narrow networks (see `regroup`).
        initial_logvar: the posterior's initial log variance.
        optimizer_config, scheduler_config: `{target, params}` of another optimizer than Adam(0.5, 0.9), and of a
            learning-rate schedule.
    """

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        ema_decay: float | None = None,
        learn_logvar: bool = False,
        channels_per_group: int | None = None,
        initial_logvar: float = 0.0,
        optimizer_config: Mapping[str, Any] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(image_key, monitor, colorize_nlabels, optimizer_config, scheduler_config)
        if not ddconfig["double_z"]:
            raise ValueError("AutoencoderKL needs ddconfig.double_z: true, since its encoder gives means and variances")
        self.embed_dim = embed_dim
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = self._build_loss(lossconfig)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        with torch.no_grad():
            self.quant_conv.get_parameter("bias")[embed_dim:] += initial_logvar
        self.learn_logvar = learn_logvar
        if isinstance(getattr(self.loss, "logvar", None), nn.Parameter):
            self.loss.logvar.requires_grad_(learn_logvar)
        elif learn_logvar and not isinstance(self.loss, nn.Identity):
            raise ValueError(f"learn_logvar: {type(self.loss).__name__} has no logvar to learn")
        if channels_per_group is not None:
            regroup(self, channels_per_group)
        self._finish(ema_decay is not None, ema_decay or 0.0, ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Image (B, 3, H, W) in [-1, 1] to the posterior over latents (B, embed_dim, H/f, W/f)."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, embed_dim, h, w) to image (B, 3, f h, f w), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, input: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction of `input`, from a sample or the mode of its posterior, and the posterior."""
        posterior = self.encode(input)
        z = DistributedRNG.for_module(self).sample(posterior) if sample_posterior else posterior.mode()
        return self.decode(z), posterior

    def losses(self, x: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, dict[str, Tensor]]]]:
        """See `FirstStage`."""
        reconstructions, posterior = self(x)
        return reconstructions, partial(self.loss, x, reconstructions, posterior)

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters of the autoencoder's optimizer."""
        return [*super().trained_parameters(), *([self.loss.logvar] if self.learn_logvar else [])]

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Tensor],
        only_inputs: bool = False,
        log_ema: bool = False,
        *,
        N: int = 8,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Images (B, 3, H, W): inputs, reconstructions, and samples, which are decoded standard normal latents.

        Args:
            batch: as in training.
            only_inputs: nothing else.
            log_ema: also reconstructions_ema and samples_ema, with averaged weights.
            N: number of items.
        """
        x = self.get_input(batch, self.image_key)[:N].to(self.device)
        log = {"inputs": x}
        if not only_inputs:
            log["reconstructions"], posterior = self(x)
            log["samples"] = self.decode(torch.randn_like(posterior.mean))
            if log_ema and self.use_ema:
                with self.ema_scope():
                    log["reconstructions_ema"], posterior = self(x)
                    log["samples_ema"] = self.decode(torch.randn_like(posterior.mean))
        return {name: self.to_rgb(images) for name, images in log.items()}


class VQModel(FirstStage):
    """Vector-quantized autoencoder (Esser et al. 2021): `encode` quantizes, `decode` takes the quantized latent.

    Args:
        n_embed, embed_dim: number and width of codebook entries.
        batch_resize_range: (lower, upper) pixels: resize training batches to a random multiple of 16 in between.
        lr_g_factor: learning rate of the autoencoder relative to the discriminator's.
        remap, sane_index_shape: see `VectorQuantizer`.
        use_ema: average the weights.
        Others as in `AutoencoderKL`.
    """

    NETWORKS = (*FirstStage.NETWORKS, "quantize")

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        colorize_nlabels: int | None = None,
        monitor: str | None = None,
        batch_resize_range: tuple[int, int] | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        lr_g_factor: float = 1.0,
        remap: str | None = None,
        sane_index_shape: bool = False,
        use_ema: bool = False,
        optimizer_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(image_key, monitor, colorize_nlabels, optimizer_config, scheduler_config)
        self.embed_dim = embed_dim
        self.n_embed = n_embed
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = self._build_loss(lossconfig)
        self.quantize = VectorQuantizer(n_embed, embed_dim, remap=remap, sane_index_shape=sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if getattr(self.loss, "n_classes", 0) is None:
            self.loss.n_classes = self.quantize.re_embed
        self.batch_resize_range = batch_resize_range
        if batch_resize_range is not None:
            check_resize_range(batch_resize_range, self.downsampling_factor)
        self.lr_g_factor = lr_g_factor
        self._finish(use_ema, 0.9999, ckpt_path, ignore_keys)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) to the latent before quantization (B, embed_dim, H/f, W/f)."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Image (B, 3, H, W) to (quantized latent, codebook loss, (None, None, indices))."""
        return self.quantize(self.quant_conv(self.encoder(x)))

    def decode(self, quant: Tensor) -> Tensor:
        """Quantized latent (B, embed_dim, h, w) to image (B, 3, f h, f w)."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, code_b: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Codebook indices (B, h, w), or any with the `shape` (B, h, w, embed_dim) of their entries, to an image."""
        return self.decode(self.quantize.get_codebook_entry(code_b, shape or (*code_b.shape, self.embed_dim)))

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Reconstruction of `input`, the codebook loss and, if asked for, the codebook indices."""
        quant, loss, (_, _, indices) = self.encode(input)
        reconstruction = self.decode(quant)
        return (reconstruction, loss, indices) if return_pred_indices else (reconstruction, loss)

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """As `FirstStage.get_input`; in training, resized to a random size in `batch_resize_range`."""
        x = super().get_input(batch, k)
        if self.batch_resize_range is None or not self.training:
            return x
        lower, upper = self.batch_resize_range
        # the largest size comes first: if memory runs out, it does so at once
        steps = (upper - lower) // 16 + 1
        size = upper if self.global_step <= 4 else lower + 16 * int(torch.randint(steps, (), device="cpu"))
        return x if x.shape[2] == size else F.interpolate(x, size=(size, size), mode="bicubic")

    def losses(self, x: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, dict[str, Tensor]]]]:
        """See `FirstStage`."""
        reconstructions, codebook_loss, indices = self(x, return_pred_indices=True)
        return reconstructions, partial(self.loss, codebook_loss, x, reconstructions, predicted_indices=indices)

    def _validation_step(self, batch: Mapping[str, Tensor], batch_idx: int, suffix: str = "") -> dict[str, Tensor]:
        return super()._validation_step(batch, batch_idx, suffix)

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Tensor],
        only_inputs: bool = False,
        plot_ema: bool = False,
        *,
        N: int = 8,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Images (B, 3, H, W): inputs and reconstructions, by averaged weights too if `plot_ema`; options as in KL."""
        x = self.get_input(batch, self.image_key)[:N].to(self.device)
        log = {"inputs": x}
        if not only_inputs:
            log["reconstructions"] = self(x)[0]
            if plot_ema:
                with self.ema_scope():
                    log["reconstructions_ema"] = self(x)[0]
        return {name: self.to_rgb(images) for name, images in log.items()}


class VQModelInterface(VQModel):
    """A VQ first stage for diffusion: latents are continuous, and quantized only when decoded."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, embed_dim=embed_dim, **kwargs)  # type: ignore[misc]  # args are those before it

    def encode(self, x: Tensor) -> Tensor:  # type: ignore[override]  # as published
        """Image (B, 3, H, W) to the latent before quantization (B, embed_dim, H/f, W/f)."""
        return self.quant_conv(self.encoder(x))

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latent to image, quantized first unless `force_not_quantize`."""
        quant = h if force_not_quantize else self.quantize(h)[0]
        return self.decoder(self.post_quant_conv(quant))

    def forward(self, input: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """As `VQModel.forward`."""
        quant, loss, (_, _, indices) = self.quantize(self.encode(input))
        reconstruction = self.decode(quant, force_not_quantize=True)
        return (reconstruction, loss, indices) if return_pred_indices else (reconstruction, loss)


class IdentityFirstStage(nn.Module):
    """No first stage: pixels are the latents.

    Args:
        vq_interface: `quantize` returns what a quantizer would.
    """

    info: ModelInfo | None = None
    downsampling_factor = 1

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` itself."""
        return x

    def decode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` itself."""
        return x

    def quantize(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None, list[None]]:
        """`x` itself, as a quantizer's output if `vq_interface`."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` itself."""
        return x


def check_resize_range(sizes: Sequence[int], f: int) -> None:
    """ValueError unless sizes are (lower, upper), multiples of 16, and the downsampling factor f divides 16."""
    if len(sizes) != 2 or not 0 < sizes[0] <= sizes[1] or sizes[0] % 16 or sizes[1] % 16:
        raise ValueError(f"batch_resize_range must be two multiples of 16, lower and upper, not {list(sizes)}")
    if 16 % f:
        raise ValueError(f"batch_resize_range goes in steps of 16, which do not fit a downsampling factor of {f}")


def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,) of images y for x, both (B, C, H, W) in -1..1; y is clipped to that."""
    mse = (y.float().clamp(-1, 1) - x).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / mse)


def _as_list(value: Any) -> list[Any]:
    """Lightning gives one optimizer or schedule as itself, several as a list, none as None."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _multiply_gradients(optimizer: torch.optim.Optimizer, factor: float) -> None:
    if factor != 1:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, factor)
