"""The shared loop: callbacks, intermediates, masks, and the public single-step and full-schedule calls."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.noise import PerImageNoise
from ldm.models.diffusion.samplers import SAMPLERS, make_sampler
from ldm.models.diffusion.schedules import SCHEDULES
from ldm.modules.diffusionmodules.schedule import make_beta_schedule, schedule_buffers
from tests.golden import golden_configs, latent_diffusion, tensor
from tests.models.test_convergence import MEAN, STD, V1, Gaussian

SHAPE = (4, 16, 16)
LEGACY = ("ddim", "plms")  # image to image of these noises one step more than is taken away
NOISY = ("ddpm", "euler_a", "dpmpp_2m_sde")


@pytest.fixture(scope="module")
def model():
    return latent_diffusion(golden_configs("diffusion")["model"])


@pytest.fixture(scope="module")
def c():
    return tensor("c", 2, 5, 24)


@pytest.mark.parametrize("name", SAMPLERS)
def test_callbacks_and_intermediates(model, c, name):
    steps, shown = [], []
    x, kept = make_sampler(model, name).sample(
        5,
        2,
        SHAPE,
        c,
        callback=steps.append,
        img_callback=lambda x0, i: shown.append((i, x0.shape)),
        log_every_t=2,
        verbose=False,
    )
    assert steps == [0, 1, 2, 3, 4]
    assert shown == [(i, x.shape) for i in range(5)]
    assert len(kept["x_inter"]) == len(kept["pred_x0"]) == 1 + 3  # the start, and entries 4, 2, 0
    assert kept["x_inter"][-1].equal(x)


class IdealForNoise:
    """Duck of a model whose data are themselves standard normal, so that the best eps is sqrt(1 - a) x."""

    num_timesteps, parameterization, device = 1000, "eps", torch.device("cpu")
    alphas_cumprod = schedule_buffers(make_beta_schedule("linear", 1000, 0.00085, 0.012))["alphas_cumprod"]

    def apply_model(self, x, t, cond):
        return (1 - self.alphas_cumprod[t.long()]).sqrt().reshape(-1, 1, 1, 1) * x


@pytest.mark.parametrize("schedule", [None, "karras"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_masks_keep_what_they_must(name, schedule):
    """Where the mask is 1 the result is x0, but for the noise of the last level; elsewhere it is free.

    DDIM and PLMS end, as published, in what the network makes of x0 with that noise; the others in x0.
    """
    torch.manual_seed(0)
    x0 = 3.0 * torch.ones(2, *SHAPE)
    mask = torch.zeros(2, 1, 16, 16)
    mask[..., :8] = 1.0
    sampler = make_sampler(IdealForNoise(), name)
    x, _ = sampler.sample(20, 2, SHAPE, mask=mask, x0=x0, schedule=schedule, verbose=False)
    error = (x - x0).abs()
    assert error[..., 8:].mean() > 2.0
    assert error[..., :8].mean() < (0.3 if name in LEGACY else 0.05)
    assert error[..., :8].max() < (1.0 if name in LEGACY else 0.2)
    if sampler.sampling_schedule.alphas_cumprod_prev[0] == 1 and name not in LEGACY:
        torch.testing.assert_close(x[..., :8], x0[..., :8])
    with pytest.raises(ValueError, match="mask needs x0"):
        sampler.sample(2, 2, SHAPE, mask=mask, verbose=False)


def test_one_step_by_hand_is_one_step_of_the_loop(model, c):
    sampler = DDIMSampler(model)
    x = tensor("x_T", 2, *SHAPE)
    kept = sampler.sample(5, 2, SHAPE, c, x_T=x, log_every_t=1, verbose=False)[1]["x_inter"]
    index = len(sampler.ddim_timesteps) - 1
    step, _ = sampler.p_sample_ddim(x, c, torch.full((2,), int(sampler.ddim_timesteps[index])), index)
    torch.testing.assert_close(step, kept[1])


def test_original_steps_end_at_the_data(model, c):
    """Inverting and decoding along every timestep returns, and the full schedule is available before any other."""
    sampler = DDIMSampler(model)
    x0 = tensor("x0", 2, *SHAPE)
    encoded, out = sampler.encode(
        x0, c, 40, use_original_steps=True, return_intermediates=4, schedule_timesteps=True, verbose=False
    )
    assert out["x_encoded"] is encoded and len(out["intermediates"]) == len(out["intermediate_steps"]) >= 4
    back = sampler.decode(encoded, c, 40, use_original_steps=True, verbose=False)
    assert (back - x0).norm() / x0.norm() < 0.02


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_rule_walks_the_original_steps(name):
    """Standard normal data stay what they are along the whole schedule, and to its very end."""
    torch.manual_seed(0)
    x = make_sampler(IdealForNoise(), name).decode(
        tensor("x_T", 2, *SHAPE), None, 1000, use_original_steps=True, verbose=False
    )
    if name in NOISY:
        assert x.mean() == pytest.approx(0, abs=0.1) and x.std() == pytest.approx(1, abs=0.1)
    else:
        torch.testing.assert_close(x, tensor("x_T", 2, *SHAPE), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", [*SCHEDULES, [900, 700, 500, 300, 200, 100, 50, 20, 5]], ids=str)
def test_inversion_returns(schedule, kind):
    """Up the schedule and down again, to discretisation error, whatever the model predicts."""
    sampler = DDIMSampler(Gaussian(V1, kind))
    sampler.make_schedule(100, schedule, verbose=False)
    steps = len(sampler.sampling_schedule)
    x0 = MEAN + STD * torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    encoded, _ = sampler.encode(x0, None, steps, schedule_timesteps=True, verbose=False)
    back = sampler.decode(encoded, None, steps, verbose=False)
    assert float((back - x0).norm() / x0.norm()) < 0.03


def test_quantised_predictions(model, c):
    """quantize_x0 sends every predicted x0 through the first stage's codebook."""
    model.first_stage_model.quantize = lambda x0: (x0.round(), None, None)
    try:
        _, kept = DDIMSampler(model).sample(3, 2, SHAPE, c, quantize_x0=True, log_every_t=1, verbose=False)
    finally:
        del model.first_stage_model.quantize
    assert all(x0.equal(x0.round()) for x0 in kept["pred_x0"][1:])


