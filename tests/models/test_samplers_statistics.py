"""Samplers that add noise, against the mean and the variance that their samples must have.

Of a Gaussian's ideal network every rule is affine in its start and in the noise that it draws, so that the moments of
its samples follow exactly from runs in which one draw is 1 and the others 0: orders are measured without sampling.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.models.diffusion.samplers import make_sampler
from tests.golden import golden_configs, latent_diffusion, tensor
from tests.models.test_convergence import EVEN, MEAN, STD, Gaussian

NOISY = [("ddpm", 0.0), ("euler_a", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("dpmpp_2m_sde", 0.0)]


def marginal(a: float) -> tuple[float, float]:
    """Mean and variance of x at level a."""
    return a**0.5 * MEAN, a * STD**2 + 1 - a


def moments_off(name: str, eta: float, steps: int, kind: str) -> tuple[float, float]:
    """How far mean and variance of a sampler's end, from an exact start, are from the exact ones."""
    sampler = make_sampler(Gaussian(EVEN, kind), name)
    sampler.make_schedule(steps, "even", ddim_eta=eta)
    mean, variance = marginal(sampler.sampling_schedule.alphas_cumprod[-1])
    x = torch.full((steps + 2, 1, 1, 1), mean, dtype=torch.float64)
    x[1] += variance**0.5  # row 0 is the mean's own run, row 1 that of the start, row 2 + i that of draw i
    draws = iter(range(steps))

    def noise(shape, device):
        z = torch.zeros(shape, dtype=torch.float64)
        z[2 + next(draws)] = 1.0
        return z

    options = {"x_T": x, "noise": noise, "eta": eta, "schedule": "even", "verbose": False}
    end = sampler.sample(steps, len(x), (1, 1, 1), **options)[0].flatten()
    mean, variance = marginal(sampler.sampling_schedule.alphas_cumprod_prev[0])
    return float(end[0] - mean), float((end[1:] - end[0]).square().sum() - variance)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("name, eta", NOISY)
def test_weak_order(name, eta, kind):
    """The mean is right for any number of steps; the variance becomes so at first order, for SDE 2M at second."""
    (mean, few), (_, more) = (moments_off(name, eta, steps, kind) for steps in (80, 160))
    assert abs(mean) < 1e-6
    assert np.log2(few / more) == pytest.approx(2 if name == "dpmpp_2m_sde" else 1, abs=0.05)


@pytest.mark.parametrize("name, eta", NOISY)
def test_samples_have_the_moments_of_the_data(name, eta):
    """Within five standard errors of 20,000 samples, to which 500 steps add a bias of about one."""
    count, generator = 20_000, torch.Generator().manual_seed(3)
    sampler = make_sampler(Gaussian(EVEN), name)
    sampler.make_schedule(500, "even", ddim_eta=eta)
    mean, variance = marginal(sampler.sampling_schedule.alphas_cumprod[-1])
    x = mean + variance**0.5 * torch.randn(1, 1, 1, count, dtype=torch.float64, generator=generator)

    def noise(shape, device):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    options = {"x_T": x, "noise": noise, "eta": eta, "schedule": "even", "verbose": False}
    end = sampler.sample(500, 1, (1, 1, count), **options)[0]
    mean, variance = marginal(sampler.sampling_schedule.alphas_cumprod_prev[0])
    assert abs(float(end.mean()) - mean) < 5 * (variance / count) ** 0.5
    assert abs(float(end.var()) / variance - 1) < 5 * (2 / count) ** 0.5
    standard = (end - end.mean()) / end.std()
    assert abs(float((standard**3).mean())) < 5 * (6 / count) ** 0.5  # and they are a Gaussian's: skewness
    assert abs(float((standard**4).mean()) - 3) < 5 * (24 / count) ** 0.5  # and kurtosis


@pytest.mark.parametrize("name", ["ddpm", "euler_a"])
def test_all_steps_are_ancestral_sampling(name):
    """As the model itself draws (Ho et al. 2020, algorithm 2), random draws included."""
    model = latent_diffusion(golden_configs("diffusion")["model"] | {"timesteps": 12})
    c = tensor("c", 2, 5, 24)
    torch.manual_seed(4)
    wanted = model.p_sample_loop(c, (2, 4, 16, 16), verbose=False)
    torch.manual_seed(4)
    x, _ = make_sampler(model, name).sample(12, 2, (4, 16, 16), c, verbose=False)
    torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-5)
