"""What research code does to the public samplers: override, patch, read their buffers, pass their arguments."""

from __future__ import annotations

import inspect
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from ldm.models.diffusion import ddim, plms
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.noise import GeneratorNoise, PerImageNoise
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.samplers import SAMPLERS, make_sampler
from ldm.models.diffusion.sampling_util import append_dims, norm_thresholding, spatial_norm_thresholding
from tests.golden import assert_agrees, golden_configs, latent_diffusion, tensor

SHAPE = (4, 16, 16)
STEPS = 5


@pytest.fixture(scope="module")
def model():
    return latent_diffusion(golden_configs("diffusion")["model"])


@pytest.fixture(scope="module")
def v_model():
    return latent_diffusion(golden_configs("sd2")["v"]["params"])


def run(sampler, **options):
    torch.manual_seed(1)
    c, uc = tensor("c", 2, 5, 24), tensor("uc", 2, 5, 24)
    options = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uc, "verbose": False} | options
    return sampler.sample(STEPS, 2, SHAPE, c, **options)[0]


def recording(base: type, *names: str):
    """A subclass that records the calls of its methods, and passes them on."""
    calls: list[tuple[str, tuple, dict]] = []

    def spy(name):
        def method(self, *args, **kwargs):
            calls.append((name, args, kwargs))
            return getattr(base, name)(self, *args, **kwargs)

        return method

    return type("Recording", (base,), {name: spy(name) for name in names}), calls


# ---- overrides ----


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("base, loop, step", [
    (DDIMSampler, "ddim_sampling", "p_sample_ddim"), (PLMSSampler, "plms_sampling", "p_sample_plms"),
])  # fmt: skip
def test_parts_are_called_as_often_as_in_the_originals(model, monkeypatch, base, loop, step, masked):
    kind, calls = recording(base, "make_schedule", "register_buffer", loop, step)
    noised = []
    monkeypatch.setattr(type(model), "q_sample", lambda self, x, t, noise=None: noised.append(t) or x)
    x = run(kind(model), **({"mask": torch.ones(2, 1, 16, 16), "x0": torch.zeros(2, *SHAPE)} if masked else {}))
    assert x.shape == (2, *SHAPE)
    counts = Counter(name for name, _, _ in calls)
    assert counts == {"make_schedule": 1, "register_buffer": 13, loop: 1, step: STEPS}
    assert len(noised) == (STEPS if masked else 0)


def test_parts_get_the_public_arguments(model):
    """An override with the signature of CompVis' repository, which has no later additions, works."""
    seen = []

    class Public(DDIMSampler):
        def make_schedule(self, ddim_num_steps, ddim_discretize="uniform", ddim_eta=0.0, verbose=True):
            super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

        def ddim_sampling(
            self, cond, shape, x_T=None, ddim_use_original_steps=False, callback=None, timesteps=None,
            quantize_denoised=False, mask=None, x0=None, img_callback=None, log_every_t=100, temperature=1.0,
            noise_dropout=0.0, score_corrector=None, corrector_kwargs=None, unconditional_guidance_scale=1.0,
            unconditional_conditioning=None,
        ):  # fmt: skip
            given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
            img, intermediates = super().ddim_sampling(**given)
            assert set(intermediates) == {"x_inter", "pred_x0"}
            return img, intermediates

        def p_sample_ddim(
            self, x, c, t, index, repeat_noise=False, use_original_steps=False, quantize_denoised=False,
            temperature=1.0, noise_dropout=0.0, score_corrector=None, corrector_kwargs=None,
            unconditional_guidance_scale=1.0, unconditional_conditioning=None,
        ):  # fmt: skip
            seen.append((index, t.tolist(), float(unconditional_guidance_scale), temperature))
            x_prev, pred_x0 = super().p_sample_ddim(
                x, c, t, index, temperature=temperature, unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=unconditional_conditioning,
            )  # fmt: skip
            return x_prev + 1, pred_x0

    options = {"temperature": 0.5, "eta": 0.3}
    x = run(Public(model), **options, noise=PerImageNoise([1, 2]))  # our additions pass through the public arguments
    timesteps = [801, 601, 401, 201, 1]
    assert seen == [(4 - i, [t, t], 3.0, 0.5) for i, t in enumerate(timesteps)]
    assert not torch.allclose(x, run(DDIMSampler(model), **options, noise=PerImageNoise([1, 2])))


