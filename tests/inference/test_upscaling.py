"""Upscaling with small models of both structures: whole and in tiles, sizes, seeds, what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldm import inference
from ldm.images import image_to_tensor
from ldm.inference.upscaling import TiledModel
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.noise import SeededNoise
from tests.tiny import super_resolution_config, upscaler_config, write_model, write_tiny

CONFIGS = {"upscaler": upscaler_config, "super-resolution": super_resolution_config}
QUICK = {"steps": 2, "progress": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        name: inference.load_model(ckpt=write_model(tmp_path_factory.mktemp("model"), config()), device="cpu")
        for name, config in CONFIGS.items()
    }


@pytest.fixture(params=CONFIGS)
def model(request, models):
    return models[request.param]


@pytest.fixture
def upscaler(models):
    return models["upscaler"]


@pytest.fixture
def super_resolution(models):
    return models["super-resolution"]


def picture(width: int = 16, height: int = 24) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 9, y * 7, (x + y) * 4], axis=-1).astype(np.uint8))


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("size", [(16, 24), (13, 21), (1, 5), (50, 9)])
def test_pictures_become_exactly_four_times_as_large(model, size):
    images = inference.upscale(model, [picture(*size)] * 2, seed=1, tile=16, **QUICK)
    assert [image.size for image in images] == [(4 * size[0], 4 * size[1])] * 2


@pytest.mark.parametrize("sampler", inference.SAMPLERS)
def test_seed_decides_everything(model, sampler):
    options = {"sampler": sampler, "tile": 16, **QUICK}
    first, again, other = (
        pixels(inference.upscale(model, [picture(8, 24)] * 2, seed=seed, **options)) for seed in (1, 1, 2)
    )
    assert (first == again).all() and (first != other).any()
    assert (first[0] != first[1]).any()  # pictures of a batch have noise of their own


def test_the_small_picture_counts(model):
    dark, light = (Image.new("RGB", (16, 16), color) for color in ("black", "white"))
    found = [pixels(inference.upscale(model, [image], seed=1, **QUICK)) for image in (dark, light)]
    assert (found[0] != found[1]).any()


def test_what_an_upscaling_is(upscaler):
    """The same by hand, from the parts: noise on the small picture first, then the latent's."""
    small, prompts = picture(), ["a red circle"]
    inference.seed_everything(3)
    concat, level = upscaler.low_scale_condition(image_to_tensor(small), 40)
    given = {"c_concat": [concat], "c_adm": level}
    x, _ = DDIMSampler(upscaler).sample(
        3,
        1,
        (4, 24, 16),
        {**given, "c_crossattn": [upscaler.get_learned_conditioning(prompts)]},
        unconditional_conditioning={**given, "c_crossattn": [upscaler.get_learned_conditioning(["a square"])]},
        unconditional_guidance_scale=9.0,
        verbose=False,
    )
    options = {"negative_prompt": "a square", "noise_level": 40, "seed": 3, "steps": 3, "progress": False}
    drawn = inference.upscale(upscaler, [small], prompts, **options)
    assert np.abs(pixels(drawn) - pixels(inference.Pipeline(upscaler).decode(x))).max() <= 1


def test_what_a_super_resolution_is(super_resolution):
    inference.seed_everything(3)
    cond = image_to_tensor(picture())
    with super_resolution.ema_scope():
        x, _ = DDIMSampler(super_resolution).sample(3, 1, (3, 24, 16), cond, eta=1.0, verbose=False)
    drawn = inference.upscale(super_resolution, [picture()], steps=3, eta=1.0, seed=3, progress=False)
    assert np.abs(pixels(drawn) - pixels(inference.Pipeline(super_resolution).decode(x))).max() <= 1


def test_text_noise_level_and_negative_prompt_count(upscaler):
    changes = ({}, {"prompts": ["a circle"]}, {"noise_level": 80}, {"negative_prompt": "red"})
    found = [pixels(inference.upscale(upscaler, [picture()], seed=1, **QUICK, **change)) for change in changes]
    assert all((a != found[0]).any() for a in found[1:])
    guided, unguided = (
        pixels(inference.upscale(upscaler, [picture()], ["a circle"], seed=1, scale=scale, **QUICK))
        for scale in (9.0, 1.0)
    )
    assert (guided == found[1]).all() and (unguided != found[1]).any()
    explicit = inference.upscale(upscaler, [picture()], [""], noise_level=20, scale=9.0, seed=1, **QUICK)
    assert (pixels(explicit) == found[0]).all()


def test_first_stages_in_half_precision_decode_in_full(upscaler):
    seen = []
    upscaler.first_stage_model.half()
    hook = upscaler.first_stage_model.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    inference.upscale(upscaler, [picture()], **QUICK)
    hook.remove()
    assert seen == [torch.float32]


