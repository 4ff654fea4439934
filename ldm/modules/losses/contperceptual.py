"""The loss of KL-regularised first stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import AdversarialLoss, named

DummyLoss = nn.Identity  # public configs name it where a first stage is not to be trained


class LPIPSWithDiscriminator(AdversarialLoss):
    """Reconstruction under a learnt variance, a trace of KL, LPIPS and a patch discriminator (Rombach et al. 2022, G).

    logvar_init: log variance of the reconstruction; `AutoencoderKL(learn_logvar=True)` trains it. kl_weight: of the KL
    term. The other options are those of `AdversarialLoss`.
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
        """Loss of the autoencoder (optimizer_idx 0) or of the discriminator (1), and its parts as `split`/name.

        inputs, reconstructions: pictures (B, C, H, W). weights: of the pixels. Sums over pixels, means over pictures.
        """
        if optimizer_idx == 1:
            loss, parts = self.discriminator_loss(inputs, reconstructions, global_step, cond)
            return loss, named(parts, split)
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
        return loss, named(parts, split)
