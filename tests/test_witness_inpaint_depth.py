"""diffusers as a witness of the models that see more than the latent: inpainting (9 channels), depth (5 channels).

The same weights through its converter give the same numbers, alone and in a guided DDIM run whose conditions, masks,
masked pictures and depth, are prepared by either side for itself.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionDepth2ImgPipeline

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.util import instantiate_from_config
from tests import witness
from tests.golden import assert_agrees, difference, filled, golden_configs, tensor
from tests.models.test_depth import depth_config
from tests.models.test_finetuning import inpainting
from tests.test_witness import BAR, PROMPTS, SHAPE, scheduler

STEPS, SCALE = 4, 7.5


def configs(version: str, channels: int):
    """The `model:` section of the small v1 or v2 kind with so many input channels."""
    config = inpainting() if channels == 9 else depth_config()
    unet = golden_configs("unet_pub" if version == "v1" else "unet_sd2")[f"{version}_tiny"]["config"]
    changes = {"in_channels": channels, "context_dim": 24}  # that of the small text tower
    config["params"]["unet_config"]["params"] = unet | changes
    return config


@pytest.fixture(scope="module", params=[("v1", 9), ("v2", 9), ("v2", 5)], ids="{0[0]}-{0[1]}".format)
def pair(request):
    """Our model, and diffusers' UNet and first stage with its weights."""
    config = configs(*request.param)
    ours = filled(instantiate_from_config(config))
    state = ours.state_dict()
    unet, vae = (build({"model": config}, state) for build in (witness.unet, witness.vae))
    return SimpleNamespace(ours=ours, unet=unet, vae=vae, channels=request.param[1])


def conditions(pair) -> tuple[torch.Tensor, torch.Tensor]:
    """What is concatenated to latents of two 32x32 pictures: ours, and as diffusers' pipelines prepare it."""
    picture = tensor("picture", 2, 3, 32, 32).clamp(-1, 1)
    if pair.channels == 5:
        depth = 300.0 * tensor("depth", 2, 24, 24).square()
        pipeline, prepare = SimpleNamespace(vae_scale_factor=2), StableDiffusionDepth2ImgPipeline.prepare_depth_map
        theirs = prepare(pipeline, picture, depth, 2, False, torch.float32, torch.device("cpu"))
        return pair.ours.depth_condition(depth[:, None], SHAPE[1:]), theirs
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, 6:25, :17] = 1
    masked = picture * (mask < 0.5)
    batch = {"mask": mask.movedim(1, -1), "masked_image": masked.movedim(1, -1)}
    torch.manual_seed(2)
    ours = pair.ours.concat_condition(batch, SHAPE[1:])
    torch.manual_seed(2)
    latent = pair.ours.scale_factor * pair.vae.encode(masked).latent_dist.sample()
    return ours, torch.cat([F.interpolate(mask, size=SHAPE[1:]), latent], dim=1)


@torch.no_grad()
def test_network(pair):
    x, context = tensor("x", 2, pair.channels, 16, 16), tensor("context", 2, 7, 24)
    t = torch.tensor([981, 1])
    wanted = pair.unet(x, t, encoder_hidden_states=context).sample
    cond = {"c_concat": [x[:, 4:]], "c_crossattn": [context]}
    assert_agrees(pair.ours.apply_model(x[:, :4], t, cond), wanted, BAR)
    other = cond | {"c_concat": [x[:, 4:].flip(-1)]}
    assert difference(pair.ours.apply_model(x[:, :4], t, other), wanted) > 100 * BAR  # what is concatenated counts


@torch.no_grad()
def test_guided_sampling(pair):
    mine, theirs = conditions(pair)
    assert_agrees(mine, theirs, BAR)
    x = tensor("x_T", 2, *SHAPE)
    cond, uncond = (pair.ours.get_learned_conditioning(texts) for texts in (PROMPTS, ["", ""]))

    def run(concat: torch.Tensor) -> torch.Tensor:
        latents, _ = DDIMSampler(pair.ours).sample(
            S=STEPS,
            batch_size=2,
            shape=SHAPE,
            conditioning={"c_concat": [concat], "c_crossattn": [cond]},
            unconditional_conditioning={"c_concat": [concat], "c_crossattn": [uncond]},
            unconditional_guidance_scale=SCALE,
            x_T=x,
            verbose=False,
        )
        return latents

    def unet(x: torch.Tensor, t: torch.Tensor, **options: torch.Tensor):
        return pair.unet(torch.cat([x, torch.cat([theirs, theirs])], dim=1), t, **options)

    wanted = witness.sample(unet, scheduler("ddim", STEPS), x, uncond, cond, SCALE)
    assert_agrees(run(mine), wanted, BAR)