# ---- tiles ----


def blurring(model) -> SimpleNamespace:
    """What stands for a model whose network and first stage look at 3x3 neighbours alone."""
    names = ("alphas_cumprod", "num_timesteps", "parameterization", "device")
    local = SimpleNamespace(**{name: getattr(model, name) for name in names}, first_stage_model=torch.nn.Identity())
    kernel = torch.full((1, 1, 3, 3), 1 / 9)

    def blur(x):
        return F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view_as(x)

    local.apply_model = lambda x, t, cond: blur(x + cond["c_concat"][0] * cond["c_adm"].view(-1, 1, 1, 1))
    local.decode_first_stage = lambda z: F.interpolate(blur(z), scale_factor=4.0, mode="nearest")
    return local


@pytest.mark.parametrize("sampler", inference.SAMPLERS)
@pytest.mark.parametrize("size", [(40, 56), (16, 72)])
def test_tiles_change_nothing_for_networks_that_look_near(upscaler, sampler, size):
    local = blurring(upscaler)
    noise, small = torch.randn(2, 3, *size), torch.randn(2, 3, *size)
    cond = {"c_concat": [small], "c_adm": torch.tensor([0.1, 0.3])}
    uncond = {**cond, "c_adm": torch.tensor([0.2, 0.1])}
    conditioning = inference.Conditioning(cond, uncond, noise.shape, start=noise)
    options = inference.SamplingOptions(steps=4, sampler=sampler, scale=3.0)
    found = []
    for tile in (0, 16):
        pipe = inference.Pipeline(upscaler)
        pipe.sampling_model = TiledModel(local, tile, progress=False)
        latents = pipe.sample(conditioning, options, SeededNoise(0), progress=False)
        found.append((latents, pipe.sampling_model.decode_first_stage(latents)))
    for whole, tiles in zip(*found):
        torch.testing.assert_close(tiles, whole, rtol=1e-4, atol=1e-4)


def test_memory_is_that_of_tiles(super_resolution, monkeypatch):
    seen = []
    network = super_resolution.model
    monkeypatch.setattr(
        super_resolution, "apply_model", lambda x, t, cond: seen.append(x.shape) or network(x, t, **cond)
    )
    inference.upscale(super_resolution, [picture(45, 20)], tile=24, **QUICK)
    assert set(seen) == {(1, 3, 24, 24)}
    seen.clear()
    inference.upscale(super_resolution, [picture(32, 32)], **QUICK)  # twice the model's own 16
    assert set(seen) == {(1, 3, 32, 32)}
    seen.clear()
    inference.upscale(super_resolution, [picture(33, 8)], **QUICK)
    assert set(seen) == {(1, 3, 8, 32)}
    seen.clear()
    inference.upscale(super_resolution, [picture(33, 8)], tile=0, **QUICK)
    assert set(seen) == {(1, 3, 8, 40)}


# ---- what is refused ----

REFUSED = [
    ("upscaler", {"noise_level": 91}, "noise levels are 0 to 90, not 91"),
    ("upscaler", {"noise_level": -1}, "noise levels are 0 to 90, not -1"),
    ("upscaler", {"prompts": ["a", "b"]}, "there are 1 images and 2 prompts"),
    ("upscaler", {"tile": 15}, "tiles of 15 are too small: they need at least 16"),
    ("super-resolution", {"prompts": ["a"]}, "on a small image alone: leave out prompt$"),
    ("super-resolution", {"noise_level": 0, "scale": 1.0}, "leave out noise_level, scale"),
    ("super-resolution", {"negative_prompt": "red"}, "leave out negative_prompt"),
]


@pytest.mark.parametrize("name, options, message", REFUSED)
def test_mistakes_are_named(models, name, options, message):
    with pytest.raises(ValueError, match=message):
        inference.upscale(models[name], [picture()], **QUICK, **options)


def test_pictures_of_several_sizes(model):
    for images in ([], [picture(), picture(8, 8)]):
        with pytest.raises(ValueError, match="images of one size"):
            inference.upscale(model, images)


def test_models_of_other_families(models, tmp_path):
    wanted = "is conditioned on text, not on a small image and text or a small image: use scripts/txt2img.py"
    with pytest.raises(ValueError, match=wanted):
        inference.upscale(inference.load_model(ckpt=write_tiny(tmp_path), device="cpu"), [picture()])
    for model in models.values():
        with pytest.raises(ValueError, match="on a small image.*not on text: use scripts/upscale.py"):
            inference.txt2img(model, ["a red circle"])
