"""The independent witness for Stable Diffusion 2's family: the same weights in diffusers give the same numbers.

Upscaler and unCLIP take a noise level beside the text. diffusers' pipelines noise the small picture, or the embedding,
by a scheduler; here theirs does it with the noise that ours drew. Guided runs are theirs but for the loop, with the
conventions that `test_witness` explains.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.special_models import ImageEmbeddingConditionedLatentDiffusion, LatentUpscaleDiffusion
from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from ldm.modules.encoders.modules import CLIPEmbeddingNoiseAugmentation
from tests import witness
from tests.golden import assert_agrees, difference, filled, golden_configs, tensor
from tests.models.test_unclip import EMBEDDER, NOISE
from tests.models.test_upscaling import LOW_SCALE
from tests.tiny import TEXT

BAR = 1e-5
SHAPE = (4, 16, 16)
PROMPTS, NO_PROMPTS = ["a red circle", "a blue square"], ["", ""]
TOWER = {"width": 24, "heads": 3, "layers": 3, "vocab_size": 16, "context_length": 12, "embed_dim": 24}
OPEN_CLIP = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "params": {
        "layer": "penultimate",
        "max_length": 12,
        "config": TOWER,
        "tokenizer": TEXT["params"]["tokenizer"],
    },
}
KINDS = {
    "v": (LatentDiffusion, {}),
    "hybrid_adm": (LatentUpscaleDiffusion, {"low_scale_config": LOW_SCALE}),
    "crossattn_adm": (
        ImageEmbeddingConditionedLatentDiffusion,
        {"embedder_config": EMBEDDER, "noise_aug_config": NOISE, "parameterization": "v"},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def both(request):
    """A golden model of Stable Diffusion 2's family with OpenCLIP's text tower, and its parts in diffusers."""
    kind, options = KINDS[request.param]
    params = copy.deepcopy(golden_configs("sd2")[request.param]["params"])
    params = params | {"cond_stage_config": OPEN_CLIP} | options
    if kind is LatentUpscaleDiffusion:  # as the public upscaler, which the golden is simpler than
        unet = params["unet_config"]["params"]
        del unet["num_head_channels"]
        unet |= {"num_heads": 4, "disable_self_attentions": [True, False], "disable_middle_self_attn": False}
    ours = filled(kind(**params))
    config, state = {"model": {"params": params}}, ours.state_dict()
    return SimpleNamespace(
        ours=ours,
        unet=witness.unet(config, state),
        text=witness.open_clip_text(TOWER, state),
        conditions=CONDITIONS[request.param](ours),
    )


# What is beside the text, for us and for diffusers: (ours, theirs), of the prompts and of no prompts.


def nothing(ours):
    return SimpleNamespace(cond={}, uncond={}, concat=None, labels=None)


def small_pictures(ours):
    """Of levels 20 and 90; diffusers' UNet takes them with the latent, and the level as a class label."""
    x_low, level = tensor("low", 2, 3, 16, 16), torch.tensor([20, 90])
    torch.manual_seed(1)
    concat, level = ours.low_scale_condition(x_low, level)
    given = {"c_concat": [concat], "c_adm": level}
    torch.manual_seed(1)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=2e-2)
    theirs = scheduler.add_noise(x_low, torch.randn_like(x_low), level)
    return SimpleNamespace(
        cond=given, uncond=given, concat=torch.cat([theirs, theirs]), labels=torch.cat([level, level])
    )


def embeddings(ours):
    """Of levels 20 and 900, and zeros for no picture, as diffusers' pipeline has it."""
    z, level = tensor("embedding", 2, 10), torch.tensor([20, 900])
    torch.manual_seed(1)
    adm = ours.embedding_condition(z, level)
    torch.manual_seed(1)
    noised = DDPMScheduler(beta_schedule="squaredcos_cap_v2").add_noise(z, torch.randn_like(z), level)
    level = get_timestep_embedding(level, 10, flip_sin_to_cos=True, downscale_freq_shift=0)
    theirs = torch.cat([noised, level], dim=1)
    return SimpleNamespace(
        cond={"c_adm": adm},
        uncond={"c_adm": torch.zeros_like(adm)},
        concat=None,
        labels=torch.cat([torch.zeros_like(theirs), theirs]),
    )


