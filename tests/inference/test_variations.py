"""Variations by unCLIP: diffusers' pipeline with the same weights and seed, mixing pictures, what is refused."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableUnCLIPImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image

from ldm import inference
from ldm.images import image_to_tensor
from ldm.modules.encoders.clip_image import prepare
from tests import witness
from tests.golden import golden_configs
from tests.models.test_unclip import EMBEDDER, NOISE, WIDTH
from tests.tiny import TEXT, write_model, write_tiny

PROMPTS = ["a red circle", "a blue square"]
TARGET = "ldm.models.diffusion.ddpm.ImageEmbeddingConditionedLatentDiffusion"


def unclip_config() -> dict:
    """`model:` section of the golden model of this kind, predicting v, with a text encoder and an embedder."""
    params = copy.deepcopy(golden_configs("sd2")["crossattn_adm"]["params"]) | {"cond_stage_config": TEXT}
    params |= {"embedder_config": EMBEDDER, "noise_aug_config": NOISE, "parameterization": "v"}
    return {"target": TARGET, "params": params}


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float64) for image in images])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_model(tmp_path_factory.mktemp("unclip"), unclip_config())
    return inference.load_model(ckpt=path, device="cpu")


@torch.no_grad()
@pytest.mark.parametrize("noise_level", [0, 350])
def test_pictures_are_those_of_diffusers_from_the_same_seed(model, noise_level):
    config, state = {"model": {"params": unclip_config()["params"]}}, model.state_dict()
    vision = EMBEDDER["params"]["config"]["vision_cfg"]
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    pipeline = StableUnCLIPImg2ImgPipeline(
        feature_extractor=None,
        image_encoder=witness.clip_vision(vision, model.embedder.model.state_dict()),
        image_normalizer=StableUnCLIPImageNormalizer(WIDTH),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=None,
        text_encoder=None,
        unet=witness.unet(config, state),
        scheduler=DDIMScheduler(**schedule, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False),
        vae=witness.vae(config, state),
    )
    pipeline.vae.register_to_config(scaling_factor=model.scale_factor)
    pipeline.set_progress_bar_config(disable=True)
    inference.seed_everything(3)
    theirs = pipeline(
        image=prepare(image_to_tensor(picture(0)), 16).repeat(2, 1, 1, 1),
        prompt_embeds=model.get_learned_conditioning(PROMPTS),
        negative_prompt_embeds=model.get_learned_conditioning(["a circle"] * 2),
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=4.0,
        noise_level=noise_level,
        output_type="np",
    ).images
    options = {"noise_level": noise_level, "negative_prompt": "a circle", "steps": 4, "scale": 4.0, "seed": 3}
    ours = pixels(inference.variations(model, [picture(0)], PROMPTS, **options, progress=False))
    assert ours.std() > 20  # more than one colour
    assert np.abs(ours + 0.5 - 255 * theirs).max() < 0.6  # ours are cut off to whole numbers


def test_mixtures_are_weighted_means(model):
    images = [picture(0), picture(1, (50, 40)), picture(2)]
    each = [inference.image_embedding(model, [image]) for image in images]
    assert all(z.shape == (1, WIDTH) for z in each)
    torch.testing.assert_close(inference.image_embedding(model, images), torch.stack(each).mean(0))
    mixed = inference.image_embedding(model, images, [3, 1, 0])
    torch.testing.assert_close(mixed, 0.75 * each[0] + 0.25 * each[1])


def test_a_seed_decides_and_every_option_counts(model):
    def draw(images=None, **options):
        options = {"seed": 1, "steps": 2, "progress": False} | options
        return pixels(inference.variations(model, images or [picture(0)], PROMPTS[:1] * 2, **options))

    first = draw()
    assert first.shape == (2, 32, 32, 3) and not np.array_equal(first[0], first[1])
    assert np.array_equal(first, draw())
    embedding = inference.image_embedding(model, [picture(0)])
    assert np.array_equal(first, pixels(inference.variations(model, embedding, PROMPTS[:1] * 2, seed=1, steps=2)))
    others = {"seed": 2, "noise_level": 500, "images": [picture(1)], "scale": 2.0, "negative_prompt": "circle"}
    for name, value in others.items():
        assert not np.array_equal(first, draw(**{name: value})), name
    assert draw(height=48, width=64).shape == (2, 48, 64, 3)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_weights_that_do_not_fit_are_refused(model, weights):
    given = ", ".join(f"{weight:g}" for weight in weights)
    with pytest.raises(
        ValueError, match=re.escape(f"2 images need 2 weights of at least 0, not all 0; they are {given}")
    ):
        inference.image_embedding(model, [picture(0), picture(1)], weights)


def test_what_cannot_be_varied_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="0 to 999, not 1000"):
        inference.variations(model, [picture(0)], PROMPTS, noise_level=1000, steps=1)
    with pytest.raises(ValueError, match="at least one image"):
        inference.variations(model, [], PROMPTS)
    plain = inference.load_model(ckpt=write_tiny(tmp_path), device="cpu")
    with pytest.raises(ValueError, match=r"is conditioned on text, not on an image to vary: use scripts/txt2img\.py"):
        inference.variations(plain, [picture(0)], PROMPTS)
    with pytest.raises(ValueError, match=r"on an image to vary, not on text: use scripts/variations\.py"):
        inference.txt2img(model, PROMPTS)
