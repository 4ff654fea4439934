"""Entries that are added to the samples of a web data set."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.modules.midas.api import fit


class AddMiDaS:
    """Add `midas_in`, the image `jpg` as MiDaS takes it, to a sample.

    Args:
        model_type: the estimator, "dpt_hybrid".
    """

    def __init__(self, model_type: str) -> None:
        if model_type != "dpt_hybrid":
            raise ValueError(f"model_type {model_type!r} is not supported: the depth model uses dpt_hybrid")
        self.model_type = model_type

    def pt2np(self, x: Tensor) -> np.ndarray:
        """Convert a tensor in [-1, 1] to an array in [0, 1]."""
        return ((x + 1.0) * 0.5).detach().cpu().numpy()

    def np2pt(self, x: np.ndarray) -> Tensor:
        """Convert an array in [0, 1] to a tensor in [-1, 1]."""
        return torch.from_numpy(x) * 2.0 - 1.0

    def __call__(self, sample: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Add `midas_in`: float32 (3, H', W') in [-1, 1], with sides that are multiples of 32, near 384."""
        image = torch.as_tensor(sample["jpg"])  # (H, W, 3)
        sample["midas_in"] = fit(image.movedim(-1, 0)[None])[0].numpy()
        return sample
