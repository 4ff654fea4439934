"""Samplers against a closed form: data from one Gaussian, whose noise prediction and trajectories are known exactly.

For x0 ~ N(m, s^2) every x_t is N(sqrt(a) m, a s^2 + 1 - a), and the best prediction of the noise in it is
sqrt(1 - a) (x_t - sqrt(a) m) / (a s^2 + 1 - a). Along the probability-flow ODE (Song et al. 2021, "Score-Based
Generative Modeling", eq. 13) the standardised x_t does not change.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.diffusionmodules.schedule import make_beta_schedule

MEAN, STD = 1.5, 0.5
SHAPE = (1, 2, 4)


V1 = np.cumprod(1 - make_beta_schedule("linear", 1000, 0.00085, 0.012))
EVEN = 1 / (1 + np.exp(-np.linspace(7, -5, 1000)))  # even in the logarithm of a / (1 - a), over V1's range


class Gaussian:
    """A model that knows its data to be N(MEAN, STD^2); between timesteps its log alpha is linear."""

    num_timesteps = 1000
    device = torch.device("cpu")

    def __init__(self, alphas_cumprod: np.ndarray, parameterization: str = "eps") -> None:
        self.alphas_cumprod = torch.from_numpy(alphas_cumprod)
        self.parameterization = parameterization

    def apply_model(self, x: torch.Tensor, t: torch.Tensor, cond: None = None) -> torch.Tensor:
        log_a = np.interp(t[0].item(), np.arange(1000), np.log(self.alphas_cumprod.numpy()))
        a = float(np.exp(log_a))
        eps = (1 - a) ** 0.5 * (x - a**0.5 * MEAN) / (a * STD**2 + 1 - a)
        if self.parameterization == "eps":
            return eps
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        return x0 if self.parameterization == "x0" else a**0.5 * eps - (1 - a) ** 0.5 * x0


def exact(x: torch.Tensor, a: float, a_next: float) -> torch.Tensor:
    """Where the ODE takes x from the level a to a_next."""
    ratio = ((a_next * STD**2 + 1 - a_next) / (a * STD**2 + 1 - a)) ** 0.5
    return a_next**0.5 * MEAN + (x - a**0.5 * MEAN) * ratio


def run(sampler_class: type, steps: int, model: Gaussian, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """The end of a run in float64, and where it should be."""
    sampler = sampler_class(model, **options)
    x_T = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, _ = sampler.sample(steps, 3, SHAPE, x_T=x_T, verbose=False)
    assert x.dtype == torch.float64
    return x, exact(x_T, sampler.schedule.a[-1], sampler.schedule.a_prev[0])


def error(sampler_class: type, steps: int, alphas_cumprod: np.ndarray) -> float:
    x, wanted = run(sampler_class, steps, Gaussian(alphas_cumprod))
    return float((x - wanted).abs().max())


def order(sampler_class: type, steps: int, alphas_cumprod: np.ndarray) -> float:
    """p, where twice the steps make 2^-p of the error."""
    return float(np.log2(error(sampler_class, steps, alphas_cumprod) / error(sampler_class, 2 * steps, alphas_cumprod)))


@pytest.mark.parametrize("steps", [50, 100])
@pytest.mark.parametrize("sampler_class, expected", [(DDIMSampler, 1), (PLMSSampler, 2), (DPMSolverSampler, 2)])
def test_order(sampler_class, expected, steps):
    """PLMS is of higher order in its combination of eps, but of second in its first step."""
    assert order(sampler_class, steps, EVEN) == pytest.approx(expected, abs=0.05)


def test_order_on_the_schedule_of_v1():
    """Its last steps are long in log-SNR, so that second order shows late."""
    assert order(DDIMSampler, 50, V1) == pytest.approx(1, abs=0.1)
    assert order(DPMSolverSampler, 100, V1) > 1.5
    assert order(DPMSolverSampler, 500, V1) == pytest.approx(2, abs=0.15)


def test_ends_near_the_data():
    assert error(DDIMSampler, 1000, V1) < 4e-3
    assert error(PLMSSampler, 50, V1) < 4e-3
    assert error(DPMSolverSampler, 1000, V1) < 4e-4


@pytest.mark.parametrize("sampler_class", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_what_the_model_predicts_does_not_matter(sampler_class):
    options = {"convert_v": True} if sampler_class is PLMSSampler else {}
    ends = [run(sampler_class, 20, Gaussian(V1, kind), **options)[0] for kind in ("eps", "x0", "v")]
    for end in ends[1:]:  # fractional timesteps reach the model in float32
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-7)
