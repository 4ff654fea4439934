"""Where steps lie, against diffusers' choices; and every sampler on every schedule."""

from __future__ import annotations

import inspect
import warnings

import diffusers
import numpy as np
import pytest
import torch

from ldm.models.diffusion.noise import PerImageNoise
from ldm.models.diffusion.samplers import SAMPLERS, make_sampler
from ldm.models.diffusion.schedules import SCHEDULES, NoiseLevels, make_schedule, sigma_from_alpha_bar
from tests.models.test_convergence import BETAS, KINDS, MEAN, STD, V1, ZERO_SNR, Gaussian

ALIGNED = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]  # Sabour et al. 2024, Stable Diffusion v1.5, 10 steps
CHOICES = [*SCHEDULES, ALIGNED]
SHAPE = (1, 3, 5)


def ids(choice: object) -> str:
    return choice if isinstance(choice, str) else "table"


# ---- where steps lie ----


@pytest.mark.parametrize("spacing, steps", [("trailing", 1), ("trailing", 7), ("trailing", 30), ("leading", 50)])
def test_whole_timesteps_are_those_of_diffusers(spacing, steps):
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    assert make_schedule(spacing, steps, V1).timesteps.tolist() == scheduler.timesteps.tolist()[::-1]


@pytest.mark.parametrize("choice", ["karras", "exponential"])
def test_sigmas_are_those_of_diffusers(choice):
    if f"use_{choice}_sigmas" not in inspect.signature(diffusers.EulerDiscreteScheduler).parameters:
        pytest.skip(f"this release of diffusers has no {choice} sigmas")
    betas = BETAS.astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # theirs, of numpy 2
        scheduler = diffusers.EulerDiscreteScheduler(trained_betas=betas, **{f"use_{choice}_sigmas": True})
        scheduler.set_timesteps(20)
    s = make_schedule(choice, 20, V1)
    np.testing.assert_allclose(sigma_from_alpha_bar(s.alphas_cumprod)[::-1], scheduler.sigmas[:-1].numpy(), rtol=1e-4)
    # between timesteps they interpolate log sigma, where log a is as near the truth
    np.testing.assert_allclose(s.timesteps[::-1], scheduler.timesteps.numpy(), atol=0.2)
    assert s.alphas_cumprod_prev[0] == 1 and scheduler.sigmas[-1] == 0


def test_leading_goes_all_the_way_up():
    """diffusers' 600 leading steps are the lower 600 timesteps, which do not begin where there is only noise."""
    assert make_schedule("leading", 600, V1).timesteps[-1] > 990


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 30, 101, 999, 1000])
@pytest.mark.parametrize("levels", [V1, ZERO_SNR], ids=["v1", "zero_snr"])
@pytest.mark.parametrize("choice", CHOICES, ids=ids)
def test_every_step_leads_down(choice, levels, steps):
    s = make_schedule(choice, steps, levels)
    assert (np.diff(s.timesteps) > 0).all() and (s.alphas_cumprod > 0).all()
    assert (s.alphas_cumprod < s.alphas_cumprod_prev).all()
    if choice in ("uniform", "quad"):
        return  # as published, these give more or fewer steps, and need not begin at noise
    assert len(s) == steps
    assert s.timesteps[-1] == 999 or choice == "leading"


def test_trailing_begins_in_pure_noise():
    """Lin et al. 2023, table 1 and section 3.3: the last timestep, where there is no signal, is asked about."""
    s = make_schedule("trailing", 25, ZERO_SNR)
    assert s.timesteps[-1] == 999 and s.alphas_cumprod[-1] <= 1e-20 and s.alphas_cumprod_prev[0] == 1
    assert (make_schedule("trailing", 10, V1).timesteps == np.arange(99, 1000, 100)).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("last", range(990, 1000))
def test_a_table_for_another_number_of_steps_begins_where_it_says(last, steps):
    """To the bit. Of these, 993 came out of logarithms as 992.9999999999999; with other releases of numpy, others."""
    assert make_schedule([10, 200, 500, last], steps, V1).timesteps[-1] == last


def test_tables():
    """In any order; for another number of steps log sigma is interpolated between its entries."""
    s = make_schedule(ALIGNED, 10, V1)
    assert s.timesteps.tolist() == ALIGNED[::-1] and s.alphas_cumprod_prev[0] == 1
    assert (s.alphas_cumprod == V1[ALIGNED[::-1]]).all()
    more = make_schedule(ALIGNED, 19, V1)
    np.testing.assert_allclose(more.timesteps[::2], s.timesteps, atol=1e-6)
    log_sigmas, between = (
        np.log(sigma_from_alpha_bar(s.alphas_cumprod)),
        np.log(sigma_from_alpha_bar(more.alphas_cumprod[1::2])),
    )
    np.testing.assert_allclose(between, (log_sigmas[:-1] + log_sigmas[1:]) / 2, atol=1e-6)


def test_levels_and_their_timesteps_are_each_others_inverse():
    levels = NoiseLevels(V1)
    t = np.linspace(0, 999, 777)
    np.testing.assert_allclose(levels.sigma_to_t(sigma_from_alpha_bar(levels.alpha_bar_at(t))), t, atol=1e-8)


@pytest.mark.parametrize(
    "choice, steps, words",
    [("linear", 10, "is not one of uniform"), ([5, 5], 2, "different timesteps"), ([0, 1000], 2, "from 0 to 999"),
     ([7], 3, "for one step, not for 3"), ("even", 0, "from 1 to 1000"), ("even", 1001, "from 1 to 1000")],
)  # fmt: skip
def test_mistakes_are_named(choice, steps, words):
    with pytest.raises(ValueError, match=words):
        make_schedule(choice, steps, V1)


# ---- every sampler on every schedule ----


def draw(name: str, steps: int, choice: object, levels: np.ndarray, kind: str) -> torch.Tensor:
    x_T = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    sampler = make_sampler(Gaussian(levels, kind), name)
    with np.errstate(all="raise", under="ignore"):
        return sampler.sample(steps, 2, SHAPE, x_T=x_T, schedule=choice, noise=PerImageNoise([1, 2]), verbose=False)[0]


def assert_near_the_data(x: torch.Tensor, steps: int) -> None:
    """Finite, and no farther from the mean than noise is (a rule may not pass that on), or its tails."""
    assert torch.isfinite(x).all()
    assert (x - MEAN).abs().max() < (8 if steps < 30 else 5 * STD + 0.3)


@pytest.mark.parametrize("choice", CHOICES, ids=ids)
@pytest.mark.parametrize("name", SAMPLERS)
def test_few_steps(name, choice):
    for steps in (1, 2, 3, 4, 7):
        for levels, kinds in ((V1, KINDS), (ZERO_SNR, ("x0", "v"))):  # eps says nothing at the end of the latter
            for kind in kinds:
                assert_near_the_data(draw(name, steps, choice, levels, kind), steps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_step_counts(name):
    """30, 101, and all or nearly all timesteps, each with another schedule and kind of model."""
    cases = [(30, choice) for choice in CHOICES] + [
        (101, "karras"),
        (999, "leading"),
        (1000, "quad"),
        (1000, "uniform"),
    ]
    for i, (steps, choice) in enumerate(cases):
        assert_near_the_data(draw(name, steps, choice, (V1, ZERO_SNR)[i % 2], ("v", "x0")[i // 2 % 2]), steps)
