"""Loss of small first stages."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import log_entries

_FOREGROUND = 0.1  # difference from the background, in any channel, from which a pixel belongs to an object


class ReconstructionLoss(nn.Module):
    """Loss without discriminator and LPIPS: mean of l1_weight |e| + l2_weight e^2, plus kl_weight times the mean KL.

    Args:
        kl_weight: Weight of the KL term.
        l1_weight: Weight of the absolute error.
        l2_weight: Weight of the squared error.
        foreground_weight: Additional weight of pixels unlike the top left one, for objects on a plain background.
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
        """Compute the loss of reconstructions of inputs (B, C, H, W) in [-1, 1], and log entries."""
        error = reconstructions.float() - inputs
        distance = self.l1_weight * error.abs() + self.l2_weight * error.square()
        is_object = (inputs - inputs[:, :, :1, :1]).abs().amax(1, keepdim=True) > _FOREGROUND  # (B, 1, H, W)
        nll_loss = (distance * (1 + self.foreground_weight * is_object)).mean()
        kl_loss = posteriors.kl().float().mean()
        loss = nll_loss + self.kl_weight * kl_loss
        parts = {"total_loss": loss, "kl_loss": kl_loss, "nll_loss": nll_loss, "rec_loss": distance}
        return loss, log_entries(parts, split)
