"""Schedule maths against the goldens and against what the formulas must satisfy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.modules.diffusionmodules.schedule import (
    eps_and_x0,
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    schedule_buffers,
    timestep_embedding,
    usable_timesteps,
)
from tests.golden import assert_agrees, golden_configs, goldens

G = goldens("schedules")


@pytest.mark.parametrize("name, arguments", golden_configs("schedules").items())
def test_betas(name, arguments):
    betas = make_beta_schedule(*arguments)
    assert betas.dtype == np.float64
    assert_agrees(betas, G[name], 1e-12)


def test_timestep_embedding():
    assert_agrees(timestep_embedding(torch.tensor([0, 1, 500, 999]), 33), G["timestep_embedding"], 1e-6)


@pytest.mark.parametrize("key", [key for key in G if key.startswith("ddim_timesteps")])
def test_ddim_timesteps(key):
    _, method, steps = key.split(".")
    assert make_ddim_timesteps(method, int(steps), 1000).tolist() == G[key].tolist()


@pytest.mark.parametrize("key", [key for key in G if key.startswith("ddim_sigmas")])
def test_ddim_parameters(key):
    _, method, steps, eta = key.split(".", 3)
    alphas_cumprod = np.cumprod(1 - make_beta_schedule("linear", 1000, 0.00085, 0.012))
    timesteps = make_ddim_timesteps(method, int(steps), 1000)
    sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(alphas_cumprod, timesteps, float(eta))
    assert_agrees(sigmas, G[key], 1e-6)
    assert_agrees(alphas, G[f"ddim_alphas.{method}.{steps}"], 1e-6)
    assert_agrees(alphas_prev, G[f"ddim_alphas_prev.{method}.{steps}"], 1e-6)


def test_every_step_count_is_usable():
    """The published table runs one past the schedule for 599 of the 1000 step counts; only that entry moves."""
    past_the_end = 0
    for steps in range(1, 1001):
        table = make_ddim_timesteps("uniform", steps, 1000)
        usable = usable_timesteps(table, 1000)
        assert usable.min() >= 0 and usable.max() <= 999
        past_the_end += table.max() == 1000
        assert (table != usable).sum() == (table.max() == 1000)
    assert past_the_end == 599


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts(steps):
    with pytest.raises(ValueError, match="from 1 to 1000"):
        make_ddim_timesteps("uniform", steps, 1000)


def test_unknown_names():
    with pytest.raises(ValueError, match="sqrt_linear"):
        make_beta_schedule("lineal", 10)
    with pytest.raises(ValueError, match="above 0"):
        make_beta_schedule("linear", 0)
    with pytest.raises(ValueError, match="quad"):
        make_ddim_timesteps("trailing", 10, 1000)


def test_posterior_is_bayes():
    """Ho et al. 2020, eq. 7, from the product of Gaussians it comes from."""
    betas = make_beta_schedule("linear", 50, 0.01, 0.2)
    buffers = {name: value.double().numpy() for name, value in schedule_buffers(betas).items()}
    a_prev = buffers["alphas_cumprod_prev"][1:]
    precision = (1 - betas[1:]) / betas[1:] + 1 / (1 - a_prev)
    np.testing.assert_allclose(buffers["posterior_variance"][1:], 1 / precision, rtol=1e-5)
    np.testing.assert_allclose(
        buffers["posterior_mean_coef1"][1:], np.sqrt(a_prev) / (1 - a_prev) / precision, rtol=1e-5
    )
    np.testing.assert_allclose(
        buffers["posterior_mean_coef2"][1:], np.sqrt(1 - betas[1:]) / betas[1:] / precision, rtol=1e-5
    )


@pytest.mark.parametrize("a", [0.9991, 0.5, 0.0047])
def test_conversions_are_each_others_inverse(a):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    x = a**0.5 * x0 + (1 - a) ** 0.5 * eps
    outputs = {"eps": eps, "x0": x0, "v": a**0.5 * eps - (1 - a) ** 0.5 * x0}
    for name, output in outputs.items():
        found_eps, found_x0 = eps_and_x0(output, x, a, name)
        torch.testing.assert_close(found_eps, eps)
        torch.testing.assert_close(found_x0, x0)


def test_schedule_is_real_under_the_meta_device():
    with torch.device("meta"):
        buffers = schedule_buffers(make_beta_schedule("linear", 10))
    assert all(buffer.device.type == "cpu" for buffer in buffers.values())
