"""Patch discriminator, its losses, and what the losses of both kinds of first stage share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.losses.lpips import LPIPS

DummyLoss = nn.Identity  # public configs name it where a first stage is not trained


class NLayerDiscriminator(nn.Module):
    """PatchGAN discriminator (Isola et al. 2017, section 3.2.2): one logit per overlapping patch.

    Args:
        input_nc: Channels of the images.
        ndf: Width of the first layer, doubled per layer up to 8 times.
        n_layers: Strided layers; 3 give patches of 70 pixels.
    """

    def __init__(self, input_nc: int = 3, ndf: int = 64, n_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(input_nc, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = ndf
        for n in range(1, n_layers + 1):
            stride = 2 if n < n_layers else 1
            before, width = width, ndf * min(2**n, 8)
            # no bias: the norm has one
            layers += [
                nn.Conv2d(before, width, 4, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        self.apply(weights_init)

    def forward(self, x: Tensor) -> Tensor:  # (B, input_nc, H, W) -> (B, 1, h, w)
        return self.main(x)


def weights_init(module: nn.Module) -> None:
    """Initialise convolutions from N(0, 0.02) and norms from N(1, 0.02) (Radford et al. 2016)."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Compute the discriminator's hinge loss (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Compute the discriminator's cross entropy (Goodfellow et al. 2014, eq. 1)."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


D_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}


def adopt_weight(weight: float, global_step: int, threshold: int = 0, value: float = 0.0) -> float:
    """Return `weight` from step `threshold` on, before that `value`."""
    return value if global_step < threshold else weight


class AdversarialLoss(nn.Module):
    """Base class: pixel and perceptual distance with a discriminator (Esser et al. 2021, section 3.1).

    Args:
        disc_start: Step from which the discriminator is used.
        pixelloss_weight: Weight of the pixel distance.
        disc_num_layers: Strided layers of the discriminator.
        disc_in_channels: Its input channels.
        disc_factor: Weight of both adversarial losses; 0 for no discriminator.
        disc_weight: Factor of `calculate_adaptive_weight`.
        perceptual_weight: Weight of LPIPS; with 0 its files are not needed.
        use_actnorm: Not supported: no published first stage uses it.
        disc_conditional: Concatenate `cond`, whose channels `disc_in_channels` includes, to the discriminator's input.
        disc_ndf: Width of the discriminator.
        disc_loss: "hinge" or "vanilla".
        pixel_loss: "l1" or "l2".
        vgg_path: LPIPS's VGG16.
        lpips_path: LPIPS's linear weights.
    """

    def __init__(
        self,
        disc_start: int,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_ndf: int = 64,
        disc_loss: str = "hinge",
        pixel_loss: str = "l1",
        vgg_path: str | None = None,
        lpips_path: str | None = None,
    ) -> None:
        super().__init__()
        if disc_loss not in D_LOSSES:
            raise ValueError(f"disc_loss {disc_loss!r} is not one of {', '.join(D_LOSSES)}")
        if pixel_loss not in ("l1", "l2"):
            raise ValueError(f"pixel_loss {pixel_loss!r} is not one of l1, l2")
        if use_actnorm:
            raise ValueError("use_actnorm is not supported: no published first stage has it")
        self.pixel_weight = pixelloss_weight
        self.pixel_loss = pixel_loss
        self.perceptual_weight = perceptual_weight
        self.perceptual_loss = LPIPS(vgg_path, lpips_path) if perceptual_weight > 0 else None
        self.discriminator = None
        if disc_factor > 0:
            self.discriminator = NLayerDiscriminator(disc_in_channels, disc_ndf, disc_num_layers)
        self.discriminator_iter_start = disc_start
        self.disc_factor = disc_factor
        self.discriminator_weight = disc_weight
        self.disc_conditional = disc_conditional
        self.disc_loss = D_LOSSES[disc_loss]

    def distance(self, inputs: Tensor, reconstructions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the weighted pixel and perceptual distance (B, C, H, W), and the mean perceptual one."""
        error = (inputs - reconstructions).float()
        rec_loss = self.pixel_weight * (error.abs() if self.pixel_loss == "l1" else error.square())
        if self.perceptual_loss is None:
            return rec_loss, rec_loss.new_zeros(())
        p_loss = self.perceptual_loss(inputs, reconstructions)
        return rec_loss + self.perceptual_weight * p_loss, p_loss.mean()

    def generator_part(
        self,
        nll_loss: Tensor,
        reconstructions: Tensor,
        global_step: int,
        last_layer: Tensor | None,
        cond: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the adversarial term of the generator's loss, and its parts by name."""
        weight = g_loss = nll_loss.new_zeros(())
        if self.discriminator is not None:
            g_loss = -self.discriminator(self._disc_input(reconstructions, cond)).float().mean()
            if g_loss.requires_grad and nll_loss.requires_grad:  # in validation there is nothing to balance
                weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer=last_layer)
        factor = adopt_weight(self.disc_factor, global_step, threshold=self.discriminator_iter_start)
        parts = {"d_weight": weight, "disc_factor": nll_loss.new_tensor(factor), "g_loss": g_loss}
        return weight * factor * g_loss, parts

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor | None = None) -> Tensor:
        """Compute disc_weight times the ratio of gradients at the decoder's last layer (Esser et al. 2021, eq. 7)."""
        if last_layer is None:
            raise ValueError("training with a discriminator needs last_layer, the decoder's last weight")
        nll_grad, g_grad = (
            torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm() for loss in (nll_loss, g_loss)
        )
        ratio = nll_grad / (g_grad + 1e-4)
        return self.discriminator_weight * ratio.clamp(0.0, 1e4).detach()

    def discriminator_loss(
        self, inputs: Tensor, reconstructions: Tensor, global_step: int, cond: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the discriminator's loss, and its parts by name."""
        if self.discriminator is None:
            raise ValueError("disc_factor is 0: there is no discriminator to train")
        logits_real = self.discriminator(self._disc_input(inputs.detach(), cond)).float()
        logits_fake = self.discriminator(self._disc_input(reconstructions.detach(), cond)).float()
        factor = adopt_weight(self.disc_factor, global_step, threshold=self.discriminator_iter_start)
        loss = factor * self.disc_loss(logits_real, logits_fake)
        return loss, {"disc_loss": loss, "logits_real": logits_real, "logits_fake": logits_fake}

    def _disc_input(self, images: Tensor, cond: Tensor | None) -> Tensor:
        if self.disc_conditional != (cond is not None):
            raise ValueError(f"disc_conditional is {self.disc_conditional}, but cond is {type(cond).__name__}")
        return images if cond is None else torch.cat([images, cond], dim=1)


def log_entries(parts: dict[str, Tensor], split: str) -> dict[str, Tensor]:
    """Format parts of a loss for logging: detached means under `split`/name."""
    return {f"{split}/{name}": value.detach().float().mean() for name, value in parts.items()}