def test_an_edited_step_takes_effect(model):
    """As plug-and-play methods do: the returned latent is the one that goes on; in decode, too."""

    class Shifted(DDIMSampler):
        def p_sample_ddim(self, *args, **kwargs):
            x, pred_x0 = super().p_sample_ddim(*args, **kwargs)
            return torch.full_like(x, 7.0), pred_x0

    assert (run(Shifted(model)) == 7).all()
    sampler = Shifted(model)
    sampler.make_schedule(STEPS, verbose=False)
    assert (sampler.decode(tensor("x_T", 2, *SHAPE), tensor("c", 2, 5, 24), 2, verbose=False) == 7).all()


def test_the_condition_may_change_at_every_step(model):
    """A step that changes its condition in place, as prompt editing does, is heard."""
    c, uc, seen = {"c_crossattn": [tensor("c", 2, 5, 24)]}, {"c_crossattn": [tensor("uc", 2, 5, 24)]}, []

    class Changing(DDIMSampler):
        def p_sample_ddim(self, x, c, t, index, **kwargs):
            c["c_crossattn"][0].mul_(0.5)
            out = super().p_sample_ddim(x, c, t, index, **kwargs)
            c["c_crossattn"] = [c["c_crossattn"][0].clone()]
            return out

    sampler = Changing(model)
    sampler.model = type("Spy", (), {})()
    for name in ("alphas_cumprod", "betas", "num_timesteps", "parameterization", "device"):
        setattr(sampler.model, name, getattr(model, name))
    sampler.model.apply_model = lambda x, t, cond: seen.append(cond["c_crossattn"][0].clone()) or x
    guided = {"unconditional_guidance_scale": 3.0, "unconditional_conditioning": uc}
    sampler.sample(3, 2, SHAPE, c, verbose=False, x_T=torch.ones(2, *SHAPE), **guided)
    for i, joined in enumerate(seen):
        torch.testing.assert_close(joined[2:], tensor("c", 2, 5, 24) * 0.5 ** (i + 1))


def test_v_is_converted_by_the_model(v_model, monkeypatch):
    calls = Counter()
    for name in ("predict_eps_from_z_and_v", "predict_start_from_z_and_v"):
        method = getattr(v_model, name)
        monkeypatch.setattr(v_model, name, lambda *a, n=name, f=method: calls.update([n]) or f(*a))
    run(DDIMSampler(v_model))
    assert calls == {"predict_eps_from_z_and_v": STEPS, "predict_start_from_z_and_v": STEPS}


@pytest.mark.parametrize("name", ["noise_like", "make_ddim_timesteps", "make_ddim_sampling_parameters"])
@pytest.mark.parametrize("module, kind", [(ddim, DDIMSampler), (plms, PLMSSampler)])
def test_replaced_functions_are_called(model, monkeypatch, module, kind, name):
    calls, original = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(name) or original(*a, **k))
    run(kind(model))
    assert len(calls) == {"noise_like": STEPS + (kind is PLMSSampler)}.get(name, 1)


def test_a_replaced_noise_is_called_where_a_run_has_noise_of_its_own(model, monkeypatch):
    monkeypatch.setattr(ddim, "noise_like", lambda shape, device, repeat: torch.zeros(shape))
    start = torch.ones(2, *SHAPE)
    found = [run(DDIMSampler(model), x_T=start, eta=1.0, noise=GeneratorNoise(seed)) for seed in (1, 2)]
    assert torch.equal(*found)


def test_a_replaced_extract_is_called(model, monkeypatch):
    calls, original = [], ddim.extract_into_tensor
    monkeypatch.setattr(ddim, "extract_into_tensor", lambda *a: calls.append(a) or original(*a))
    sampler = DDIMSampler(model)
    sampler.make_schedule(STEPS, verbose=False)
    sampler.stochastic_encode(torch.zeros(2, *SHAPE), torch.tensor([1, 3]))
    assert len(calls) == 2


