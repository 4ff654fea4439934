"""Distributions of latents, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm.modules.distributions.distributions import (
    AbstractDistribution,
    DiagonalGaussianDistribution,
    DiracDistribution,
    normal_kl,
)
from tests.golden import tensor


def test_dirac():
    value = tensor("x", 2, 3)
    dirac = DiracDistribution(value)
    assert isinstance(dirac, AbstractDistribution)
    assert dirac.sample() is value and dirac.mode() is value


def test_diagonal_gaussian():
    moments, other = tensor("moments", 2, 6, 4, 4), tensor("other", 2, 6, 4, 4)
    ours, its = (DiagonalGaussianDistribution(m) for m in (moments, other))
    normal, second = (Normal(m[:, :3], torch.exp(0.5 * m[:, 3:])) for m in (moments, other))
    torch.testing.assert_close(ours.kl(its), kl_divergence(normal, second).sum((1, 2, 3)))
    torch.testing.assert_close(ours.kl(), kl_divergence(normal, Normal(0.0, 1.0)).sum((1, 2, 3)))
    x = tensor("x", 2, 3, 4, 4)
    torch.testing.assert_close(ours.nll(x), -normal.log_prob(x).sum((1, 2, 3)))
    torch.manual_seed(3)
    sample = ours.sample()
    torch.manual_seed(3)
    torch.testing.assert_close(sample, ours.mean + ours.std * torch.randn(2, 3, 4, 4))
    assert ours.mode().equal(moments[:, :3]) and torch.allclose(ours.var, ours.std**2)


def test_deterministic():
    fixed = DiagonalGaussianDistribution(tensor("moments", 2, 6, 4, 4), deterministic=True)
    assert fixed.sample().equal(fixed.mode()) and fixed.kl().equal(torch.zeros(1))
    assert fixed.nll(fixed.mode()).equal(torch.zeros(1)) and not fixed.var.any()


def test_normal_kl_takes_numbers_and_tensors():
    wanted = kl_divergence(Normal(0.5, 1.0), Normal(torch.tensor([1.0, -1.0]), 2.0))
    found = normal_kl(0.5, 0.0, torch.tensor([1.0, -1.0]), torch.tensor(4.0).log())
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="at least one tensor"):
        normal_kl(0.0, 0.0, 0.0, 0.0)
