"""The public DPM-Solver interface against closed forms, and against our own sampler."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.dpm_solver.dpm_solver import (
    DPM_Solver,
    NoiseScheduleVP,
    expand_dims,
    interpolate_fn,
    model_wrapper,
)
from tests.golden import assert_agrees, golden_configs, latent_diffusion, tensor
from tests.models.test_convergence import BETAS, EVEN, MEAN, STD, V1, Gaussian, exact


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def discrete(alphas_cumprod: np.ndarray = V1) -> NoiseScheduleVP:
    return NoiseScheduleVP(alphas_cumprod=torch.from_numpy(alphas_cumprod))


# ---- the schedule ----


def test_interpolation():
    x, xp, yp = torch.linspace(0, 3, 50)[:, None], torch.tensor([[0.0, 1.0, 2.5, 3.0]]), torch.tensor([[5.0, 1, 2, 9]])
    assert_agrees(interpolate_fn(x, xp, yp)[:, 0], np.interp(x[:, 0], xp[0], yp[0]), 1e-5)
    beyond = interpolate_fn(torch.tensor([[-1.0], [4.0]]), xp, yp)
    assert beyond[:, 0].tolist() == [9.0, 23.0]  # linear from the last two points
    assert expand_dims(torch.zeros(2), 4).shape == (2, 1, 1, 1)


def test_discrete_schedule():
    """Index i is at t = (i + 1) / N; betas and their cumulative product are the same schedule."""
    t = (torch.arange(1000) + 1) / 1000
    for ns in (discrete(), NoiseScheduleVP(betas=torch.from_numpy(BETAS))):
        assert (ns.total_N, ns.T) == (1000, 1.0)
        assert_agrees(ns.marginal_alpha(t) ** 2, V1, 1e-5)
        assert_agrees(ns.marginal_alpha(t) ** 2 + ns.marginal_std(t) ** 2, np.ones(1000), 1e-5)


@pytest.mark.parametrize("schedule", ["discrete", "linear", "cosine"])
def test_lambda_and_its_inverse(float64, schedule):
    ns = discrete() if schedule == "discrete" else NoiseScheduleVP(schedule)
    t = torch.linspace(0.01, ns.T, 200)
    lamb = ns.marginal_lambda(t)
    torch.testing.assert_close(lamb, (ns.marginal_alpha(t) / ns.marginal_std(t)).log())
    torch.testing.assert_close(ns.inverse_lambda(lamb), t, rtol=0, atol=1e-9)
    assert (lamb.diff() < 0).all()


def test_linear_and_cosine_are_their_papers(float64):
    """Song et al. 2021 (score SDE), eq. 33; Nichol and Dhariwal 2021, eq. 17."""
    t = torch.tensor([0.3, 0.7])
    beta = 0.1 + 19.9 * t[:, None] * torch.linspace(0, 1, 10001)
    integral = torch.trapezoid(beta, dim=1) * t / 10000
    torch.testing.assert_close(NoiseScheduleVP("linear").marginal_alpha(t), torch.exp(-integral / 2))
    f = torch.cos((torch.tensor([0.0, 0.3, 0.7]) + 0.008) / 1.008 * torch.pi / 2) ** 2
    torch.testing.assert_close(NoiseScheduleVP("cosine").marginal_alpha(t) ** 2, f[1:] / f[0])


# ---- the model ----


@pytest.mark.parametrize("model_type", ["noise", "x_start", "v", "score"])
def test_model_types_agree(float64, model_type):
    ns, x, t = discrete(), torch.randn(2, 1, 2, 2), torch.tensor([0.301])
    kinds = {"noise": "eps", "x_start": "x0", "v": "v", "score": "eps"}
    gaussian = Gaussian(V1, kinds[model_type])

    def model(x, timesteps):
        assert timesteps.shape == (2,) and torch.allclose(timesteps, torch.tensor(300.0))
        output = gaussian.apply_model(x, timesteps)
        return -output / ns.marginal_std(t) if model_type == "score" else output

    eps = Gaussian(V1).apply_model(x, torch.tensor([300.0]))
    torch.testing.assert_close(model_wrapper(model, ns, model_type)(x, t), eps)


def test_guidance_types(float64):
    ns, x, t = discrete(), torch.randn(3, 1, 2, 2), torch.tensor([0.5])

    def model(x, timesteps, cond, offset):
        return cond + offset + 0 * x

    cond, uncond = torch.full((3, 1, 1, 1), 5.0), torch.full((3, 1, 1, 1), 2.0)
    options = {"condition": cond, "unconditional_condition": uncond, "model_kwargs": {"offset": 1.0}}
    free = model_wrapper(model, ns, guidance_type="classifier-free", guidance_scale=3.0, **options)
    assert (free(x, t) == 3 + 3 * 3).all()
    plain = model_wrapper(model, ns, guidance_type="classifier-free", guidance_scale=1.0, **options)
    assert (plain(x, t) == 6).all()

    def log_prob(x, timesteps, cond, factor):
        return factor * (cond * x).flatten(1).sum(1)

    guided = model_wrapper(
        lambda x, t: torch.zeros_like(x),
        ns,
        guidance_type="classifier",
        condition=cond,
        guidance_scale=2.0,
        classifier_fn=log_prob,
        classifier_kwargs={"factor": 0.5},
    )
    torch.testing.assert_close(guided(x, t), (-2.0 * ns.marginal_std(t) * 2.5).reshape(1, 1, 1, 1).expand_as(x))


def test_thresholding(float64):
    ns, t, x = discrete(), torch.tensor([0.5]), 10 * torch.randn(2, 1, 8, 8)
    for max_val in (1.0, 3.0):
        solver = DPM_Solver(lambda x, t: torch.zeros_like(x), ns, predict_x0=True, thresholding=True, max_val=max_val)
        x0 = solver.data_prediction_fn(x, t)
        plain = x / ns.marginal_alpha(t)
        bound = np.quantile(plain.abs().flatten(1).numpy(), 0.995, axis=1).reshape(2, 1, 1, 1)
        assert_agrees(x0, np.clip(plain, -bound, bound) * max_val / bound, 1e-6)
    assert solver.model_fn(x, t).equal(x0) and solver.denoise_to_zero_fn(x, t).equal(x0)


# ---- the solver ----


def error(steps: int, predict_x0: bool, **options: object) -> float:
    """Distance from the exact flow of a Gaussian's ideal model."""
    ns = discrete(EVEN)
    model_fn = model_wrapper(Gaussian(EVEN).apply_model, ns)
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    out = DPM_Solver(model_fn, ns, predict_x0=predict_x0).sample(x, steps=steps, lower_order_final=False, **options)
    return float((out - exact(x, EVEN[-1], EVEN[0])).abs().max())


