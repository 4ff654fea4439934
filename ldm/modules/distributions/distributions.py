"""The diagonal Gaussian that a KL autoencoder's encoder describes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """N(mean, diag(exp(logvar))) from moments (B, 2C, ...), the means stacked on the log variances.

    `deterministic=True` makes the variance zero, so that `sample()` is the mean.
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
        """A draw of the mean's shape, from the given noise or from new.

        New noise comes from the CPU generator on every device, as in the public code.
        """
        noise = torch.randn(self.mean.shape, device="cpu") if noise is None else noise
        return self.mean + self.std * noise.to(device=self.mean.device, dtype=self.mean.dtype)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other) in nats, summed over all but the batch axis; `other` defaults to N(0, I). Shape (B,)."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        dims = tuple(range(1, self.mean.ndim))
        if other is None:
            return normal_kl(self.mean, self.logvar, 0.0, 0.0).sum(dim=dims)
        return normal_kl(self.mean, self.logvar, other.mean, other.logvar).sum(dim=dims)

    def nll(self, sample: Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> Tensor:
        """Negative log likelihood of `sample` in nats, summed over `dims`."""
        if self.deterministic:
            return torch.zeros(1, device=self.mean.device)
        return 0.5 * torch.sum(
            math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var, dim=tuple(dims)
        )


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """Elementwise KL divergence, in nats, from N(mean2, exp(logvar2)) to N(mean1, exp(logvar1)).

    Arguments broadcast; at least one of them must be a tensor.
    """
    m1, v1, m2, v2 = torch.broadcast_tensors(
        *(torch.as_tensor(value, dtype=mean1.dtype, device=mean1.device) for value in (mean1, logvar1, mean2, logvar2))
    )
    return 0.5 * (v2 - v1 - 1.0 + torch.exp(v1 - v2) + (m1 - m2) ** 2 * torch.exp(-v2))
