"""Properties of every schedule, for any number of steps and any betas."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.models.diffusion.schedules import RHO, SCHEDULES, NoiseLevels, make_schedule, sigma_from_alpha_bar
from ldm.modules.diffusionmodules.schedule import (
    PARAMETERIZATIONS,
    ddim_sigmas,
    eps_and_x0,
    make_beta_schedule,
    output_of,
    rescale_zero_terminal_snr,
    schedule_buffers,
)

quick = settings(max_examples=150, derandomize=True, deadline=None, database=None)

TO_THE_DATA = ("trailing", "karras", "exponential")
TO_THE_FIRST_LEVEL = ("uniform", "quad", "even")


@st.composite
def betas(draw: st.DrawFn) -> np.ndarray:
    """Of 10 to 1200 timesteps that go from little noise to much, by any public name."""
    name = draw(st.sampled_from(["linear", "sqrt_linear", "cosine", "squaredcos_cap_v2"]))
    count = draw(st.integers(10, 1200))
    start, end = draw(st.floats(1e-5, 2e-3)), draw(st.floats(5e-3, 5e-2))
    found = make_beta_schedule(name, count, start, end)
    return rescale_zero_terminal_snr(found) if draw(st.booleans()) else found


@st.composite
def runs(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Cumulative alphas of a model, and a number of steps that it can take."""
    a = np.cumprod(1 - draw(betas()))
    return a, draw(st.integers(1, len(a)) | st.integers(1, min(60, len(a))))


@quick
@given(runs(), st.sampled_from(sorted(SCHEDULES)), st.floats(0, 1))
def test_noise_decreases_every_step(run, name, eta):
    a, steps = run
    s = make_schedule(name, steps, a, eta)
    assert s.timesteps[0] >= 0 and s.timesteps[-1] <= len(a) - 1
    assert (np.diff(s.timesteps) > 0).all()  # so none comes twice
    assert (s.alphas_cumprod > 0).all() and (s.alphas_cumprod < 1).all() and (s.alphas_cumprod_prev <= 1).all()
    assert (s.alphas_cumprod_prev[1:] == s.alphas_cumprod[:-1]).all()
    assert (s.alphas_cumprod < s.alphas_cumprod_prev).all()
    assert np.isfinite(s.ddim_sigmas).all() and (s.ddim_sigmas >= 0).all()
    assert (
        s.ddim_sigmas**2 <= 1 - s.alphas_cumprod_prev + 1e-12
    ).all()  # no more noise is added than the next level has


@quick
@given(runs(), st.sampled_from(sorted(SCHEDULES)))
def test_last_timestep_of_each_schedule(run, name):
    a, steps = run
    s = make_schedule(name, steps, a)
    data = name in TO_THE_DATA or (name == "leading" and steps == len(a))
    assert s.alphas_cumprod_prev[0] == (1.0 if data else a[0])
    if name in ("even", *TO_THE_DATA):
        assert s.timesteps[-1] == len(a) - 1
    if name in ("even", "leading", "trailing"):
        assert len(s) == steps
    if name in ("karras", "exponential", "quad"):
        assert len(s) <= steps


