"""First stages: KL-regularised and vector-quantised autoencoders, and the identity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models.diffusion.distributed_rng import DistributedRNG
from ldm.models.first_stage import FirstStage
from ldm.models.model_info import ModelInfo
from ldm.modules.diffusionmodules.model import Decoder, Encoder, regroup
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.quantize import VectorQuantizer
from ldm.util import instantiate_from_config


class AutoencoderKL(FirstStage):
    """KL-regularised autoencoder (Rombach et al. 2022, section 3.1): `encode` gives a distribution, `decode` an image.

    ddconfig: arguments of `Encoder` and `Decoder`. lossconfig: the loss; `torch.nn.Identity` if it is not to be
    trained. embed_dim: channels of the latent. channels_per_group: size of the norms' groups in a network narrower than
    the published ones (see `regroup`). initial_logvar: what the posterior's log variance begins with. learn_logvar:
    train the loss's variance too. ema_decay: keep an average of the weights. optimizer_config, scheduler_config:
    `{target, params}` of another optimiser than Adam(0.5, 0.9), and of a schedule of the learning rate.
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
        self.loss = build_loss(lossconfig)
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
        if ema_decay is not None:
            self.model_ema = LitEma(self.networks(), decay=ema_decay)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode(self, x: Tensor) -> DiagonalGaussianDistribution:
        """Image (B, 3, H, W) in [-1, 1] to the posterior over latents (B, embed_dim, H/f, W/f)."""
        return DiagonalGaussianDistribution(self.quant_conv(self.encoder(x)))

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, embed_dim, h, w) to image (B, 3, f h, f w), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, sample_posterior: bool = True) -> tuple[Tensor, DiagonalGaussianDistribution]:
        """Reconstruction of `x` and the posterior it was decoded from."""
        posterior = self.encode(x)
        if not sample_posterior:
            return self.decode(posterior.mode()), posterior
        noise = DistributedRNG.of(self).randn(posterior.mean.shape, device="cpu")
        return self.decode(posterior.sample(noise)), posterior

    def losses(self, x: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, dict[str, Tensor]]]]:
        """See `FirstStage`."""
        reconstructions, posterior = self(x)
        return reconstructions, partial(self.loss, x, reconstructions, posterior)

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the autoencoder's optimiser trains."""
        return [*super().trained_parameters(), *([self.loss.logvar] if self.learn_logvar else [])]

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Tensor], N: int = 8, only_inputs: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) of up to N items: inputs, reconstructions, and decoded standard normal latents."""
        x = self.get_input(batch, self.image_key)[:N]
        shown = {"inputs": x}
        if not only_inputs:
            reconstructions, posterior = self(x)
            samples = self.decode(torch.randn_like(posterior.mean))
            shown |= {"reconstructions": reconstructions, "samples": samples}
        return {name: self.to_rgb(pictures) for name, pictures in shown.items()}


class VQModel(FirstStage):
    """Vector-quantised autoencoder (Esser et al. 2021): `encode` quantises, `decode` takes the quantised latent.

    n_embed, embed_dim: entries in the codebook, and their width. batch_resize_range: (lower, upper) pixels; training
    batches are resized to a random multiple of 16 among these. lr_g_factor: the autoencoder's learning rate by the
    discriminator's. remap, sane_index_shape: see `VectorQuantizer`. use_ema: keep an average of the weights. The other
    options are those of `AutoencoderKL`.
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
        self.loss = build_loss(lossconfig)
        self.quantize = VectorQuantizer(n_embed, embed_dim, remap=remap, sane_index_shape=sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if getattr(self.loss, "n_classes", 0) is None:
            self.loss.n_classes = self.quantize.re_embed
        self.batch_resize_range = batch_resize_range
        if batch_resize_range is not None:
            check_resize_range(batch_resize_range, self.downsampling_factor)
        self.generator_lr_factor = lr_g_factor
        if use_ema:
            self.model_ema = LitEma(self.networks())
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path, ignore_keys)

    def encode_to_prequant(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) to the latent before quantisation (B, embed_dim, H/f, W/f)."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, tuple]:
        """Image (B, 3, H, W) to (quantised latent, codebook loss, (None, None, indices))."""
        return self.quantize(self.encode_to_prequant(x))

    def decode(self, quant: Tensor) -> Tensor:
        """Quantised latent (B, embed_dim, h, w) to image (B, 3, f h, f w)."""
        return self.decoder(self.post_quant_conv(quant))

    def decode_code(self, indices: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        """Codebook indices, and the (B, h, w, embed_dim) shape they stand for, to an image."""
        return self.decode(self.quantize.get_codebook_entry(indices, shape))

    def forward(self, x: Tensor, return_pred_indices: bool = False) -> tuple[Tensor, ...]:
        """Reconstruction of `x`, the codebook loss and, if asked for, the indices into the codebook."""
        quant, loss, (_, _, indices) = self.quantize(self.encode_to_prequant(x))
        reconstruction = self.decoder(self.post_quant_conv(quant))
        return (reconstruction, loss, indices) if return_pred_indices else (reconstruction, loss)

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """As `FirstStage.get_input`; while training, of a random size in `batch_resize_range`."""
        x = super().get_input(batch, k)
        if self.batch_resize_range is None or not self.training:
            return x
        lower, upper = self.batch_resize_range
        # the largest size comes first: memory that does not suffice shows at once
        steps = (upper - lower) // 16 + 1
        size = upper if self.global_step <= 4 else lower + 16 * int(torch.randint(steps, (), device="cpu"))
        return x if x.shape[2] == size else F.interpolate(x, size=(size, size), mode="bicubic")

    def losses(self, x: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, dict[str, Tensor]]]]:
        """See `FirstStage`."""
        reconstructions, codebook_loss, indices = self(x, return_pred_indices=True)
        return reconstructions, partial(self.loss, codebook_loss, x, reconstructions, predicted_indices=indices)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Tensor], N: int = 8, only_inputs: bool = False, plot_ema: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) of up to N items: inputs and reconstructions, by averaged weights too if `plot_ema`."""
        x = self.get_input(batch, self.image_key)[:N]
        shown = {"inputs": x}
        if not only_inputs:
            shown["reconstructions"] = self(x)[0]
            if plot_ema:
                with self.ema_scope():
                    shown["reconstructions_ema"] = self(x)[0]
        return {name: self.to_rgb(pictures) for name, pictures in shown.items()}


class VQModelInterface(VQModel):
    """A VQ first stage as diffusion sees it: latents are the continuous ones, quantised only on their way back."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, embed_dim=embed_dim, **kwargs)  # type: ignore[misc]  # args are those before it

    def encode(self, x: Tensor) -> Tensor:  # type: ignore[override]  # as published
        """Image (B, 3, H, W) to the unquantised latent (B, embed_dim, H/f, W/f)."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latent to image, quantised first unless `force_not_quantize`."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])


class IdentityFirstStage(nn.Module):
    """No first stage: pixels are the latents."""

    info: ModelInfo | None = None  # set by `ldm.inference.load_first_stage`
    downsampling_factor = 1

    def __init__(self, *args: Any, vq_interface: bool = False, **kwargs: Any) -> None:
        super().__init__()
        self.vq_interface = vq_interface

    def encode(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def decode(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` itself."""
        return x

    def quantize(self, x: Tensor) -> Tensor | tuple[Tensor, None, list[None]]:
        """`x` itself, in the shape of a quantiser's answer if this stands for a VQ model."""
        return (x, None, [None, None, None]) if self.vq_interface else x

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` itself."""
        return x


def build_loss(lossconfig: Mapping[str, Any]) -> nn.Module:
    """The loss of a config; none, for a model that is built without memory to be filled from a file.

    Such a model is for use, and many files hold no weights for a loss.
    """
    return nn.Identity() if torch.empty(0).is_meta else instantiate_from_config(lossconfig)


def check_resize_range(sizes: Sequence[int], f: int) -> None:
    """ValueError unless sizes are (lower, upper), multiples of 16, and the downsampling factor f divides 16."""
    if len(sizes) != 2 or not 0 < sizes[0] <= sizes[1] or sizes[0] % 16 or sizes[1] % 16:
        raise ValueError(f"batch_resize_range must be two multiples of 16, lower and upper, not {list(sizes)}")
    if 16 % f:
        raise ValueError(f"batch_resize_range goes in steps of 16, which do not fit a downsampling factor of {f}")
