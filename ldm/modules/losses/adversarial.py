"""What the losses of both kinds of first stage share: pixel and perceptual distance, discriminator, their balance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.modules.losses.discriminator import D_LOSSES, NLayerDiscriminator
from ldm.modules.losses.lpips import LPIPS


class AdversarialLoss(nn.Module):
    """Distance of a reconstruction, and a discriminator that tells it from its picture (Esser et al. 2021, 3.1).

    disc_start: step at which the discriminator joins in. pixelloss_weight, perceptual_weight: of the L1 distance
    (pixel_loss "l1", or "l2") and of LPIPS; with perceptual_weight 0 there is no LPIPS and none of its files is needed.
    disc_factor: multiplies both sides of the game; with 0 there is no discriminator. disc_weight: of its gradient in
    proportion to the distance's, see `calculate_adaptive_weight`. disc_loss: "hinge" or "vanilla". disc_conditional:
    the discriminator also sees `cond`, whose channels disc_in_channels includes. vgg_path, lpips_path: LPIPS's files.
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
        """Weighed sum of pixel and perceptual distance (B, C, H, W), and the perceptual one's mean."""
        error = (inputs - reconstructions).float()
        rec_loss = self.pixel_weight * (error.abs() if self.pixel_loss == "l1" else error.square())
        if self.perceptual_loss is None:
            return rec_loss, rec_loss.new_zeros(())
        p_loss = self.perceptual_loss(inputs, reconstructions)
        return rec_loss + self.perceptual_weight * p_loss, p_loss.mean()

    def factor_at(self, global_step: int) -> float:
        """The discriminator's factor: 0 before `disc_start`."""
        return self.disc_factor if global_step >= self.discriminator_iter_start else 0.0

    def generator_part(
        self,
        nll_loss: Tensor,
        reconstructions: Tensor,
        global_step: int,
        last_layer: Tensor | None,
        cond: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the discriminator adds to the generator's loss, and the parts of it by name."""
        weight = g_loss = nll_loss.new_zeros(())
        if self.discriminator is not None:
            g_loss = -self.discriminator(self._seen(reconstructions, cond)).float().mean()
            if g_loss.requires_grad and nll_loss.requires_grad:  # in validation there is nothing to balance
                weight = self.calculate_adaptive_weight(nll_loss, g_loss, last_layer)
        factor = self.factor_at(global_step)
        parts = {"d_weight": weight, "disc_factor": nll_loss.new_tensor(factor), "g_loss": g_loss}
        return weight * factor * g_loss, parts

    def calculate_adaptive_weight(self, nll_loss: Tensor, g_loss: Tensor, last_layer: Tensor | None) -> Tensor:
        """disc_weight times the ratio of the gradients at the decoder's last layer (Esser et al. 2021, eq. 7)."""
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
        """The discriminator's own loss, and the parts of it by name."""
        if self.discriminator is None:
            raise ValueError("there is no discriminator to train: disc_factor is 0")
        logits_real = self.discriminator(self._seen(inputs.detach(), cond)).float()
        logits_fake = self.discriminator(self._seen(reconstructions.detach(), cond)).float()
        loss = self.factor_at(global_step) * self.disc_loss(logits_real, logits_fake)
        return loss, {"disc_loss": loss, "logits_real": logits_real, "logits_fake": logits_fake}

    def _seen(self, images: Tensor, cond: Tensor | None) -> Tensor:
        if self.disc_conditional != (cond is not None):
            raise ValueError(f"disc_conditional is {self.disc_conditional}, but cond is {type(cond).__name__}")
        return images if cond is None else torch.cat([images, cond], dim=1)


def named(parts: dict[str, Tensor], split: str) -> dict[str, Tensor]:
    """Parts of a loss as they are logged: detached means, under `split`/name."""
    return {f"{split}/{name}": value.detach().float().mean() for name, value in parts.items()}
