"""Each sampler step by step against diffusers' scheduler of the same rule, on the same answers of a network.

Where steps lie is a convention of its own (see tests/models/test_schedules.py), so both walk the same one: ours, put
into their arrays. Those of k-diffusion's family keep x / sqrt(a), which is scaled back here before it is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_lms_discrete

from ldm.models.diffusion.samplers import make_sampler
from ldm.models.diffusion.schedules import NoiseLevels, Schedule, sigma_from_alpha_bar
from ldm.modules.diffusionmodules.schedule import make_beta_schedule

SHAPE = (2, 4, 4)
BETAS = make_beta_schedule("linear", 1000, 0.00085, 0.012)
V1 = np.cumprod(1 - BETAS)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # theirs, of numpy 2
KINDS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


class Curved:
    """A network that bends with x and with time."""

    num_timesteps, device = 1000, torch.device("cpu")
    alphas_cumprod = torch.from_numpy(V1)

    def __init__(self, parameterization: str) -> None:
        self.parameterization = parameterization

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: None = None) -> torch.Tensor:
        t = t.double().reshape(-1, 1, 1, 1)
        return 0.8 * torch.tanh(x) * torch.cos(t / 400) + 0.3 * torch.sin(2 * x + t / 150)


def start() -> torch.Tensor:
    return torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def seeded(dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """A source of noise that draws what diffusers draws from a generator of the same seed."""
    generator = torch.Generator().manual_seed(7)
    return lambda shape, device: torch.randn(tuple(shape), generator=generator, dtype=dtype)


def ours(name: str, kind: str, steps: int, **options: Any) -> tuple[list[torch.Tensor], Schedule]:
    """x after every step, and the schedule."""
    sampler = make_sampler(Curved(kind), name)
    noise = seeded(torch.float32 if name == "dpmpp_2m_sde" else torch.float64)
    _, kept = sampler.sample(steps, 2, SHAPE, x_T=start(), log_every_t=1, verbose=False, noise=noise, **options)
    return kept["x_inter"][1:], sampler.sampling_schedule


def assert_same_path(path: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float) -> None:
    assert len(path) == len(theirs)
    for i, (x, y) in enumerate(zip(path, theirs)):
        error = float((x - y).abs().max() / y.abs().max().clamp(min=1))
        assert error < tolerance, f"step {i}: {error:.1e}"


# ---- those that walk timesteps ----


def by_timesteps(scheduler: Any, kind: str, steps: int, **options: Any) -> list[torch.Tensor]:
    scheduler.alphas_cumprod = torch.from_numpy(V1)
    scheduler.alphas = torch.from_numpy(1 - BETAS)
    scheduler.betas = torch.from_numpy(BETAS)
    if hasattr(scheduler, "final_alpha_cumprod") and not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    model, x, path = Curved(kind), start(), []
    for t in scheduler.timesteps:
        x = scheduler.step(model.apply_model(x, t[None]), t, x, **options).prev_sample
        path.append(x)
    return path


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_ddim(kind, eta):
    scheduler = diffusers.DDIMScheduler(
        prediction_type=KINDS[kind], clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    theirs = by_timesteps(scheduler, kind, 20, eta=eta, generator=torch.Generator().manual_seed(7))
    assert_same_path(ours("ddim", kind, 20, eta=eta)[0], theirs, 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_ddpm(kind):
    scheduler = diffusers.DDPMScheduler(
        prediction_type=KINDS[kind], clip_sample=False, timestep_spacing="trailing", variance_type="fixed_small"
    )
    theirs = by_timesteps(scheduler, kind, 20, generator=torch.Generator().manual_seed(7))
    assert_same_path(ours("ddpm", kind, 20, schedule="trailing")[0], theirs, 1e-8)  # they bound variances by 1e-20


def test_plms():
    """Their first step comes in two halves. Of a v model they combine v, not eps as the paper does."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    assert_same_path(ours("plms", "eps", 20)[0], by_timesteps(scheduler, "eps", 20)[1:], 1e-10)


# ---- those that walk sigmas ----


def by_sigmas(scheduler: Any, kind: str, sigmas: np.ndarray, timesteps: np.ndarray, **options: Any) -> list[Any]:
    """x after every call of their `step`; sigmas, timesteps: from noise to data, one sigma more than timesteps."""
    scheduler.sigmas, scheduler.timesteps = torch.tensor(sigmas), torch.tensor(timesteps)
    scheduler.set_begin_index(0)
    model, x, path = Curved(kind), start(), []
    scaled = hasattr(scheduler, "is_scale_input_called") or hasattr(scheduler, "state_in_first_order")
    x = x * (1 + sigmas[0] ** 2) ** 0.5 if scaled else x
    for t in scheduler.timesteps:
        answer = model.apply_model(scheduler.scale_model_input(x, t), t[None])
        x = scheduler.step(answer, t, x, **options).prev_sample.double()
        path.append(x)
    if scaled:
        path = [x / (1 + sigma**2) ** 0.5 for x, sigma in zip(path, scheduler.sigmas[1:])]
    return path


