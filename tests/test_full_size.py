"""Models of the published sizes, with deterministic weights, against the goldens and against diffusers (all slow)."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ldm.acceleration import accelerate
from ldm.checkpoint import build_on_meta
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from tests import witness
from tests.golden import REFERENCE, assert_agrees, goldens, tensor
from tests.reference.fill import values

pytestmark = pytest.mark.slow

BAR = 3e-5  # measured: 6e-6 or better
PROMPT = "a photograph of an astronaut riding a horse"
SAMPLERS = {"ddim": DDIMSampler, "plms": PLMSSampler, "dpm": DPMSolverSampler}


def published(name: str) -> dict:
    """The public config called `name`, as values."""
    return json.loads((REFERENCE / "public_configs.json").read_text())[f"configs/{name}.yaml"]


def filled_on_meta(config: dict, prefix: str = "") -> nn.Module:
    """A model with deterministic weights for its keys under `prefix`, and without an initialisation before them."""
    model = build_on_meta(config)
    weights = {
        key: torch.from_numpy(values(prefix + key, tuple(value.shape))) if value.is_meta else value
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(weights, strict=True, assign=True)
    accelerate(model)  # as loading does
    return model.eval()


@pytest.fixture(scope="module")
def v1():
    model = filled_on_meta(published("stable-diffusion/v1-inference")["model"])
    assert sum(p.numel() for p in model.model.parameters()) == 859_520_964
    return model


@pytest.mark.parametrize("size", [16, 64])
@torch.no_grad()
def test_v1_unet(v1, size):
    x, context = tensor(f"v1_full.x{size}", 2, 4, size, size), tensor("v1_full.context", 2, 77, 768)
    out = v1.apply_model(x, torch.tensor([981, 1 if size == 16 else 981]), context)
    if size == 16:
        assert_agrees(out, goldens("full_v1")["v1_full.x16.out"], BAR)
    else:
        assert_agrees(out[:, :, 0], goldens("full_v1")["v1_full.x64.out_first_row"], BAR)


@torch.no_grad()
def test_v1_first_stage(v1):
    posterior = v1.first_stage_model.encode(tensor("kl_f8.image", 1, 3, 64, 96).clamp(-1, 1))
    for name in ("mean", "logvar"):
        assert_agrees(getattr(posterior, name), goldens("full_v1")[f"kl_f8.{name}"], BAR)
    assert_agrees(posterior.kl(), goldens("full_v1")["kl_f8.kl"], BAR)
    image = v1.first_stage_model.decode(tensor("kl_f8.z", 1, 4, 8, 12))
    assert_agrees(image[..., ::4, ::4], goldens("full_v1")["kl_f8.decode_every4"], BAR)


@pytest.mark.parametrize("name", SAMPLERS)
@torch.no_grad()
def test_v1_from_prompt_to_picture(v1, name):
    latent, _ = SAMPLERS[name](v1).sample(
        S=5,
        batch_size=1,
        shape=(4, 8, 16),
        conditioning=v1.get_learned_conditioning([PROMPT]),
        unconditional_conditioning=v1.get_learned_conditioning([""]),
        unconditional_guidance_scale=7.5,
        eta=0.0,
        x_T=tensor("e2e.x_T", 1, 4, 8, 16),
        verbose=False,
    )
    assert_agrees(latent, goldens("e2e_v1")[f"{name}.latent"], BAR)
    assert_agrees(v1.decode_first_stage(latent)[..., ::2, ::2], goldens("e2e_v1")[f"{name}.image"], BAR)


@torch.no_grad()
def test_v1_in_diffusers(v1):
    config, state = published("stable-diffusion/v1-inference"), v1.state_dict()
    x, context, t = tensor("x", 2, 4, 16, 24), tensor("context", 2, 77, 768), torch.tensor([981, 1])
    out = witness.unet(config, state)(x, t, encoder_hidden_states=context).sample
    assert_agrees(v1.apply_model(x, t, context), out, BAR)
    vae, image, z = witness.vae(config, state), tensor("image", 1, 3, 64, 96).clamp(-1, 1), tensor("z", 1, 4, 8, 12)
    posterior, wanted = v1.first_stage_model.encode(image), vae.encode(image).latent_dist
    assert_agrees(posterior.mean, wanted.mean, BAR)
    assert_agrees(posterior.logvar, wanted.logvar, BAR)
    assert_agrees(v1.first_stage_model.decode(z), vae.decode(z).sample, BAR)


@torch.no_grad()
def test_v2_unet():
    config = published("stable-diffusion/v2-inference")["model"]["params"]["unet_config"]
    config["params"]["use_fp16"] = False
    unet = filled_on_meta(config, "model.diffusion_model.")
    x, context = tensor("v2_full.x16", 2, 4, 16, 16), tensor("v2_full.context", 2, 77, 1024)
    assert_agrees(unet(x, torch.tensor([981, 1]), context), goldens("full_v2")["v2_full.x16.out"], BAR)
