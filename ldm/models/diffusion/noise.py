"""Where a run's random numbers come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Noise = Callable[[Sequence[int], torch.device], Tensor]  # (shape, device) -> standard normal numbers


def shared(shape: Sequence[int], device: torch.device) -> Tensor:
    """From torch's global generator on `device`, as published: what an image gets depends on its place in the batch."""
    return torch.randn(tuple(shape), device=device)


def on_cpu(shape: Sequence[int], device: torch.device) -> Tensor:
    """The same from the global generator of the CPU, whatever the device: every device draws the same pictures."""
    return _moved(torch.randn(tuple(shape), device="cpu"), device)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, without having the host wait for what a GPU was told to do before."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


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
        return _moved(torch.stack(rows), device)


class Between:
    """On the way from one source of noise (weight 0) to another (weight 1), by `slerp` at every draw.

    weight: one for all, or one an image.
    """

    def __init__(self, first: Noise, second: Noise, weight: float | Sequence[float]) -> None:
        self.first, self.second = first, second
        self.weight = weight

    def __call__(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """(B, ...), drawn from both."""
        return slerp(self.first(shape, device), self.second(shape, device), self.weight)


def slerp(a: Tensor, b: Tensor, weight: float | Sequence[float]) -> Tensor:
    """From a (weight 0) to b (weight 1) on the arc between them, each item (B, ...) for itself: noise stays as large.

    weight: one for all, or one an item. Shoemake 1985; along a straight line, where the two point the same way or
    opposite ways.
    """
    where = a.device if a.device.type == "cuda" else torch.device("cpu")  # not every device has float64
    x, y = (part.flatten(1).to(where, torch.float64) for part in (a, b))
    w: float | Tensor
    if isinstance(weight, (int, float)):
        w = weight
    else:
        w = _moved(torch.as_tensor(weight, dtype=torch.float64, device="cpu").reshape(-1, 1), where)  # (B, 1)
    angle = torch.nn.functional.cosine_similarity(x, y, dim=1).clamp(-1, 1).arccos()[:, None]  # (B, 1)
    straight = angle.sin() < 1e-6
    length = torch.where(straight, 1.0, angle.sin())
    left = torch.where(straight, 1 - w, ((1 - w) * angle).sin() / length)
    right = torch.where(straight, w, (w * angle).sin() / length)
    return (left * x + right * y).to(a).view_as(a)
