"""Noise sources: where the random numbers of a sampling run come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NoiseSource = Callable[[Sequence[int], torch.device], Tensor]  # (shape, device) -> standard normal noise


def global_noise(shape: Sequence[int], device: torch.device) -> Tensor:
    """Noise from torch's global generator on `device`, as in the public code."""
    return torch.randn(tuple(shape), device=device)


class GeneratorNoise:
    """Noise from a generator of its own, which leaves the global one alone.

    Seeded like the global generator of `device`, it gives the same numbers. A CPU generator gives the same on every
    device, since the noise is moved there.

    Args:
        generator: a generator, or a seed for a new one.
        device: where a new generator lives.
    """

    def __init__(self, generator: torch.Generator | int, device: torch.device | str = "cpu") -> None:
        if not isinstance(generator, torch.Generator):
            generator = torch.Generator(device).manual_seed(generator)
        self.generator = generator

    def __call__(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal noise of `shape` on `device`."""
        return _moved(torch.randn(tuple(shape), generator=self.generator, device=self.generator.device), device)


class SeededNoise:
    """Noise from one generator per device, seeded as `torch.manual_seed` seeds the global ones: the same numbers.

    Args:
        seed: of every generator.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal noise of `shape` on `device`, from the generator of that device."""
        device = torch.device(device)
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.seed)
        return torch.randn(tuple(shape), generator=self._generators[device], device=device)


class PerImageNoise:
    """Noise from one CPU generator per image: image i gets the same in any batch, on any device.

    Args:
        seeds: one per image of the batch.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def __call__(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Noise (B, ...) for a batch of as many images as there are seeds; ValueError for another B."""
        if shape[0] != len(self.generators):
            raise ValueError(f"there are {len(self.generators)} seeds for a batch of {shape[0]}")
        rows = [torch.randn(tuple(shape[1:]), generator=g, device="cpu") for g in self.generators]
        return _moved(torch.stack(rows), device)


class InterpolatedNoise:
    """`slerp` between two noise sources: a at weight 0, b at weight 1.

    Args:
        a, b: the two sources.
        weight: one for the batch, or one per image.
    """

    def __init__(self, a: NoiseSource, b: NoiseSource, weight: float | Sequence[float]) -> None:
        self.a, self.b, self.weight = a, b, weight

    def __call__(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Noise (B, ...) between the next of both sources."""
        return slerp(self.a(shape, device), self.b(shape, device), self.weight)


def slerp(a: Tensor, b: Tensor, weight: float | Sequence[float]) -> Tensor:
    """Spherical interpolation (Shoemake 1985) from a (weight 0) to b (weight 1), item by item of (B, ...).

    Linear where the two are parallel. weight: one for the batch, or one per item.
    """
    where = a.device if a.device.type == "cuda" else torch.device("cpu")  # not every device has float64
    x, y = (part.flatten(1).to(where, torch.float64) for part in (a, b))
    w: float | Tensor
    if isinstance(weight, (int, float)):
        w = weight
    else:
        w = _moved(torch.as_tensor(weight, dtype=torch.float64, device="cpu").reshape(-1, 1), where)  # (B, 1)
    angle = torch.nn.functional.cosine_similarity(x, y, dim=1).clamp(-1, 1).arccos()[:, None]  # (B, 1)
    parallel = angle.sin() < 1e-6
    length = torch.where(parallel, 1.0, angle.sin())
    left = torch.where(parallel, 1 - w, ((1 - w) * angle).sin() / length)
    right = torch.where(parallel, w, (w * angle).sin() / length)
    return (left * x + right * y).to(a).view_as(a)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`; a CUDA copy does not make the host wait for work that is queued on the device."""
    device = torch.device(device)
    if x.device == device or device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
