"""An independent witness: diffusers, with the same weights, draws the same as we do.

Everything is diffusers' own but for a guided loop (`witness.sample`): its conversion of public checkpoints, networks
and schedulers. The schedulers are set to the public conventions:

- DDIM and PNDM: timesteps 1, 1 + 1000/S, ... (`steps_offset`, "leading") that end at alphas_cumprod[0] instead of 1
  (`set_alpha_to_one=False`), without clipping, which is for pixels. Both sides have S steps where S divides 1000.
  With `skip_prk_steps` the first of PNDM's steps is the public PLMS's: one Euler step, then again with the mean of the
  eps at its two ends; the eps of the second end is not kept. So whole runs are compared, their start included.
- DPM-Solver++: ours walks S + 1 evenly spaced points from timestep 999 to 0, the last level being that of timestep 0
  (`final_sigmas_type="sigma_min"`). diffusers rounds the points, so S is chosen such that they are whole; for another S
  it is handed the fractional points.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)

from ldm.checkpoint import save_checkpoint
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.util import instantiate_from_config
from tests import witness
from tests.golden import assert_agrees, difference, filled, golden_configs, latent_diffusion, tensor
from tests.tiny import TEXT, tiny_config

BAR = 1e-5  # measured: 4e-6 or better
SHAPE = (4, 16, 16)
PROMPTS = ["a red circle", "a blue square"]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}
SCHEDULERS = {
    "ddim": lambda **o: DDIMScheduler(**BETAS, **LEADING | o, clip_sample=False),
    "plms": lambda **o: PNDMScheduler(**BETAS, **LEADING | o, skip_prk_steps=True),
    "dpm": lambda **o: DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="dpmsolver++", final_sigmas_type="sigma_min", **o
    ),
}


@pytest.fixture(scope="module")
def ours():
    return filled(instantiate_from_config(tiny_config()))


@pytest.fixture(scope="module")
def theirs(ours):
    config, state = {"model": tiny_config()}, ours.state_dict()
    return SimpleNamespace(
        unet=witness.unet(config, state),
        vae=witness.vae(config, state),
        text=witness.text(TEXT["params"]["config"], state),
    )


@pytest.fixture(scope="module")
def inputs(ours):
    """Noise and conditions, the latter from our text tower."""
    cond, uncond = ours.get_learned_conditioning(PROMPTS), ours.get_learned_conditioning(["", ""])
    return SimpleNamespace(x=tensor("x_T", 2, *SHAPE), cond=cond.detach(), uncond=uncond.detach())


def sample(model, inputs, name, steps, scale=7.5, eta=0.0):
    torch.manual_seed(1)
    latents, _ = SAMPLERS[name](model).sample(
        S=steps,
        batch_size=2,
        shape=SHAPE,
        conditioning=inputs.cond,
        unconditional_conditioning=inputs.uncond,
        unconditional_guidance_scale=scale,
        eta=eta,
        x_T=inputs.x,
        verbose=False,
    )
    return latents


def their_sample(unet, inputs, scheduler, scale=7.5, **options):
    torch.manual_seed(1)
    return witness.sample(unet, scheduler, inputs.x, inputs.uncond, inputs.cond, scale, **options)


def scheduler(name, steps, **options):
    scheduler = SCHEDULERS[name](**options)
    scheduler.set_timesteps(steps)
    return scheduler


# ---- networks ----

UNETS = [
    ("unet_pub", "v1_tiny"),  # heads by count, 1x1 convolutions around the transformers
    ("unet_pub", "v1_inpaint_tiny"),  # nine input channels
    ("unet_sd2", "v2_tiny"),  # heads by width, linear layers around the transformers
]


@pytest.mark.parametrize("file, name", UNETS)
@torch.no_grad()
def test_unet(file, name):
    case = golden_configs(file)[name]
    model = filled(UNetModel(**case["config"]))
    config = tiny_config(unet_config={"params": case["config"]})
    state = {f"model.diffusion_model.{key}": value for key, value in model.state_dict().items()}
    x, context, t = tensor("x", *case["input"]), tensor("context", *case["context"]), torch.tensor([981, 1])
    out = witness.unet({"model": config}, state)(x, t, encoder_hidden_states=context).sample
    assert_agrees(model(x, t, context=context), out, BAR)


@pytest.mark.parametrize("size", [(11, 13), (9, 16), (1, 3)])
def test_sizes_that_do_not_halve_evenly(ours, theirs, inputs, size):
    """The originals take only multiples; diffusers, like us, upsamples to the size of the skip before it convolves."""
    x, t, context = tensor("x odd", 2, 4, *size), torch.tensor([5, 700]), inputs.cond
    with torch.no_grad():
        expected = theirs.unet(x, t, context).sample
        assert_agrees(ours.model.diffusion_model(x, t, context=context), expected, BAR)


@torch.no_grad()
def test_first_stage(ours, theirs):
    image, z = tensor("image", 1, 3, 64, 96).clamp(-1, 1), tensor("z", 1, 4, 8, 12)
    posterior, wanted = ours.encode_first_stage(image), theirs.vae.encode(image).latent_dist
    assert_agrees(posterior.mean, wanted.mean, BAR)
    assert_agrees(posterior.logvar, wanted.logvar, BAR)
    assert_agrees(posterior.kl(), wanted.kl(), BAR)
    assert_agrees(ours.first_stage_model.decode(z), theirs.vae.decode(z).sample, BAR)


@torch.no_grad()
def test_text_tower(ours, theirs):
    ids = ours.cond_stage_model.tokenizer(PROMPTS, 12)
    assert_agrees(ours.get_learned_conditioning(PROMPTS), theirs.text(ids).last_hidden_state, BAR)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@torch.no_grad()
def test_diffusers_opens_our_files(ours, theirs, inputs, tmp_path, suffix):
    path = str(save_checkpoint(tmp_path / f"model{suffix}", ours.state_dict()))
    unet = UNet2DConditionModel.from_single_file(path, original_config={"model": tiny_config()})
    vae = AutoencoderKL.from_single_file(path, original_config={"model": tiny_config()})
    out = unet(inputs.x, 981, encoder_hidden_states=inputs.cond).sample
    assert_agrees(ours.apply_model(inputs.x, torch.tensor([981, 981]), inputs.cond), out, BAR)
    assert_agrees(ours.first_stage_model.decode(inputs.x), vae.decode(inputs.x).sample, BAR)
    assert vae.config.scaling_factor == ours.scale_factor


# ---- samplers ----


def test_noise_schedule(ours):
    for name in SCHEDULERS:
        assert_agrees(ours.alphas_cumprod, SCHEDULERS[name]().alphas_cumprod, 1e-6)


CASES = [(name, steps) for name in ("ddim", "plms") for steps in (2, 5, 10)] + [("dpm", 9), ("dpm", 27)]


@pytest.mark.parametrize("name, steps", CASES)
def test_guided_sampling(ours, theirs, inputs, name, steps):
    wanted = their_sample(theirs.unet, inputs, scheduler(name, steps))
    assert_agrees(sample(ours, inputs, name, steps), wanted, BAR)


OTHERS = [
    ("plms", 5, scheduler("ddim", 5)),
    ("ddim", 5, scheduler("ddim", 5, set_alpha_to_one=True)),
    ("dpm", 9, scheduler("dpm", 9, solver_order=1)),
    ("dpm", 9, scheduler("dpm", 9, lower_order_final=False)),
]


@pytest.mark.parametrize("name, steps, other", OTHERS)
def test_other_rules_are_told_apart(ours, theirs, inputs, name, steps, other):
    """The comparison sees what separates neighbouring methods, by far more than the bar."""
    assert difference(sample(ours, inputs, name, steps), their_sample(theirs.unet, inputs, other)) > 100 * BAR


def test_dpm_solver_between_timesteps(ours, theirs, inputs):
    """20 steps, most of them at fractional timesteps."""
    t = np.linspace(999, 0, 21)
    other = scheduler("dpm", 20)
    log_a = np.interp(t, np.arange(1000), np.log(other.alphas_cumprod.double().numpy()))
    other.timesteps = torch.tensor(t[:-1], dtype=torch.float32)
    other.sigmas = torch.tensor(np.sqrt(np.expm1(-log_a)), dtype=torch.float32)  # sqrt((1 - a) / a)
    other.set_begin_index(0)
    assert_agrees(sample(ours, inputs, "dpm", 20), their_sample(theirs.unet, inputs, other), BAR)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_noise(ours, theirs, inputs, eta):
    """Both draw every step's noise from torch's generator in turn."""
    wanted = their_sample(theirs.unet, inputs, scheduler("ddim", 5), eta=eta)
    assert_agrees(sample(ours, inputs, "ddim", 5, eta=eta), wanted, BAR)


@pytest.mark.parametrize("name, steps", [("ddim", 5), ("dpm", 9)])
def test_v_prediction(inputs, name, steps):
    """Not PLMS: diffusers extrapolates v and converts the outcome, we convert first."""
    params = golden_configs("sd2")["v"]["params"]
    model = latent_diffusion(params)
    assert model.parameterization == "v"
    unet = witness.unet({"model": {"params": params}}, model.state_dict())
    conditions = SimpleNamespace(x=inputs.x, cond=tensor("c", 2, 5, 24), uncond=tensor("uc", 2, 5, 24))
    wanted = their_sample(unet, conditions, scheduler(name, steps, prediction_type="v_prediction"))
    assert_agrees(sample(model, conditions, name, steps), wanted, BAR)


@pytest.mark.parametrize("name, steps", [("ddim", 5), ("plms", 5), ("dpm", 9)])
@torch.no_grad()
def test_from_prompt_to_picture(ours, theirs, inputs, name, steps):
    """Text tower, UNet, sampler and decoder of one side against those of the other."""
    tokenizer = ours.cond_stage_model.tokenizer
    conditions = copy.copy(inputs)
    conditions.cond = theirs.text(tokenizer(PROMPTS, 12)).last_hidden_state
    conditions.uncond = theirs.text(tokenizer(["", ""], 12)).last_hidden_state
    latents = their_sample(theirs.unet, conditions, scheduler(name, steps))
    wanted = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample
    assert_agrees(ours.decode_first_stage(sample(ours, inputs, name, steps)), wanted, BAR)