# ---- buffers ----


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler])
def test_buffers(model, kind):
    sampler = kind(model, schedule="cosine")
    sampler.make_schedule(10, ddim_eta=0.5 if kind is DDIMSampler else 0.0, verbose=False)
    assert sampler.schedule == "cosine"
    for name in (
        "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    ):  # fmt: skip
        buffer = getattr(sampler, name)
        assert buffer.dtype == torch.float32 and buffer.shape == (1000,)
        assert_agrees(buffer, getattr(model, name), 1e-5)
    sigmas, alphas, roots = sampler.ddim_sigmas, sampler.ddim_alphas, sampler.ddim_sqrt_one_minus_alphas
    assert all(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in (sigmas, alphas, roots))
    assert sampler.ddim_timesteps.tolist() == [*range(1, 1000, 100)]
    assert_agrees(alphas, model.alphas_cumprod[1::100], 1e-6)
    assert_agrees(sampler.ddim_alphas_prev, [model.alphas_cumprod[0], *alphas[:-1]], 1e-6)
    assert_agrees(roots**2 + alphas, np.ones(10), 1e-6)
    assert sampler.ddim_sigmas_for_original_num_steps.shape == (1000,)
    assert bool((sigmas > 0).all()) == (kind is DDIMSampler)


def test_replaced_buffers_take_effect(model):
    """Also where a subclass makes its whole schedule itself."""

    class Own(DDIMSampler):
        def make_schedule(self, ddim_num_steps, ddim_discretize="uniform", ddim_eta=0.0, verbose=True):
            self.ddim_timesteps = np.array([100, 500, 900])
            alphas = self.model.alphas_cumprod[self.ddim_timesteps]
            self.register_buffer("ddim_alphas", alphas)
            self.register_buffer("ddim_alphas_prev", np.array([0.999, *alphas[:-1].tolist()]))
            self.register_buffer("ddim_sigmas", torch.zeros(3))
            self.register_buffer("ddim_sqrt_one_minus_alphas", (1 - alphas).sqrt())

    options = {"x_T": tensor("x_T", 2, *SHAPE), "guidance": Guidance(3.0, interval=(0.0, 100.0))}
    own = run(Own(model), **options)
    sampler = DDIMSampler(model)
    assert not own.equal(run(sampler, schedule=[100, 500, 900], **options))  # ends at 1, not 0.999
    c, x = tensor("c", 2, 5, 24), tensor("x_T", 2, *SHAPE)
    sampler.ddim_alphas_prev[0] = 0.999
    t = torch.full((2,), 100)
    step = sampler.p_sample_ddim(x, c, t, 0)[0]
    sampler.ddim_alphas_prev[0] = 0.5
    assert not step.equal(sampler.p_sample_ddim(x, c, t, 0)[0])
    sampler.ddim_sigmas = torch.full((3,), 0.1)
    assert not sampler.p_sample_ddim(x, c, t, 0)[0].equal(sampler.p_sample_ddim(x, c, t, 0)[0])


def test_dpm_solver_registers_its_buffer(model):
    kind, calls = recording(DPMSolverSampler, "register_buffer")
    sampler = kind(model, device="cpu")
    assert [args[0] for _, args, _ in calls] == ["alphas_cumprod"]
    assert_agrees(sampler.alphas_cumprod, model.alphas_cumprod, 0)


# ---- arguments ----


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler, DPMSolverSampler])
def test_unknown_arguments_are_ignored_by_the_public_samplers_alone(model, kind):
    options = {"x_T": tensor("x_T", 2, *SHAPE)}
    plain = run(kind(model), **options)
    assert run(kind(model, device=torch.device("cpu"), anything=1), anything=2, **options).equal(plain)
    with pytest.raises(TypeError, match="unexpected keyword argument 'anything'"):
        run(make_sampler(model, "euler"), anything=2)


def test_timesteps_limit_a_loop_to_the_last_steps(model):
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, verbose=False)
    c, x = tensor("c", 2, 5, 24), tensor("x_T", 2, *SHAPE)
    part, _ = sampler.ddim_sampling(c, x.shape, x_T=x, timesteps=4)
    assert part.equal(sampler.decode(x, c, 4, verbose=False))


