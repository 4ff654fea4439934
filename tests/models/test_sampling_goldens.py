"""Samplers of the small eps model and the small models of other kinds, against the goldens, random draws included."""

from __future__ import annotations

import pytest
import torch

from ldm.acceleration import accelerate
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from tests.golden import assert_agrees, golden_configs, goldens, latent_diffusion, tensor

SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}
SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def golden():
    return goldens("diffusion")


@pytest.fixture(scope="module", params=["as built", "laid out"])  # for a CPU, as models are when they are loaded
def model(request):
    model = latent_diffusion(golden_configs("diffusion")["model"])
    if request.param == "laid out":
        accelerate(model)
    return model


@pytest.fixture(scope="module")
def inputs():
    return {
        "c": tensor("c", 2, 5, 24),
        "uc": tensor("uc", 2, 5, 24),
        "x_T": tensor("x_T", 2, *SHAPE),
        "x0": tensor("x0", 2, *SHAPE),
        "mask": (tensor("mask", 2, 1, 16, 16) > 0).float(),
    }


def run(model, inputs, name, steps, scale, seed=5, **options):
    torch.manual_seed(seed)
    options = {"x_T": inputs["x_T"], "eta": 0.0, **options}
    return SAMPLERS[name](model).sample(
        S=steps,
        batch_size=2,
        shape=SHAPE,
        conditioning=inputs["c"],
        unconditional_conditioning=inputs["uc"],
        unconditional_guidance_scale=scale,
        verbose=False,
        **options,
    )


CASES = [(n, s, g) for n in SAMPLERS for s in (1, 10, 20) for g in (1.0, 7.5) if not (n == "dpm" and s == 1)]