@quick
@given(runs())
def test_timesteps_are_their_closed_forms(run):
    a, steps = run
    count, k = len(a), np.arange(steps)
    np.testing.assert_allclose(make_schedule("even", steps, a).timesteps, (count - 1) * (k + 1) / steps, rtol=1e-12)
    trailing = make_schedule("trailing", steps, a).timesteps
    np.testing.assert_array_equal(trailing, np.round(trailing))
    np.testing.assert_allclose(trailing, count / steps * (k + 1) - 1, rtol=0, atol=0.5 + 1e-9)  # the nearest
    np.testing.assert_array_equal(
        make_schedule("leading", steps, a).timesteps, k if steps == count else [i * count // steps + 1 for i in k]
    )
    stride = count // steps
    published = sorted({min(i + 1, count - 1) for i in range(0, count, stride)})
    np.testing.assert_array_equal(make_schedule("uniform", steps, a).timesteps, published)


@quick
@given(runs())
def test_sigmas_are_their_closed_forms(run):
    """Evenly in sigma^(1/7), or in log sigma; the last is where the model's own schedule ends."""
    a, steps = run
    low, high = NoiseLevels(a).sigma_range()
    places = np.linspace(0, 1, steps) if steps > 1 else np.ones(1)
    wanted = {
        "karras": (low ** (1 / RHO) + places * (high ** (1 / RHO) - low ** (1 / RHO))) ** RHO,
        "exponential": low * (high / low) ** places,
    }
    for name, sigmas in wanted.items():
        s = make_schedule(name, steps, a)
        np.testing.assert_allclose(s.timesteps[:-1], NoiseLevels(a).sigma_to_t(sigmas)[:-1], atol=1e-6)
        np.testing.assert_allclose(sigma_from_alpha_bar(s.alphas_cumprod)[:-1], sigmas[:-1], rtol=1e-6)


@quick
@given(runs(), st.lists(st.floats(0, 1), min_size=2, max_size=12, unique=True))
def test_custom_timesteps_are_used_unchanged(run, places):
    a, _ = run
    table = sorted({round(place * (len(a) - 1)) for place in places})
    s = make_schedule(table[::-1], len(table), a)
    assert s.timesteps.tolist() == table and s.alphas_cumprod_prev[0] == 1.0
    assert (s.alphas_cumprod == np.maximum(a[table], 1e-20)).all()


@quick
@given(runs())
def test_levels_and_timesteps_are_each_others_inverse(run):
    a, _ = run
    levels = NoiseLevels(a)
    t = np.linspace(0, len(a) - 2, 50)  # the last may be pure noise, whose sigma says nothing
    np.testing.assert_allclose(levels.sigma_to_t(sigma_from_alpha_bar(levels.alpha_bar_at(t))), t, atol=1e-5)


@quick
@given(betas())
def test_buffers_follow_the_paper(found):
    """Ho et al. 2020, eq. 4, 6 and 7, in float64."""
    buffers = {name: value.double().numpy() for name, value in schedule_buffers(found).items()}
    a = np.cumprod(1 - found)
    before = np.append(1.0, a[:-1])
    close = {"rtol": 1e-5, "atol": 1e-7}
    np.testing.assert_allclose(buffers["alphas_cumprod"], a, **close)
    np.testing.assert_allclose(buffers["sqrt_one_minus_alphas_cumprod"] ** 2 + a, 1, **close)
    np.testing.assert_allclose(buffers["posterior_variance"], found * (1 - before) / (1 - a), **close)
    # the mean of the posterior of x_t = sqrt(a_t) x_0 is sqrt(a_{t-1}) x_0
    mean = buffers["posterior_mean_coef1"] + buffers["posterior_mean_coef2"] * np.sqrt(a)
    np.testing.assert_allclose(mean, np.sqrt(before), rtol=1e-5, atol=1e-5)


@quick
@given(st.floats(1e-4, 1 - 1e-4), st.sampled_from(sorted(PARAMETERIZATIONS)), st.integers(0, 2**32 - 1))
def test_predictions_are_each_others_inverse(a, parameterization, seed):
    x0, eps = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = a**0.5 * x0 + (1 - a) ** 0.5 * eps
    found = eps_and_x0(output_of(x0, x, a, parameterization), x, a, parameterization)
    torch.testing.assert_close(found, (eps, x0), rtol=1e-6, atol=1e-6)


@quick
@given(st.floats(1e-6, 1 - 1e-6), st.floats(1e-6, 1 - 1e-6))
def test_terminal_noise_level(one, other):
    """Eta 1 is the posterior's standard deviation (Song et al. 2021, section 4.1)."""
    a, a_prev = sorted([one, other])
    beta = 1 - a / a_prev
    np.testing.assert_allclose(ddim_sigmas(a, a_prev, 1.0) ** 2, beta * (1 - a_prev) / (1 - a), rtol=1e-9, atol=1e-12)