@pytest.mark.parametrize("solver_type", ["dpm_solver", "taylor"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("method", ["singlestep_fixed", "multistep"])
@pytest.mark.parametrize("predict_x0", [False, True])
def test_order(float64, method, order, solver_type, predict_x0):
    """Multi-step rules start in lower orders, which bounds the third at two."""
    options = {"method": method, "order": order, "solver_type": solver_type, "predict_x0": predict_x0}
    few, more = (error(n, **options) for n in (180, 360))
    if (method, order) == ("multistep", 3):
        assert np.log2(few / more) > 1.7
    else:
        assert np.log2(few / more) == pytest.approx(order, abs=0.35)


def test_third_order_multistep_once_it_is_going(float64):
    """The last of several steps from exact points has an error of fourth order."""
    ns = discrete(EVEN)
    solver = DPM_Solver(model_wrapper(Gaussian(EVEN).apply_model, ns), ns, predict_x0=True)
    x = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def local_error(h: float) -> float:
        times = ns.inverse_lambda(torch.arange(4) * h - 1.0)
        levels = (ns.marginal_alpha(times) ** 2).tolist()
        points = [exact(x, levels[0], level) for level in levels]
        models = [solver.model_fn(point, t[None]) for point, t in zip(points[:3], times)]
        arrived = solver.multistep_dpm_solver_update(points[2], models, [t[None] for t in times[:3]], times[3][None], 3)
        return float((arrived - points[3]).abs().max())

    assert np.log2(local_error(0.04) / local_error(0.02)) == pytest.approx(4, abs=0.3)


@pytest.mark.parametrize("skip_type", ["time_uniform", "time_quadratic", "logSNR"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_singlestep_uses_the_given_number_of_evaluations(float64, order, skip_type):
    for steps in (4, 9, 20):
        calls, ns = itertools.count(), discrete()
        solver = DPM_Solver(lambda x, t: next(calls) * 0 + 0 * x, ns)  # noqa: B023
        times, orders = solver.get_orders_and_timesteps_for_singlestep_solver(steps, order, skip_type, 1.0, 1e-3, "cpu")
        assert len(times) == len(orders) + 1 and sum(orders) == steps
        assert (
            (times.diff() < 0).all() and float(times[0]) == pytest.approx(1) and float(times[-1]) == pytest.approx(1e-3)
        )
        solver.sample(torch.zeros(1, 1, 1, 1), steps, order=order, skip_type=skip_type, method="singlestep")
        assert next(calls) == steps


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive(float64, order):
    ends = [error(0, False, method="adaptive", order=order, atol=atol, rtol=10 * atol) for atol in (1e-3, 1e-5)]
    assert ends[1] < 1e-3 < 0.1 and ends[1] < ends[0]


def test_short_multistep_runs_end_in_lower_orders(float64):
    ns = discrete()
    solver = DPM_Solver(model_wrapper(Gaussian(V1).apply_model, ns), ns, predict_x0=True)
    orders, update = [], solver.multistep_dpm_solver_update
    solver.multistep_dpm_solver_update = lambda *args, **kw: orders.append(args[4]) or update(*args, **kw)
    x = torch.randn(1, 1, 2, 2)
    for lower, wanted in ((True, [1, 2, 3, 3, 2, 1]), (False, [1, 2, 3, 3, 3, 3])):
        solver.sample(x, 6, order=3, method="multistep", lower_order_final=lower)
        assert orders == wanted
        orders.clear()
    clean = solver.sample(x, 20, order=2, method="multistep", denoise_to_zero=True)
    assert (clean - MEAN).abs().max() < 5 * STD


@pytest.mark.parametrize("steps", [5, 20])
def test_it_is_our_sampler(steps):
    """With the settings of the public DPMSolverSampler, guidance included."""
    model = latent_diffusion(golden_configs("diffusion")["model"])
    c, uc, x = tensor("c", 2, 5, 24), tensor("uc", 2, 5, 24), tensor("x_T", 2, 4, 16, 16)
    ours, _ = DPMSolverSampler(model).sample(
        steps,
        2,
        (4, 16, 16),
        c,
        x_T=x,
        unconditional_guidance_scale=3.0,
        unconditional_conditioning=uc,
        verbose=False,
    )
    ns = NoiseScheduleVP("discrete", alphas_cumprod=model.alphas_cumprod)
    model_fn = model_wrapper(
        model.apply_model,
        ns,
        guidance_type="classifier-free",
        condition=c,
        unconditional_condition=uc,
        guidance_scale=3.0,
    )
    theirs = DPM_Solver(model_fn, ns, predict_x0=True).sample(x, steps, order=2, method="multistep")
    assert_agrees(theirs, ours, 1e-4)


MISTAKES = [
    (lambda: NoiseScheduleVP("quadratic"), "not one of discrete, linear, cosine"),
    (lambda: NoiseScheduleVP(), "needs betas or alphas_cumprod"),
    (lambda: model_wrapper(None, None, "w"), "model_type 'w'"),
    (lambda: model_wrapper(None, None, guidance_type="cfg"), "guidance_type 'cfg'"),
    (lambda: model_wrapper(None, None, guidance_type="classifier"), "needs classifier_fn"),
]


@pytest.mark.parametrize("call, message", MISTAKES)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_mistakes_of_a_run_are_named():
    solver, x = DPM_Solver(lambda x, t: x, discrete()), torch.zeros(1, 1, 1, 1)
    for options, message in (
        ({"method": "euler"}, "method 'euler'"),
        ({"order": 4}, "order of the solver must be 1, 2 or 3"),
        ({"skip_type": "karras"}, "skip_type 'karras'"),
        ({"solver_type": "heun", "order": 2}, "solver_type 'heun'"),
        ({"method": "adaptive", "order": 1}, "adaptive solver must be 2 or 3"),
        ({"method": "multistep", "order": 3, "steps": 2}, "needs at least 3 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            solver.sample(x, **{"steps": 6, **options})
