"""Loss of vector-quantised first stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    "NLayerDiscriminator",
    "VQLPIPSWithDiscriminator",
    "adopt_weight",
    "hinge_d_loss",
    "l1",
    "l2",
    "measure_perplexity",
    "vanilla_d_loss",
    "weights_init",
]


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Reconstruction, codebook loss, LPIPS and a patch discriminator (Esser et al. 2021, eq. 4 to 7).

    Args:
        disc_start: Step from which the discriminator is used.
        codebook_weight: Weight of the quantiser's loss.
        n_classes: Size of the codebook, to log its perplexity.
        perceptual_loss: "lpips", the only one.
        **options: Options of `AdversarialLoss`.
    """

    def __init__(
        self,
        disc_start: int,
        codebook_weight: float = 1.0,
        n_classes: int | None = None,
        perceptual_loss: str = "lpips",
        **options: Any,
    ) -> None:
        super().__init__(disc_start, **options)
        if perceptual_loss != "lpips":
            raise ValueError(f"perceptual_loss {perceptual_loss!r} is not supported: use 'lpips'")
        self.codebook_weight = codebook_weight
        self.n_classes = n_classes

    def forward(
        self,
        codebook_loss: Tensor,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of the autoencoder (optimizer_idx 0) or of the discriminator (1), and log entries.

        Args are those of `LPIPSWithDiscriminator.forward`, with the quantiser's `codebook_loss` and
        `predicted_indices`, the codebook indices of the latents.
        """
        if optimizer_idx == 1:
            loss, parts = self.discriminator_loss(inputs, reconstructions, global_step, cond)
            return loss, log_entries(parts, split)
        rec_loss, p_loss = self.distance(inputs, reconstructions)
        nll_loss = rec_loss.mean()
        adversarial, parts = self.generator_part(nll_loss, reconstructions, global_step, last_layer, cond)
        codebook_loss = codebook_loss.float().mean()
        loss = nll_loss + self.codebook_weight * codebook_loss + adversarial
        parts |= {"total_loss": loss, "quant_loss": codebook_loss, "nll_loss": nll_loss}
        parts |= {"rec_loss": rec_loss, "p_loss": p_loss}
        if predicted_indices is not None and self.n_classes is not None:
            parts["perplexity"], parts["cluster_usage"] = measure_perplexity(predicted_indices, self.n_classes)
        return loss, log_entries(parts, split)


@torch.no_grad()
def measure_perplexity(predicted_indices: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """Compute the perplexity of codes in a batch (n_embed if all are equally frequent), and how many occur."""
    frequency = predicted_indices.flatten().bincount(minlength=n_embed).float() / predicted_indices.numel()
    return torch.exp(-(frequency * torch.log(frequency + 1e-10)).sum()), (frequency > 0).sum()


def l1(x: Tensor, y: Tensor) -> Tensor:
    """Compute the absolute error, element by element."""
    return torch.abs(x - y)


def l2(x: Tensor, y: Tensor) -> Tensor:
    """Compute the squared error, element by element."""
    return torch.square(x - y)
