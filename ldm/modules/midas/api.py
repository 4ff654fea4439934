"""The public home of MiDaS: depth of pictures, by the weights in a depth-to-image checkpoint or by one's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import Checkpoint, fill_model, read_checkpoint
from ldm.modules.midas.dpt import DPTHybrid
from ldm.modules.midas.names import from_transformers

SIDE, MULTIPLE = 384, 32  # of the pictures that the published weights were trained on
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as transformers saves them
IN_CHECKPOINTS = "depth_model.model."
CLASSES = "pretrained.model.head."  # of ImageNet, in the published files and of no use


class MiDaSInference(nn.Module):
    """Relative depth of pictures by MiDaS 3; larger is nearer.

    model_type: "dpt_hybrid". path: weights to begin with, a file of MiDaS (dpt_hybrid-midas-501f0c75.pt), a
    depth-to-image checkpoint, or transformers' folder of `Intel/dpt-hybrid-midas`; by default they come with the
    checkpoint that the whole model is filled from. config: sizes other than the published ones, see `DPTHybrid`.

    Raises ValueError for another model_type; FileNotFoundError or CheckpointError if `path` holds no such weights.
    """

    def __init__(
        self,
        model_type: str = "dpt_hybrid",
        path: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if model_type != "dpt_hybrid":
            raise ValueError(f"model_type {model_type!r} of MiDaS is not known here: the depth model uses dpt_hybrid")
        self.model = DPTHybrid(**(config or {})).eval().requires_grad_(False)
        self.path = path
        if path is not None:
            with torch.device("cpu"):  # also within a model that is built on meta
                fill_model(self.model, read_midas(path))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, H, W) in [-1, 1], sides that are multiples of 32 (see `fit`), to depth (B, 1, H, W) float32."""
        return self.model(x.to(next(self.parameters()).dtype)).float()


def fit(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] at the size that MiDaS sees them.

    Of the two scales that bring a side to 384 it takes the one that changes less, and rounds both sides to 32.
    """
    height, width = images.shape[2:]
    scale = min(SIDE / height, SIDE / width, key=lambda scale: abs(1 - scale))
    size = tuple(max(round(scale * side / MULTIPLE), 1) * MULTIPLE for side in (height, width))
    images = F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
    return images.clamp(-1.0, 1.0)  # cubic interpolation overshoots at edges


def read_midas(path: str | os.PathLike[str]) -> Checkpoint:
    """The weights of DPT-Hybrid in a file or in a folder of transformers, under MiDaS' names."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = [place / name for name in WEIGHTS if (place / name).is_file()]
        if not files:
            raise FileNotFoundError(f"the folder {place} has no weights of MiDaS: {' or '.join(WEIGHTS)} is looked for")
        place = files[0]
    state = read_checkpoint(place).state
    inside = {key.removeprefix(IN_CHECKPOINTS): v for key, v in state.items() if key.startswith(IN_CHECKPOINTS)}
    state = from_transformers(inside or state)
    return Checkpoint(place, {key: value for key, value in state.items() if not key.startswith(CLASSES)})
