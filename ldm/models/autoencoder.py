"""First stages: KL-regularised and vector-quantised autoencoders, and the identity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.checkpoint import init_from_checkpoint
from ldm.modules.diffusionmodules.model import Decoder, Encoder, regroup
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.quantize import VectorQuantizer
from ldm.util import instantiate_from_config


class FirstStage(pl.LightningModule):
    """What both kinds of autoencoder share: the networks, image batches and loading."""

    image_key: str

    @property
    def downsampling_factor(self) -> int:
        """Pixels a side of one latent position."""
        return 2 ** (len(self.encoder.down) - 1)

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """Images (B, H, W, C) or (B, H, W) of a batch as (B, C, H, W) float32."""
        x = batch[k]
        if x.ndim == 3:
            x = x[..., None]
        return x.movedim(-1, 1).to(memory_format=torch.contiguous_format).float()

    def get_last_layer(self) -> Tensor:
        """The weight on which adversarial training balances its gradients."""
        return self.decoder.last_layer

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights from a checkpoint file, leaving out keys that start with one of `ignore_keys`."""
        init_from_checkpoint(self, path, ignore_keys=ignore_keys)


class AutoencoderKL(FirstStage):
    """KL-regularised autoencoder (Rombach et al. 2022, section 3.1): `encode` gives a distribution, `decode` an image.

    ddconfig: arguments of `Encoder` and `Decoder`. embed_dim: channels of the latent. channels_per_group: size of the
    norms' groups in a network narrower than the published ones (see `regroup`).
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
        channels_per_group: int | None = None,
    ) -> None:
        super().__init__()
        if not ddconfig["double_z"]:
            raise ValueError("AutoencoderKL needs ddconfig.double_z: true, since its encoder gives means and variances")
        self.image_key = image_key
        self.embed_dim = embed_dim
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        self.quant_conv = nn.Conv2d(2 * ddconfig["z_channels"], 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if colorize_nlabels is not None:
            # Random projection that shows segmentation maps as colours.
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))
        if channels_per_group is not None:
            regroup(self, channels_per_group)
        if monitor is not None:
            self.monitor = monitor
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
        z = posterior.sample() if sample_posterior else posterior.mode()
        return self.decode(z), posterior


class VQModel(FirstStage):
    """Vector-quantised autoencoder (Esser et al. 2021): `encode` quantises, `decode` takes the quantised latent."""

    def __init__(
        self,
        ddconfig: Mapping[str, Any],
        lossconfig: Mapping[str, Any],
        n_embed: int,
        embed_dim: int,
        ckpt_path: str | None = None,
        ignore_keys: Sequence[str] = (),
        image_key: str = "image",
        monitor: str | None = None,
        sane_index_shape: bool = False,
    ) -> None:
        super().__init__()
        self.image_key = image_key
        self.embed_dim = embed_dim
        self.n_embed = n_embed
        self.encoder = Encoder(**ddconfig)
        self.decoder = Decoder(**ddconfig)
        self.loss = instantiate_from_config(lossconfig)
        self.quantize = VectorQuantizer(n_embed, embed_dim, beta=0.25, sane_index_shape=sane_index_shape)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)
        if monitor is not None:
            self.monitor = monitor
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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction of `x` and the codebook loss."""
        quant, loss, _ = self.encode(x)
        return self.decode(quant), loss


class VQModelInterface(VQModel):
    """A VQ first stage as diffusion sees it: latents are the continuous ones, quantised only on their way back."""

    def __init__(self, embed_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, embed_dim=embed_dim, **kwargs)

    def encode(self, x: Tensor) -> Tensor:
        """Image (B, 3, H, W) to the unquantised latent (B, embed_dim, H/f, W/f)."""
        return self.encode_to_prequant(x)

    def decode(self, h: Tensor, force_not_quantize: bool = False) -> Tensor:
        """Latent to image, quantised first unless `force_not_quantize`."""
        return super().decode(h if force_not_quantize else self.quantize(h)[0])


class IdentityFirstStage(nn.Module):
    """No first stage: pixels are the latents."""

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
        return x