@pytest.mark.parametrize("name, steps, scale", CASES)
def test_sample_and_the_draws_it_consumes(model, inputs, golden, name, steps, scale):
    x, _ = run(model, inputs, name, steps, scale)
    assert_agrees(x, golden[f"{name}.{steps}.{scale}"])
    # The generator stands where the public code leaves it, so a second batch matches too.
    assert_agrees(torch.randn(3), golden[f"{name}.{steps}.{scale}.next_randn"], 1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_start_noise_comes_from_the_seed(model, inputs, golden, name):
    x, _ = run(model, inputs, name, 10, 7.5, seed=42, x_T=None)
    assert_agrees(x, golden[f"{name}.seed42"])


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_eta_and_intermediates(model, inputs, golden, eta):
    x, inter = run(model, inputs, "ddim", 10, 7.5, eta=eta, log_every_t=3)
    assert_agrees(x, golden[f"ddim.10.7.5.eta{eta}"])
    for key in ("x_inter", "pred_x0"):
        assert_agrees(torch.stack(inter[key]), golden[f"ddim.eta{eta}.{key}"])


def test_masks(model, inputs, golden):
    keep = {"mask": inputs["mask"], "x0": inputs["x0"]}
    x, _ = run(model, inputs, "ddim", 10, 7.5, eta=0.3, temperature=0.8, **keep)
    assert_agrees(x, golden["ddim.mask"])
    x, _ = run(model, inputs, "plms", 10, 7.5, **keep)
    assert_agrees(x, golden["plms.mask"])
    plms = PLMSSampler(model)  # the whole schedule as image to image walks it
    plms.make_schedule(10, verbose=False)
    torch.manual_seed(5)
    guidance = {"unconditional_guidance_scale": 7.5, "unconditional_conditioning": inputs["uc"]}
    assert_agrees(plms.decode(inputs["x_T"], inputs["c"], 10, verbose=False, **guidance, **keep), golden["plms.mask"])


@pytest.mark.parametrize("t", [1, 8, 16, 19])
def test_image_to_image(model, inputs, golden, t):
    sampler = DDIMSampler(model)
    sampler.make_schedule(20, ddim_eta=0.0, verbose=False)
    torch.manual_seed(9)
    z = sampler.stochastic_encode(inputs["x0"], torch.tensor([t] * 2))
    assert_agrees(z, golden[f"img2img.{t}.z_enc"])
    x = sampler.decode(
        z,
        inputs["c"],
        t,
        unconditional_guidance_scale=5.0,
        unconditional_conditioning=inputs["uc"],
        verbose=False,
    )
    assert_agrees(x, golden[f"img2img.{t}.out"])


def test_ancestral_sampling(model, inputs, golden):
    torch.manual_seed(3)
    x = model.p_sample_loop([inputs["c"]], (2, *SHAPE), x_T=inputs["x_T"], timesteps=12, verbose=False)
    assert_agrees(x, golden["ddpm.p_sample_loop.12"])


V_CASES = [
    ("ddim", 0.0, "v.ddim.10"),
    ("plms", 0.0, "v.plms.10"),
    ("dpm", 0.0, "v.dpm.10"),
    ("ddim", 1.0, "v.ddim.10.eta1"),
]


@pytest.fixture(scope="module")
def v_model():
    return latent_diffusion(golden_configs("sd2")["v"]["params"])


@pytest.mark.parametrize("name, eta, key", V_CASES)
def test_v_prediction(v_model, inputs, name, eta, key):
    x, _ = run(v_model, inputs, name, 10, 7.5, eta=eta)
    assert_agrees(x, goldens("sd2")[key])


def test_plms_converts_v_when_told(v_model, inputs):
    """The published PLMS takes v for eps; told to convert, it goes where DDIM goes."""

    options = {"x_T": inputs["x_T"][:1], "conditioning": inputs["c"][:1], "verbose": False}
    fine, _ = DDIMSampler(v_model).sample(100, 1, SHAPE, **options)

    def distance(convert_v: bool) -> float:
        x, _ = PLMSSampler(v_model, convert_v=convert_v).sample(25, 1, SHAPE, **options)
        return float((x - fine).norm() / fine.norm())

    assert distance(True) < 0.05 < 0.5 < distance(False)


def test_v_image_to_image(v_model, inputs):
    golden = goldens("sd2")
    sampler = DDIMSampler(v_model)
    sampler.make_schedule(20, ddim_eta=0.0, verbose=False)
    torch.manual_seed(9)
    z = sampler.stochastic_encode(inputs["x0"], torch.tensor([12, 12]))
    guidance = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": inputs["uc"]}
    assert_agrees(sampler.decode(z, inputs["c"], 12, verbose=False, **guidance), golden["v.img2img.12"])


def test_ucg_schedule(v_model, inputs):
    scales = [9.0 - 0.5 * i for i in range(10)]
    x, _ = run(v_model, inputs, "ddim", 10, 7.5, ucg_schedule=scales)
    assert_agrees(x, goldens("sd2")["v.ddim.10.ucg_schedule"])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_inversion(inputs, scale):
    model = latent_diffusion(golden_configs("sd2")["eps"]["params"])
    sampler = DDIMSampler(model)
    sampler.make_schedule(20, ddim_eta=0.0, verbose=False)
    uc = {"unconditional_guidance_scale": scale, "unconditional_conditioning": inputs["uc"]}
    x, _ = sampler.encode(inputs["x0"], inputs["c"], 12, verbose=False, **uc)
    assert_agrees(x, goldens("sd2")[f"eps.ddim_encode.12.{scale}"])


def test_concat_condition(inputs):
    model = latent_diffusion(golden_configs("sd2")["concat"]["params"])
    golden = goldens("sd2")
    with torch.no_grad():
        out = model.apply_model(inputs["x_T"], torch.tensor([500, 20]), inputs["x0"])
    assert_agrees(out, golden["concat.apply"])
    x, _ = DDIMSampler(model).sample(10, 2, SHAPE, inputs["x0"], x_T=inputs["x_T"], verbose=False)
    assert_agrees(x, golden["concat.ddim.10"])


def test_hybrid_condition(inputs):
    model = latent_diffusion(golden_configs("sd2")["hybrid"]["params"])
    concat = [tensor("concat", 2, 5, 16, 16)]
    x, _ = DDIMSampler(model).sample(
        10,
        2,
        SHAPE,
        {"c_concat": concat, "c_crossattn": [inputs["c"]]},
        unconditional_conditioning={"c_concat": concat, "c_crossattn": [inputs["uc"]]},
        unconditional_guidance_scale=7.5,
        x_T=inputs["x_T"],
        verbose=False,
    )
    assert_agrees(x, goldens("sd2")["hybrid.ddim.10"])


def test_crossattn_adm_condition(inputs):
    model = latent_diffusion(golden_configs("sd2")["crossattn_adm"]["params"])
    cond = {"c_crossattn": [inputs["c"]], "c_adm": tensor("adm", 2, 20)}
    with torch.no_grad():
        out = model.apply_model(inputs["x_T"], torch.tensor([500, 20]), cond)
    assert_agrees(out, goldens("sd2")["crossattn_adm.apply"])