def test_score_corrector(model, c):
    class Halve:
        def modify_score(self, model, eps, x, t, cond, factor):
            return factor * eps

    x_T = tensor("x_T", 2, *SHAPE)
    plain, _ = DDIMSampler(model).sample(1, 2, SHAPE, c, x_T=x_T, verbose=False)
    unchanged, corrected = (
        DDIMSampler(model).sample(
            1, 2, SHAPE, c, x_T=x_T, score_corrector=Halve(), corrector_kwargs={"factor": factor}, verbose=False
        )[0]
        for factor in (1.0, 0.5)
    )
    assert unchanged.equal(plain) and not corrected.equal(plain)


def test_mistakes_are_named(model, c):
    with pytest.raises(ValueError, match="3 scales for 5 steps"):
        DDIMSampler(model).sample(5, 2, SHAPE, c, ucg_schedule=[1, 2, 3], verbose=False)
    with pytest.raises(ValueError, match="make_schedule"):
        DDIMSampler(model).decode(torch.zeros(1, *SHAPE), c, 3)
    with pytest.raises(ValueError, match="dynamic_threshold are not supported"):
        DDIMSampler(model).sample(5, 2, SHAPE, c, dynamic_threshold=0.9, verbose=False)
    with pytest.raises(ValueError, match="t_enc must be from 0 to"):
        sampler = DDIMSampler(model)
        sampler.make_schedule(5, verbose=False)
        sampler.encode(torch.zeros(2, *SHAPE), c, 6)


@pytest.mark.parametrize("t", [1, 25, 49, 50])
@pytest.mark.parametrize("name", SAMPLERS)
def test_image_to_image_lands_on_the_data(name, t):
    """Standard normal data: noising to where decode starts and walking back keeps mean and variance.

    DDIM and PLMS noise to entry t but start from t - 1, as published; at t = 1 that shows.
    """
    torch.manual_seed(0)
    solver = make_sampler(IdealForNoise(), name)
    solver.make_schedule(50, verbose=False)
    x0 = torch.full((64, *SHAPE), 1.0)
    x = solver.decode(solver.stochastic_encode(x0, t), None, t, verbose=False)
    a = float(solver.sampling_schedule.alphas_cumprod[min(t, 49) if name in LEGACY else t - 1])
    # the exact flow of standard normal data leaves x as it is, and noise on the way its mean square
    if name in NOISY:
        assert x.square().mean() == pytest.approx(1, abs=0.15)
    else:
        assert x.mean() == pytest.approx(a**0.5, abs=0.03) and x.std() == pytest.approx((1 - a) ** 0.5, rel=0.15)