def test_repeated_noise(model):
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, ddim_eta=1.0, verbose=False)
    x, c = tensor("x_T", 1, *SHAPE).repeat(2, 1, 1, 1), tensor("c", 1, 5, 24).repeat(2, 1, 1)
    same, other = (sampler.p_sample_ddim(x, c, torch.tensor([901, 901]), 9, repeat_noise=r)[0] for r in (True, False))
    torch.testing.assert_close(same[0], same[1])
    assert (other[0] - other[1]).abs().max() > 0.1


def test_signatures_begin_as_published():
    sample = list(inspect.signature(DDIMSampler.sample).parameters)[1:]
    assert sample[:8] == [
        "S",
        "batch_size",
        "shape",
        "conditioning",
        "callback",
        "normals_sequence",
        "img_callback",
        "quantize_x0",
    ]
    p_sample = list(inspect.signature(PLMSSampler.p_sample_plms).parameters)[1:]
    assert p_sample[-4:] == ["unconditional_conditioning", "old_eps", "t_next", "dynamic_threshold"]


# ---- our additions ----


@pytest.mark.parametrize("name", ["ddim", "plms"])
def test_a_list_of_scales_reaches_every_step(model, name):
    kind, calls = recording(*{"ddim": (DDIMSampler, "p_sample_ddim"), "plms": (PLMSSampler, "p_sample_plms")}[name])
    run(kind(model), guidance=Guidance([9.0, 1.0]))
    assert [kwargs["unconditional_guidance_scale"] for _, _, kwargs in calls] == [9.0, 7.0, 5.0, 3.0, 1.0]


def test_nothing_of_a_run_stays(model):
    sampler = DDIMSampler(model)
    x, c = tensor("x_T", 2, *SHAPE), tensor("c", 2, 5, 24)
    sampler.make_schedule(STEPS, verbose=False)
    before = sampler.p_sample_ddim(x, c, torch.full((2,), 801), 4)[0]
    run(sampler, guidance=Guidance(0.5, cfg_pp=True), noise=GeneratorNoise(0))
    with pytest.raises(RuntimeError, match="stopped"):
        run(
            sampler,
            guidance=Guidance(0.5, cfg_pp=True),
            callback=lambda i: (_ for _ in ()).throw(RuntimeError("stopped")),
        )
    assert sampler.p_sample_ddim(x, c, torch.full((2,), 801), 4)[0].equal(before)


@pytest.mark.parametrize("name", SAMPLERS)
def test_threads_do_not_meet(model, name):
    """Two threads at a time, each with its own sampler and noise, get what one alone gets."""

    def sample(seed: int) -> torch.Tensor:
        eta = 0.5 if name == "ddim" else 0.0
        c = tensor("c", 1, 5, 24)
        return make_sampler(model, name).sample(3, 1, SHAPE, c, eta=eta, noise=GeneratorNoise(seed), verbose=False)[0]

    alone, together = [sample(seed) for seed in (1, 2)], {}
    threads = [threading.Thread(target=lambda s=seed: together.update({s: sample(s)})) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone[0].equal(together[1]) and alone[1].equal(together[2])


def test_a_generator_of_its_own_gives_the_global_numbers():
    torch.manual_seed(5)
    expected, before = torch.randn(2, 3), torch.random.get_rng_state()
    assert GeneratorNoise(5)((2, 3), torch.device("cpu")).equal(expected)
    assert GeneratorNoise(torch.Generator().manual_seed(5))((2, 3), "cpu").equal(expected)
    assert torch.random.get_rng_state().equal(before)


# ---- thresholding ----


def test_norm_thresholding():
    x0 = tensor("x0", 2, 3, 4, 5) * torch.tensor([0.1, 5.0]).reshape(2, 1, 1, 1)
    out = norm_thresholding(x0, 1.0)
    assert out[0].equal(x0[0]) and float(out[1].pow(2).mean()) == pytest.approx(1)
    spatial = spatial_norm_thresholding(x0, 1.0)
    rms = spatial.pow(2).mean(1).sqrt()
    assert rms.max() < 1.0001
    torch.testing.assert_close(spatial[0], x0[0])
    assert append_dims(torch.zeros(2), 4).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="more than target_dims"):
        append_dims(torch.zeros(2, 3), 1)
