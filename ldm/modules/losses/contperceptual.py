"""Losses of KL-regularised first stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import (
    AdversarialLoss,
    DummyLoss,
    NLayerDiscriminator,
    adopt_weight,
    hinge_d_loss,
    log_entries,
    vanilla_d_loss,
    weights_init,
)
from ldm.modules.losses.lpips import LPIPS

__all__ = [
    "LPIPS",
    "DummyLoss",
    "LPIPSWithDiscriminator",
    "NLayerDiscriminator",
    "adopt_weight",
    "hinge_d_loss",
    "vanilla_d_loss",
    "weights_init",
]


class LPIPSWithDiscriminator(AdversarialLoss):
    """Reconstruction with learned variance, KL, LPIPS and a patch discriminator (Rombach et al. 2022, appendix G).

    Args:
        disc_start: Step from which the discriminator is used.
        logvar_init: Log variance of the reconstruction; `AutoencoderKL(learn_logvar=True)` trains it.
        kl_weight: Weight of the KL term.
        **options: Options of `AdversarialLoss`.
    """

    def __init__(self, disc_start: int, logvar_init: float = 0.0, kl_weight: float = 1.0, **options: Any) -> None:
        super().__init__(disc_start, **options)
        self.kl_weight = kl_weight
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)))

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: DiagonalGaussianDistribution,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the autoencoder (optimizer_idx 0) or of the discriminator (1).

        Args:
            inputs: Images (B, C, H, W).
            reconstructions: Their reconstructions.
            posteriors: Distribution of the latents.
            optimizer_idx: 0 for the autoencoder, 1 for the discriminator.
            global_step: Training step.
            last_layer: Last weight of the decoder, for the adaptive weight.
            cond: Condition of the discriminator.
            split: Prefix of the log entries.
            weights: Weights of the pixels.

        Returns:
            The loss, summed over pixels and averaged over images, and log entries.
        """
        if optimizer_idx == 1:
            loss, parts = self.discriminator_loss(inputs, reconstructions, global_step, cond)
            return loss, log_entries(parts, split)
        batch = inputs.shape[0]
        rec_loss, _ = self.distance(inputs, reconstructions)
        nll = rec_loss / self.logvar.exp() + self.logvar  # (B, C, H, W)
        nll_loss = nll.sum() / batch
        weighted = nll_loss if weights is None else (weights * nll).sum() / batch
        kl_loss = posteriors.kl().float().sum() / batch
        adversarial, parts = self.generator_part(nll_loss, reconstructions, global_step, last_layer, cond)
        loss = weighted + self.kl_weight * kl_loss + adversarial
        parts |= {"total_loss": loss, "logvar": self.logvar, "kl_loss": kl_loss}
        parts |= {"nll_loss": nll_loss, "rec_loss": rec_loss}
        return loss, log_entries(parts, split)