@pytest.mark.parametrize("schedule", [*SCHEDULES, [999, 700, 400, 100]], ids=str)
@pytest.mark.parametrize("name", SAMPLERS)
def test_image_to_image_starts_where_decode_does(name, schedule):
    """At every strength: x is at the level that the network is first asked about, but in the published two."""
    seen = []

    class Recorded(Guidance):
        def __call__(self, outputs, scale):
            seen.append(outputs.alpha_bar)
            return super().__call__(outputs, scale)

    solver = make_sampler(IdealForNoise(), name)
    solver.make_schedule(7, schedule, verbose=False)
    x0 = torch.ones(1, 1, 1, 1)
    for t in range(1, len(solver.sampling_schedule) + 1):
        seen.clear()
        solver.decode(x0, None, t, guidance=Recorded(), verbose=False)
        signal = float(solver.stochastic_encode(x0, t, noise=torch.zeros(1)))
        levels = [*solver.sampling_schedule.alphas_cumprod, solver.sampling_schedule.alphas_cumprod[-1]]
        assert seen[0] == levels[t - 1]
        assert signal**2 == pytest.approx(levels[t] if name in LEGACY else levels[t - 1], rel=1e-5)
    if name not in LEGACY:
        assert float(solver.stochastic_encode(x0, 0, noise=torch.zeros(1))) ** 2 == pytest.approx(
            solver.sampling_schedule.alphas_cumprod_prev[0]
        )


# ---- images of a batch ----


class Each(IdealForNoise):
    """IdealForNoise with a condition that is added, and is another for every image."""

    def apply_model(self, x, t, cond):
        return super().apply_model(x, t, None) + 0.1 * torch.tanh(cond)


@pytest.mark.parametrize("way", ["plain", "mask", "img2img"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_is_the_same_alone(name, way):
    """Image i alone and image i in a batch of 3, seed by seed; an image of another seed is another."""
    cond, x0 = tensor("cond", 3, *SHAPE), tensor("x0", 3, *SHAPE)
    mask = (tensor("mask", 3, 1, 16, 16) > 0).float()
    eta = 0.7 if name == "ddim" else 0.0

    def draw(rows: list[int], seeds: list[int]) -> torch.Tensor:
        noise, solver = PerImageNoise(seeds), make_sampler(Each(), name)
        if way == "img2img":
            solver.make_schedule(6, ddim_eta=eta, verbose=False)
            x = solver.stochastic_encode(x0[rows], 4, noise=noise(x0[rows].shape, x0.device))
            return solver.decode(x, cond[rows], 4, noise=noise, verbose=False)
        keep = {"mask": mask[rows], "x0": x0[rows]} if way == "mask" else {}
        return solver.sample(6, len(rows), SHAPE, cond[rows], eta=eta, noise=noise, verbose=False, **keep)[0]

    together = draw([0, 1, 2], [5, 6, 7])
    for i in range(3):
        torch.testing.assert_close(draw([i], [5 + i])[0], together[i], rtol=0, atol=1e-5)
    assert not torch.allclose(draw([0], [6])[0], together[0], atol=1e-2)


@pytest.mark.parametrize("name", SAMPLERS)
def test_batches_and_sizes(model, name):
    """Batches of 1 to 9, and sides that only the network's factor divides."""
    for batch, (height, width) in ((1, (16, 16)), (9, (8, 8)), (3, (4, 12)), (5, (12, 4))):
        cond = tensor("c", batch, 5, 24)
        x, _ = make_sampler(model, name).sample(3, batch, (4, height, width), cond, verbose=False)
        assert x.shape == (batch, 4, height, width) and torch.isfinite(x).all()


def test_dpm_solver_ignores_eta_with_a_warning(model, c, caplog):
    x_T = tensor("x_T", 2, *SHAPE)
    plain, noisy = (
        DPMSolverSampler(model).sample(3, 2, SHAPE, c, x_T=x_T, eta=eta, verbose=False)[0] for eta in (0.0, 0.5)
    )
    assert plain.equal(noisy) and "eta=0.5 has no effect" in caplog.text


class WithoutFloat64(torch.Tensor):
    """A tensor of a device that has no float64, as MPS, until it is on the CPU."""

    def double(self):
        raise TypeError("no float64 here")

    def cpu(self):
        return torch.Tensor(self.tolist())

    def detach(self):
        return self


@pytest.mark.parametrize("name", SAMPLERS)
def test_schedules_need_no_float64_on_the_device(name):
    model = IdealForNoise()
    model.alphas_cumprod = WithoutFloat64(model.alphas_cumprod)
    solver = make_sampler(model, name)
    solver.make_schedule(10, verbose=False)
    assert len(solver.sampling_schedule) == 10


def test_the_network_is_asked_at_the_given_timestep(model, c):
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, verbose=False)
    x = tensor("x_T", 2, *SHAPE)
    own, other = (sampler.p_sample_ddim(x, c, torch.tensor([t, t]), 5)[0] for t in (501, 1))
    assert not own.equal(other)
