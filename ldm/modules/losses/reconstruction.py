"""A loss for small first stages: no discriminator, no perceptual network."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import named

_FOREGROUND = 0.1  # difference from the ground, in any channel, from which a pixel belongs to an object


class ReconstructionLoss(nn.Module):
    """Mean of l1_weight |e| + l2_weight e^2, plus kl_weight times the mean KL. Called as `LPIPSWithDiscriminator` is.

    foreground_weight: for pictures of objects on plain ground. Pixels unlike the top left one, which is taken for
    ground, count (1 + foreground_weight) times.
    """

    discriminator = None

    def __init__(
        self,
        kl_weight: float = 1e-6,
        l1_weight: float = 1.0,
        l2_weight: float = 1.0,
        foreground_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.l1_weight = l1_weight
        self.l2_weight = l2_weight
        self.foreground_weight = foreground_weight

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int = 0,
        global_step: int = 0,
        last_layer: Tensor | None = None,
        split: str = "train",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of reconstructions of inputs, both (B, C, H, W) in -1..1, and its parts as `split`/name."""
        error = reconstructions.float() - inputs
        distance = self.l1_weight * error.abs() + self.l2_weight * error.square()
        is_object = (inputs - inputs[:, :, :1, :1]).abs().amax(1, keepdim=True) > _FOREGROUND  # (B, 1, H, W)
        nll_loss = (distance * (1 + self.foreground_weight * is_object)).mean()
        kl_loss = posteriors.kl().float().mean()
        loss = nll_loss + self.kl_weight * kl_loss
        parts = {"total_loss": loss, "kl_loss": kl_loss, "nll_loss": nll_loss, "rec_loss": distance}
        return loss, named(parts, split)