CONDITIONS = {"v": nothing, "hybrid_adm": small_pictures, "crossattn_adm": embeddings}


def our_condition(both, prompts, beside):
    return {"c_crossattn": [both.ours.get_learned_conditioning(prompts)], **beside}


def their_context(both, prompts):
    return both.text(both.ours.cond_stage_model.tokenizer(prompts, 12)).last_hidden_state


@torch.no_grad()
def test_text_tower(both):
    """The penultimate layer, padded with zeros, without a mask."""
    wanted, encoder = their_context(both, PROMPTS), both.ours.cond_stage_model
    assert_agrees(encoder(PROMPTS), wanted, BAR)
    encoder.layer_idx = 0
    last = encoder(PROMPTS)
    encoder.layer_idx = 1
    assert difference(last, wanted) > 100 * BAR


@torch.no_grad()
def test_unet(both):
    x, t = tensor("x_T", 2, *SHAPE), torch.tensor([981, 1])
    both_contexts = torch.cat([their_context(both, NO_PROMPTS), their_context(both, PROMPTS)])
    labels, concat = both.conditions.labels, both.conditions.concat
    x2, t2 = torch.cat([x, x]), torch.cat([t, t])
    seen = x2 if concat is None else torch.cat([x2, concat], dim=1)
    wanted = both.unet(seen, t2, encoder_hidden_states=both_contexts, class_labels=labels).sample.chunk(2)
    for prompts, beside, theirs in zip((NO_PROMPTS, PROMPTS), (both.conditions.uncond, both.conditions.cond), wanted):
        assert_agrees(both.ours.apply_model(x, t, our_condition(both, prompts, beside)), theirs, BAR)


@torch.no_grad()
@pytest.mark.parametrize("steps", [2, 5])
def test_guided_sampling(both, steps):
    """From prompts to latents by DDIM, v prediction."""
    x = tensor("x_T", 2, *SHAPE)
    found, _ = DDIMSampler(both.ours).sample(
        steps,
        2,
        SHAPE,
        our_condition(both, PROMPTS, both.conditions.cond),
        unconditional_conditioning=our_condition(both, NO_PROMPTS, both.conditions.uncond),
        unconditional_guidance_scale=5.0,
        x_T=x,
        verbose=False,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(steps)
    wanted = witness.sample(
        both.unet,
        scheduler,
        x,
        their_context(both, NO_PROMPTS),
        their_context(both, PROMPTS),
        5.0,
        concat=both.conditions.concat,
        labels=both.conditions.labels,
    )
    assert_agrees(found, wanted, BAR)


# ---- noise augmentation alone ----


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({"linear_start": 1e-4, "linear_end": 2e-2}, {"beta_schedule": "scaled_linear", "beta_start": 1e-4}),
        ({"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_noise_schedules(ours, theirs):
    model, scheduler = ImageConcatWithNoiseAugmentation(ours), DDPMScheduler(**theirs, beta_end=2e-2)
    assert_agrees(model.betas, scheduler.betas, 1e-6)
    x, noise, level = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 20, 350, 999])
    assert_agrees(model(x, level, noise)[0], scheduler.add_noise(x, noise, level), BAR)


@torch.no_grad()
def test_embeddings_in_their_own_units(tmp_path):
    mean, std = torch.randn(1, 10), torch.rand(1, 10) + 0.5
    torch.save((mean, std), tmp_path / "stats.th")
    ours = CLIPEmbeddingNoiseAugmentation(**NOISE["params"], clip_stats_path=str(tmp_path / "stats.th"))
    normalizer = StableUnCLIPImageNormalizer(10)
    normalizer.load_state_dict({"mean": mean, "std": std})
    z, noise, level = torch.randn(2, 10), torch.randn(2, 10), torch.tensor([20, 900])
    noised = DDPMScheduler(beta_schedule="squaredcos_cap_v2").add_noise(normalizer.scale(z), noise, level)
    found, embedding = ours(z, level, noise)
    assert_agrees(found, normalizer.unscale(noised), BAR)
    assert_agrees(embedding, get_timestep_embedding(level, 10, flip_sin_to_cos=True, downscale_freq_shift=0), BAR)
