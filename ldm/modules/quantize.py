"""Vector quantisation of the VQ first stages (van den Oord et al. 2017)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 4096  # positions whose distances to all entries are in memory at once


class VectorQuantizer(nn.Module):
    """Nearest codebook entry for every latent position, with a straight-through gradient.

    n_e: entries in the codebook. e_dim: their width. beta: weight of the commitment loss.
    remap: a `.npy` file with the entries in use; indices then count among these alone. unknown_index: what becomes of
    an index that is not among them: "random" for any of them, "extra" for one more index, or the number of one.
    sane_index_shape: indices of shape (B, H, W) rather than flat, or with `remap` (BHW, 1).
    legacy: the published behaviour, in which beta weighs the codebook term instead of the commitment term.
    """

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float = 0.25,
        remap: str | None = None,
        unknown_index: str | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        self.n_e = n_e
        self.e_dim = e_dim
        self.beta = beta
        self.legacy = legacy
        self.sane_index_shape = sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / n_e, 1.0 / n_e)
        self.remap = remap
        self.re_embed = n_e  # how many indices there are
        if remap is not None:
            used = load_used(remap, n_e)
            self.register_buffer("used", used)
            self.re_embed = len(used) + (unknown_index == "extra")
            self.unknown_index = check_unknown_index(unknown_index, len(used))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """(B, e_dim, H, W) -> (quantised latent of the same shape, loss, (None, None, indices)), as published."""
        b, _, h, w = z.shape
        flat = z.movedim(1, -1).reshape(-1, self.e_dim)  # (BHW, C)
        codes = self.embedding.weight  # (n_e, C)
        with torch.autocast(z.device.type, enabled=False):  # half precision confuses neighbours
            flat, codes = flat.detach().float(), codes.detach().float()
            norms = codes.pow(2).sum(1)
            # |z - e|^2 (rows, n_e) without the term that is the same for all entries
            distances = (torch.addmm(norms, rows, codes.t(), alpha=-2) for rows in flat.split(ROWS))
            indices = torch.cat([distance.argmin(dim=1) for distance in distances])
        quantised = self.embedding(indices).view(b, h, w, self.e_dim).movedim(-1, 1)

        codebook, commitment = F.mse_loss(quantised, z.detach()), F.mse_loss(quantised.detach(), z)
        loss = commitment + self.beta * codebook if self.legacy else self.beta * commitment + codebook
        if self.remap is not None:
            indices = self.remap_to_used(indices.view(b, -1)).view(-1, 1)
        if self.sane_index_shape:
            indices = indices.view(b, h, w)
        return z + (quantised - z).detach(), loss, (None, None, indices)

    used: Tensor  # the entries that are used, where there is a remap

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Indices (B, ...) into the codebook as indices into the used entries, of the same shape."""
        match = inds[..., None].eq(self.used)  # (B, ..., number of used entries)
        new, known = match.int().argmax(-1), match.any(-1)
        if self.unknown_index == "random":
            other = torch.randint(len(self.used), inds.shape, device="cpu").to(inds.device)
        else:
            other = torch.full_like(inds, int(self.unknown_index))
        return torch.where(known, new, other)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """The way back: indices into the codebook. The extra index stands for the first of the used entries."""
        return self.used[inds.where(inds < len(self.used), 0)]

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Entries for `indices`; with `shape` (B, H, W, C) as a latent (B, C, H, W)."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        entries = self.embedding(indices)
        return entries if shape is None else entries.view(shape).movedim(-1, 1).contiguous()


VectorQuantizer2 = VectorQuantizer  # the public name of this variant


def load_used(path: str, n_e: int) -> Tensor:
    """The codebook entries that a `.npy` file lists, int64, on the CPU even while models are built without memory."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"remap names {path}, which is not there: it is a .npy file of codebook indices")
    used = np.load(path, allow_pickle=False)
    if used.ndim != 1 or used.dtype.kind not in "iu" or not used.size or used.min() < 0 or used.max() >= n_e:
        raise ValueError(f"remap: {path} must be a row of indices from 0 to {n_e - 1}, not {used.dtype} {used.shape}")
    return torch.tensor(used.astype(np.int64), device="cpu")


def check_unknown_index(unknown_index: str | int, used: int) -> str | int:
    """Either "random" or the number that unknown indices get."""
    if unknown_index == "extra":
        return used
    if unknown_index != "random" and not (isinstance(unknown_index, int) and 0 <= unknown_index < used):
        raise ValueError(f"unknown_index must be random, extra or 0 to {used - 1}, not {unknown_index!r}")
    return unknown_index
