"""k-diffusion around our models, and its samplers beside ours. `pip install k-diffusion`, of the extra "clients"."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.samplers import make_sampler
from tests.clients.common import PROMPTS, SHAPE, assert_close, import_or_skip, noise, tiny_model

K = import_or_skip("k_diffusion")

STEPS = 8
SAMPLERS = {
    "euler": K.sampling.sample_euler,
    "heun": K.sampling.sample_heun,
    "dpm2": K.sampling.sample_dpm_2,
    "lms": K.sampling.sample_lms,
    "dpmpp_2m": K.sampling.sample_dpmpp_2m,
    "euler_a": K.sampling.sample_euler_ancestral,
}
WRAPPERS = {"eps": K.external.CompVisDenoiser, "v": K.external.CompVisVDenoiser}


@pytest.fixture(scope="module", params=WRAPPERS)
def model(request):
    return tiny_model(parameterization=request.param)


@torch.no_grad()
def theirs(model, sample, x, sigmas, **extra):
    """The result of one of their samplers from noise `x` of our scale."""
    denoiser = WRAPPERS[model.parameterization](model)
    start = x * (1 + sigmas[0] ** 2).sqrt()  # theirs is of variance 1 + sigma^2, ours of variance 1
    return sample(denoiser, start, sigmas, extra_args=extra, disable=True)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(model, name):
    denoiser = WRAPPERS[model.parameterization](model)
    low, high = (float(sigma) for sigma in (denoiser.sigma_min, denoiser.sigma_max))
    sigmas = K.sampling.get_sigmas_karras(STEPS, low, high)
    c, x = model.get_learned_conditioning(PROMPTS), noise(2, *SHAPE, seed=4)
    torch.manual_seed(1)
    expected = theirs(model, SAMPLERS[name], x, sigmas, cond=c)
    torch.manual_seed(1)
    options = {"conditioning": c, "x_T": x, "verbose": False}
    found, _ = make_sampler(model, name).sample(STEPS, 2, SHAPE, schedule="karras", **options)
    assert_close(found, expected, 1e-4)


@torch.no_grad()
def test_guidance(model):
    """A denoiser around the wrapper, as every user of k-diffusion writes it, beside our guidance."""
    denoiser = WRAPPERS[model.parameterization](model)

    def guided(x, sigma, cond, uncond, cond_scale):
        both = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=torch.cat([uncond, cond]))
        without, with_ = both.chunk(2)
        return without + (with_ - without) * cond_scale

    c, u = model.get_learned_conditioning(PROMPTS), model.get_learned_conditioning([""] * 2)
    sigmas = K.sampling.get_sigmas_karras(STEPS, float(denoiser.sigma_min), float(denoiser.sigma_max))
    x = noise(2, *SHAPE, seed=4)
    extra = {"cond": c, "uncond": u, "cond_scale": 5.0}
    start = x * (1 + sigmas[0] ** 2).sqrt()
    expected = K.sampling.sample_dpmpp_2m(guided, start, sigmas, extra_args=extra, disable=True)
    guidance = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": u}
    found, _ = make_sampler(model, "dpmpp_2m").sample(
        STEPS, 2, SHAPE, conditioning=c, x_T=x, verbose=False, schedule="karras", **guidance
    )
    assert_close(found, expected, 1e-4)


def test_noise_levels(model):
    denoiser = WRAPPERS[model.parameterization](model)
    sigmas = ((1 - model.alphas_cumprod) / model.alphas_cumprod).sqrt()
    assert_close(denoiser.sigmas, sigmas)
    assert len(denoiser.get_sigmas(STEPS)) == STEPS + 1