def arrays(s: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """(sigmas, timesteps) of a schedule, from noise to data."""
    sigmas = np.append(sigma_from_alpha_bar(s.alphas_cumprod)[::-1], sigma_from_alpha_bar(s.alphas_cumprod_prev[0]))
    return sigmas, np.array(s.timesteps[::-1], np.float64)


def config(kind: str, **more: Any) -> dict[str, Any]:
    return {"prediction_type": KINDS[kind], **more}


class ThirdOrder(diffusers.DPMSolverMultistepScheduler):
    """Theirs, as published, takes half the second derivative for the whole, and is of second order: the rest of it."""

    def multistep_dpm_solver_third_order_update(self, model_output_list, *args, sample=None, **kwargs):
        places = [-torch.log(self.sigmas[self.step_index + i]) for i in (1, 0, -1, -2)]
        h, h_0, h_1 = (float(later - sooner) for later, sooner in zip(places, places[1:]))
        m0, m1, m2 = reversed(model_output_list)
        half = ((m0 - m1) / h_0 - (m1 - m2) / h_1) / (h_0 + h_1) * h**2
        rest = -((np.expm1(-h) + h) / h**2 - 0.5) * half / float(1 + self.sigmas[self.step_index + 1] ** 2) ** 0.5
        return super().multistep_dpm_solver_third_order_update(model_output_list, *args, sample=sample, **kwargs) + rest


ONE_CALL_A_STEP = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "lms": (scheduling_lms_discrete.LMSDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 2}),
    "dpmpp_3m": (ThirdOrder, {"solver_order": 3}),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (diffusers.UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2"}),
}


def quad(f: Callable[[float], float], start: float, end: float, epsrel: float) -> tuple[float, float]:
    """In place of scipy's, which need not be here: the integral of a polynomial of degree 7 or less, and its error."""
    places, weights = np.polynomial.legendre.leggauss(4)
    half = float(end - start) / 2
    return half * sum(float(w) * float(f(float(start) + half * (1 + p))) for p, w in zip(places, weights)), 0.0


@pytest.mark.parametrize("schedule, steps", [("trailing", 20), ("even", 20), ("even", 8), ("karras", 20)])
@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("name", ONE_CALL_A_STEP)
def test_one_call_a_step(name, kind, schedule, steps, monkeypatch):
    """`trailing` and `karras` end at the data, `even` at the first level, with most timesteps fractional."""
    integrate = SimpleNamespace(quad=quad)
    monkeypatch.setattr(scheduling_lms_discrete, "integrate", integrate, raising=False)
    path, s = ours(name, kind, steps, schedule=schedule)
    make, more = ONE_CALL_A_STEP[name]
    ends = "zero" if s.alphas_cumprod_prev[0] == 1 else "sigma_min"
    more = {"final_sigmas_type": ends, **more} if name in ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc") else more
    scheduler = make(**config(kind, **more))
    scheduler.set_timesteps(steps)
    noise = {"generator": torch.Generator().manual_seed(7)} if name in ("euler_a", "dpmpp_2m_sde") else {}
    assert_same_path(path, by_sigmas(scheduler, kind, *arrays(s), **noise), 2e-6)


def between(s: Schedule) -> tuple[np.ndarray, np.ndarray]:
    """(sigmas, timesteps) in the middle of all steps but the last, from noise to data."""
    sigmas = arrays(s)[0][:-1]
    middle = np.sqrt(sigmas[1:] * sigmas[:-1])
    return middle, NoiseLevels(V1).sigma_to_t(middle)


def woven(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """first[0], second[0], first[1], ... first[-1]."""
    out = np.empty(len(first) + len(second))
    out[::2], out[1::2] = first, second
    return out


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_heun(kind):
    path, s = ours("heun", kind, 12, schedule="karras")
    sigmas, timesteps = arrays(s)
    scheduler = diffusers.HeunDiscreteScheduler(**config(kind))
    scheduler.set_timesteps(12)
    twice = np.append(woven(sigmas[:-1], sigmas[1:-1]), 0.0)
    theirs = by_sigmas(scheduler, kind, twice, woven(timesteps, timesteps[1:]))
    assert_same_path(path, theirs[1::2] + theirs[-1:], 2e-6)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_dpm2(kind):
    path, s = ours("dpm2", kind, 12, schedule="karras")
    sigmas, timesteps = arrays(s)
    middle, timesteps_between = between(s)
    scheduler = diffusers.KDPM2DiscreteScheduler(**config(kind))
    scheduler.set_timesteps(12)
    scheduler.sigmas_interpol = torch.tensor(np.concatenate([sigmas[:1], np.repeat(middle, 2), [0.0, 0.0]]))
    twice = np.append(woven(sigmas[:-1], sigmas[1:-1]), 0.0)
    theirs = by_sigmas(scheduler, kind, twice, woven(timesteps, timesteps_between))
    assert_same_path(path, theirs[1::2] + theirs[-1:], 2e-6)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_dpmpp_2s(kind):
    """Their steps of second order start one entry back: the middles are entries of their schedule."""
    path, s = ours("dpmpp_2s", kind, 12, schedule="karras")
    sigmas, timesteps = arrays(s)
    middle, timesteps_between = between(s)
    scheduler = diffusers.DPMSolverSinglestepScheduler(**config(kind, solver_order=2, final_sigmas_type="zero"))
    scheduler.set_timesteps(23)
    scheduler.order_list = [1, 2] * 11 + [1]
    woven_sigmas = np.append(woven(sigmas[:-1], middle), 0.0)
    theirs = by_sigmas(scheduler, kind, woven_sigmas, woven(timesteps, timesteps_between))
    assert_same_path(path, theirs[1::2] + theirs[-1:], 2e-6)
