"""Vector quantisation (van den Oord et al. 2017)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 4096  # positions per chunk, which bounds the memory for distances


class VectorQuantizer(nn.Module):
    """Replace every latent by its nearest codebook entry, with a straight-through gradient.

    Args:
        n_e: Number of codebook entries.
        e_dim: Width of an entry.
        beta: Weight of the commitment loss.
        remap: `.npy` file with the indices in use, to which indices are mapped.
        unknown_index: Replacement of other indices: "random", "extra" (one more index), or an index.
        sane_index_shape: Return indices of shape (B, H, W) rather than flat, or (BHW, 1) with `remap`.
        legacy: As published: beta weighs the codebook term instead of the commitment term.
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
        self.re_embed = n_e  # number of indices
        if remap is not None:
            used = load_used(remap, n_e)
            self.register_buffer("used", used)
            self.re_embed = len(used) + (unknown_index == "extra")
            self.unknown_index = check_unknown_index(unknown_index, len(used))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, tuple[None, None, Tensor]]:
        """Quantise z (B, e_dim, H, W); returns (quantised z, loss, (None, None, indices))."""
        b, _, h, w = z.shape
        flat = z.movedim(1, -1).reshape(-1, self.e_dim)  # (BHW, C)
        codes = self.embedding.weight  # (n_e, C)
        with torch.autocast(z.device.type, enabled=False):  # half precision confuses close entries
            flat, codes = flat.detach().float(), codes.detach().float()
            norms = codes.pow(2).sum(1)
            # |z - e|^2 (rows, n_e) without |z|^2, which is the same for all entries
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

    used: Tensor  # indices in use, with remap

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """Map codebook indices (B, ...) to indices into `used`."""
        match = inds[..., None].eq(self.used)  # (B, ..., number of used entries)
        new, known = match.int().argmax(-1), match.any(-1)
        if self.unknown_index == "random":
            other = torch.randint(len(self.used), inds.shape, device="cpu").to(inds.device)
        else:
            other = torch.full_like(inds, int(self.unknown_index))
        return torch.where(known, new, other)

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """Map indices into `used` to codebook indices; the extra index to the first of them."""
        return self.used[inds.where(inds < len(self.used), 0)]

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None = None) -> Tensor:
        """Look up entries; with `shape` (B, H, W, C) as a latent (B, C, H, W)."""
        if self.remap is not None:
            indices = self.unmap_to_all(indices)
        entries = self.embedding(indices)
        return entries if shape is None else entries.view(shape).movedim(-1, 1).contiguous()


VectorQuantizer2 = VectorQuantizer  # the public name of this variant


def load_used(path: str, n_e: int) -> Tensor:
    """Read codebook indices from a `.npy` file: int64, on the CPU also while models are built on meta."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"remap: {path} does not exist: it must be a .npy file of codebook indices")
    used = np.load(path, allow_pickle=False)
    if used.ndim != 1 or used.dtype.kind not in "iu" or not used.size or used.min() < 0 or used.max() >= n_e:
        raise ValueError(f"remap: {path} must be a row of indices from 0 to {n_e - 1}, not {used.dtype} {used.shape}")
    return torch.tensor(used.astype(np.int64), device="cpu")


def check_unknown_index(unknown_index: str | int, used: int) -> str | int:
    """Resolve `unknown_index` to "random" or an index."""
    if unknown_index == "extra":
        return used
    if unknown_index != "random" and not (isinstance(unknown_index, int) and 0 <= unknown_index < used):
        raise ValueError(f"unknown_index must be random, extra or 0 to {used - 1}, not {unknown_index!r}")
    return unknown_index
