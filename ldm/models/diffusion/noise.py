"""Where a run's random numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Noise = Callable[[Sequence[int], torch.device], Tensor]  # (shape, device) -> standard normal numbers


def shared(shape: Sequence[int], device: torch.device) -> Tensor:
    """From torch's global generator on `device`, as published: what an image gets depends on its place in the batch."""
    return torch.randn(tuple(shape), device=device)


class PerImage:
    """A generator for each image of a batch: image i draws the same alone, in any batch, on any device.

    seeds: one an image. The numbers are drawn on the CPU and moved.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def __call__(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """(B, ...) for as many images as there are seeds; ValueError for another B."""
        if shape[0] != len(self.generators):
            raise ValueError(f"there are {len(self.generators)} seeds for a batch of {shape[0]}")
        rows = [torch.randn(tuple(shape[1:]), generator=g, device="cpu") for g in self.generators]
        return torch.stack(rows).to(device)


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """From a (weight 0) to b (weight 1) on the arc between them, each item (B, ...) for itself: noise stays as large.

    Shoemake 1985; along a straight line, where the two point the same way.
    """
    x, y = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1).clamp(-1, 1)
    angle = torch.arccos(cosine)[:, None]  # (B, 1)
    near = torch.sin(angle) < 1e-6
    safe = torch.where(near, 1.0, torch.sin(angle))
    left = torch.where(near, 1.0 - weight, torch.sin((1.0 - weight) * angle) / safe)
    right = torch.where(near, weight, torch.sin(weight * angle) / safe)
    return (left * x + right * y).to(a.dtype).view_as(a)
