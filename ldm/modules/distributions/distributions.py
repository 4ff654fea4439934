"""Distributions of latents: the diagonal Gaussian that a KL autoencoder's encoder predicts, and a single point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class AbstractDistribution:
    """Base of distributions with `sample` and `mode`."""

    def sample(self) -> Tensor:
        """A random sample."""
        raise NotImplementedError

    def mode(self) -> Tensor:
        """The most likely value."""
        raise NotImplementedError


class DiracDistribution(AbstractDistribution):
    """All probability on one value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def sample(self) -> Tensor:
        """The value."""
        return self.value

    def mode(self) -> Tensor:
        """The value."""
        return self.value


class DiagonalGaussianDistribution:
    """N(mean, diag(exp(logvar))).

    Args:
        parameters: (B, 2C, ...), the means stacked on the log variances.
        deterministic: set the variance to 0, so that samples are the mean.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)
        if deterministic:
            self.std = self.var = torch.zeros_like(self.mean)

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """A sample (B, C, ...). noise: standard normal; by default from the CPU generator, as in the public code."""
        noise = torch.randn(self.mean.shape, device="cpu") if noise is None else noise
        return self.mean + self.std * noise.to(device=self.mean.device, dtype=self.mean.dtype)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other) in nats (B,), summed over all other axes; `other` defaults to N(0, I)."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        mean, logvar = (0.0, 0.0) if other is None else (other.mean, other.logvar)
        return normal_kl(self.mean, self.logvar, mean, logvar).sum(dim=tuple(range(1, self.mean.ndim)))

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log likelihood of `sample` in nats, summed over `dims`."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        return 0.5 * torch.sum(
            math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var, dim=tuple(dims)
        )


def normal_kl(mean1: Tensor | float, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """Elementwise KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats.

    Arguments broadcast; at least one must be a tensor.
    """
    tensor = next((value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, Tensor)), None)
    if tensor is None:
        raise ValueError("normal_kl needs at least one tensor")
    m1, v1, m2, v2 = torch.broadcast_tensors(
        *(
            torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
            for value in (mean1, logvar1, mean2, logvar2)
        )
    )
    return 0.5 * (v2 - v1 - 1.0 + torch.exp(v1 - v2) + (m1 - m2) ** 2 * torch.exp(-v2))
