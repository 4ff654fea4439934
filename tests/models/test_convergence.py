"""Samplers against a closed form: data from one Gaussian, whose noise prediction and trajectories are known exactly.

For x0 ~ N(m, s^2) every x_t is N(sqrt(a) m, a s^2 + 1 - a), and the best prediction of the noise in it is
sqrt(1 - a) (x_t - sqrt(a) m) / (a s^2 + 1 - a). Along the probability-flow ODE (Song et al. 2021, "Score-Based
Generative Modeling", eq. 13) the standardised x_t does not change.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.sampler import batch_of
from ldm.models.diffusion.samplers import make_sampler
from ldm.modules.diffusionmodules.schedule import make_beta_schedule, rescale_zero_terminal_snr

MEAN, STD = 1.5, 0.5
SHAPE = (1, 2, 4)
KINDS = ("eps", "x0", "v")

BETAS = make_beta_schedule("linear", 1000, 0.00085, 0.012)
V1 = np.cumprod(1 - BETAS)
EVEN = 1 / (1 + np.exp(-np.linspace(7, -5, 1000)))  # even in the logarithm of a / (1 - a), over V1's range
ZERO_SNR = np.cumprod(1 - rescale_zero_terminal_snr(BETAS))

# Deterministic samplers, and the order that each has from its first step to its last.
ORDERS = {"ddim": 1, "euler": 1, "plms": 2, "dpm_solver": 2, "dpmpp_2m": 2, "dpmpp_2s": 2, "heun": 2, "dpm2": 2}
# Those of higher order than their first steps, from a history that is exact. UniPC has none at all in its first step.
ORDERS_GOING_ON = {"dpmpp_2m": 2, "plms": 2, "dpmpp_3m": 3, "unipc": 3, "lms": 4}


class Gaussian:
    """A model that knows its data to be N(MEAN, STD^2); between timesteps its log alpha is linear."""

    num_timesteps = 1000
    device = torch.device("cpu")

    def __init__(self, alphas_cumprod: np.ndarray, parameterization: str = "eps") -> None:
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod)
        self.parameterization = parameterization
        self.log = np.log(np.maximum(alphas_cumprod, 1e-20))

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: None = None) -> torch.Tensor:
        a = float(np.exp(np.interp(t[0].item(), np.arange(len(self.log)), self.log)))
        eps = (1 - a) ** 0.5 * (x - a**0.5 * MEAN) / (a * STD**2 + 1 - a)
        x0 = MEAN + a**0.5 * STD**2 * (x - a**0.5 * MEAN) / (a * STD**2 + 1 - a)
        return {"eps": eps, "x0": x0, "v": a**0.5 * eps - (1 - a) ** 0.5 * x0}[self.parameterization]


def exact(x: torch.Tensor, a: float, a_next: float) -> torch.Tensor:
    """Where the ODE takes x from the level a to a_next."""
    ratio = ((a_next * STD**2 + 1 - a_next) / (a * STD**2 + 1 - a)) ** 0.5
    return a_next**0.5 * MEAN + (x - a**0.5 * MEAN) * ratio


def start() -> torch.Tensor:
    return torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def run(name: str, steps: int, model: Gaussian, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The end of a run in float64, and where it should be."""
    sampler = make_sampler(model, name)
    x, _ = sampler.sample(steps, 3, SHAPE, x_T=start(), verbose=False, **options)
    assert x.dtype == torch.float64
    return x, exact(
        start(), sampler.sampling_schedule.alphas_cumprod[-1], sampler.sampling_schedule.alphas_cumprod_prev[0]
    )


def error(name: str, steps: int, alphas_cumprod: np.ndarray, kind: str = "eps", **options: object) -> float:
    x, wanted = run(name, steps, Gaussian(alphas_cumprod, kind), **options)
    return float((x - wanted).abs().max())


def order(name: str, steps: int, alphas_cumprod: np.ndarray, kind: str = "eps", **options: object) -> float:
    """p, where twice the steps make 2^-p of the error."""
    errors = [error(name, n, alphas_cumprod, kind, **options) for n in (steps, 2 * steps)]
    return float(np.log2(errors[0] / errors[1]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ORDERS)
def test_order(name, kind):
    assert order(name, 80, EVEN, kind, schedule="even") == pytest.approx(ORDERS[name], abs=0.05)


def error_going_on(name: str, steps: int, kind: str) -> float:
    """The error of a run of which the first four steps start from exact points, and the last two are left out.

    Some rules end in lower orders. All that remember start in them, from nothing, which bounds a whole run's order.
    """
    sampler = make_sampler(Gaussian(EVEN, kind), name)
    sampler.make_schedule(steps, "even")
    first = float(sampler.sampling_schedule.alphas_cumprod[-1])
    x, memory = start(), []
    state = None if name == "plms" else sampler._state(sampler.sampling_schedule, None, None, Guidance())
    for i, step in zip(range(steps - 2), sampler.sampling_schedule.steps()):
        x = exact(start(), first, step.alpha_bar) if i < 4 else x
        if name == "plms":
            t, t_next = (batch_of(t, x) for t in (step.t, step.t_prev))
            x, _, eps = sampler.p_sample_plms(x, None, t, step.remaining, old_eps=memory, t_next=t_next)
            memory = [*memory[-2:], eps]
        else:
            x, _ = sampler.step(state, x, step)
    return float((x - exact(start(), first, step.alpha_bar_prev)).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ORDERS_GOING_ON)
def test_order_once_it_is_going(name, kind):
    """3M comes down to its order from above: 3.8, 3.6, 3.4 for 40, 80, 160 steps."""
    slope = float(np.log2(error_going_on(name, 160, kind) / error_going_on(name, 320, kind)))
    assert slope == pytest.approx(ORDERS_GOING_ON[name], abs=0.45 if name == "dpmpp_3m" else 0.1)


def test_order_from_nothing():
    """The first steps of 3M and LMS are of first order: their own errors shrink with the square of the step."""
    for name in ("dpmpp_3m", "lms"):
        assert order(name, 250, EVEN, schedule="even") > 1.7
    assert order("unipc", 20, EVEN, schedule="even") > 2.9


def test_order_on_the_schedule_of_v1():
    """Its last steps are long in log-SNR, so that second order shows late."""
    assert order("ddim", 50, V1) == pytest.approx(1, abs=0.1)
    assert order("dpm_solver", 100, V1) > 1.5
    assert order("dpm_solver", 500, V1) == pytest.approx(2, abs=0.15)


def test_ends_near_the_data():
    assert error("ddim", 1000, V1) < 4e-3
    assert error("plms", 50, V1) < 4e-3
    assert error("dpm_solver", 1000, V1) < 4e-4


@pytest.mark.parametrize("name", [*ORDERS, *ORDERS_GOING_ON])
def test_what_the_model_predicts_does_not_matter(name):
    ends = [run(name, 20, Gaussian(V1, kind))[0] for kind in KINDS]
    for end in ends[1:]:  # fractional timesteps reach the model in float32
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-6)
