"""Vector quantisation of the VQ first stages (van den Oord et al. 2017)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class VectorQuantizer(nn.Module):
    """Nearest codebook entry for every latent position, with a straight-through gradient.

    n_e: entries in the codebook. e_dim: their width. beta: weight of the commitment loss.
    legacy: the published behaviour, in which beta weighs the codebook term instead of the commitment term.
    sane_index_shape: indices of shape (B, H, W) rather than flat.
    """

    def __init__(
        self, n_e: int, e_dim: int, beta: float = 0.25, *, legacy: bool = True, sane_index_shape: bool = False
    ) -> None:
        super().__init__()
        self.n_e = n_e
        self.e_dim = e_dim
        self.beta = beta
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """(B, e_dim, H, W) -> (quantised latent of the same shape, loss, (None, None, indices)), as published."""
        b, _, h, w = z.shape
        flat = z.movedim(1, -1).reshape(-1, self.e_dim)  # (BHW, C)
        codes = self.embedding.weight  # (n_e, C)
        # |z - e|^2 without the term that is the same for all entries
        distance = codes.pow(2).sum(1) - 2 * flat @ codes.t()  # (BHW, n_e)
        indices = distance.argmin(dim=1)
        quantised = self.embedding(indices).view(b, h, w, self.e_dim).movedim(-1, 1)

        codebook, commitment = F.mse_loss(quantised, z.detach()), F.mse_loss(quantised.detach(), z)
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        if self.sane_index_shape:
            indices = indices.view(b, h, w)
        return z + (quantised - z).detach(), loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Entries for `indices`; with `shape` (B, H, W, C) as a latent (B, C, H, W)."""
        entries = self.embedding(indices)
        return entries if shape is None else entries.view(shape).movedim(-1, 1).contiguous()


VectorQuantizer2 = VectorQuantizer  # the public name of this variant
