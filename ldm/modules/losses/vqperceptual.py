"""The loss of vector-quantised first stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.losses.adversarial import AdversarialLoss, named

DummyLoss = nn.Identity  # the public name for "not to be trained"


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Reconstruction, codebook loss, LPIPS and a patch discriminator (Esser et al. 2021, eq. 4 to 7).

    codebook_weight: of the quantiser's loss. n_classes: size of the codebook, for the log of how much of it is in use.
    perceptual_loss: "lpips", the only one. The other options are those of `AdversarialLoss`.
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
        """Loss of the autoencoder (optimizer_idx 0) or of the discriminator (1), and its parts as `split`/name.

        inputs, reconstructions: pictures (B, C, H, W). predicted_indices: the codes they were decoded from.
        """
        if optimizer_idx == 1:
            loss, parts = self.discriminator_loss(inputs, reconstructions, global_step, cond)
            return loss, named(parts, split)
        rec_loss, p_loss = self.distance(inputs, reconstructions)
        nll_loss = rec_loss.mean()
        adversarial, parts = self.generator_part(nll_loss, reconstructions, global_step, last_layer, cond)
        codebook_loss = codebook_loss.float().mean()
        loss = nll_loss + self.codebook_weight * codebook_loss + adversarial
        parts |= {"total_loss": loss, "quant_loss": codebook_loss, "nll_loss": nll_loss}
        parts |= {"rec_loss": rec_loss, "p_loss": p_loss}
        if predicted_indices is not None and self.n_classes is not None:
            parts["perplexity"], parts["cluster_usage"] = measure_perplexity(predicted_indices, self.n_classes)
        return loss, named(parts, split)


@torch.no_grad()
def measure_perplexity(predicted_indices: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """Perplexity of the codes in a batch (n_embed if all are used alike), and how many codes occur."""
    share = predicted_indices.flatten().bincount(minlength=n_embed).float() / predicted_indices.numel()
    return torch.exp(-(share * torch.log(share + 1e-10)).sum()), (share > 0).sum()
