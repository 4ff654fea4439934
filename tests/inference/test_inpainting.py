"""Filling holes with small models of the three kinds: with text, without, and of text alone."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from ldm.images import image_to_tensor, tensor_to_images
from ldm.inference import encode_image, inpaint, load_model, takes_text
from ldm.models.diffusion.ddim import DDIMSampler
from tests import witness
from tests.models.test_depth import depth_config
from tests.models.test_finetuning import inpainting
from tests.test_witness import scheduler
from tests.tiny import super_resolution_config, tiny_config, write_model


def filling_config():
    """`model:` section of a small model of inpainting_big's structure, f = 4."""
    config = copy.deepcopy(super_resolution_config())
    config["params"] |= {"cond_stage_key": "masked_image", "cond_stage_config": "__is_first_stage__"}
    config["params"]["unet_config"]["params"]["in_channels"] = 7
    return config


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    configs = {"loop": tiny_config(), "text": inpainting(), "textless": filling_config()}
    paths = {name: write_model(tmp_path_factory.mktemp(name), config) for name, config in configs.items()}
    return {name: load_model(ckpt=path, device="cpu") for name, path in paths.items()} | {"paths": paths}


def photo(width: int = 64, height: int = 32) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 3 % 256, y * 2, (x + y) % 256], axis=-1).astype(np.uint8))


def hole(width: int = 64, height: int = 32) -> torch.Tensor:
    """White from (10, 5) to (30, 20): at the borders of no latent."""
    mask = torch.zeros(1, 1, height, width)
    mask[:, :, 5:20, 10:30] = 1
    return mask


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def fill(models, kind: str, image=None, mask=None, n: int = 1, **options):
    image = photo() if image is None else image
    mask = hole(*image.size) if mask is None else mask
    options = {"steps": 2, "seed": 1, "progress": False} | options
    return inpaint(models[kind], image, mask, (["a red circle"] if kind != "textless" else [""]) * n, **options)


ALL = pytest.mark.parametrize("kind", ["loop", "text", "textless"])


@ALL
@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver"])
def test_the_hole_is_filled_and_the_rest_kept_bit_for_bit(models, kind, sampler):
    drawn = fill(models, kind, n=2, sampler=sampler)
    inside = hole()[0, 0].bool().numpy()
    for image in drawn:
        assert np.array_equal(pixels(image)[~inside], pixels(photo())[~inside])
        assert np.abs(pixels(image) - pixels(photo()))[inside].mean() > 10
    assert np.abs(pixels(drawn[0]) - pixels(drawn[1]))[inside].mean() > 10  # each from a noise of its own


@ALL
def test_what_is_drawn_is_all_there_is_without_keep_unmasked(models, kind):
    kept, drawn = (pixels(fill(models, kind, keep_unmasked=keep)[0]) for keep in (True, False))
    inside = hole()[0, 0].bool().numpy()
    assert np.array_equal(kept[inside], drawn[inside]) and not np.array_equal(kept[~inside], drawn[~inside])


@ALL
def test_feather(models, kind):
    """Three quarters of what is drawn beside the hole, a half, a quarter, nothing."""
    hard, soft, drawn = (
        pixels(fill(models, kind, **options)[0]) for options in ({}, {"feather": 3}, {"keep_unmasked": False})
    )
    row = 12  # through the middle of the hole, which ends at column 30
    assert np.array_equal(soft[hole()[0, 0].bool().numpy()], hard[hole()[0, 0].bool().numpy()])
    expected = pixels(photo())[row] * 1.0
    for column, weight in ((30, 0.75), (31, 0.5), (32, 0.25), (9, 0.75), (8, 0.5), (7, 0.25)):
        expected[column] += weight * (drawn[row, column] - expected[column])
    outside = [*range(10), *range(30, 64)]
    assert np.abs(soft[row] - expected)[outside].max() <= 0.5
    assert np.array_equal(soft[row, 33:], pixels(photo())[row, 33:])


@ALL
def test_empty_and_full_masks(models, kind, caplog):
    (image,) = fill(models, kind, mask=torch.zeros(1, 1, 32, 64))
    assert np.array_equal(pixels(image), pixels(photo())) and "nothing to fill" in caplog.text
    full = torch.ones(1, 1, 32, 64)
    kept, drawn = (fill(models, kind, mask=full, keep_unmasked=keep)[0] for keep in (True, False))
    assert np.array_equal(pixels(kept), pixels(drawn))


@ALL
def test_sizes(models, kind):
    """Without text, pictures keep any size; with it they are as img2img would have them. A mask may have another."""
    image = photo(75, 41)
    mask = hole(75, 41)
    (drawn,) = fill(models, kind, image, mask)
    if kind == "textless":
        outside = ~mask[0, 0].bool().numpy()
        assert drawn.size == (75, 41) and np.array_equal(pixels(drawn)[outside], pixels(image)[outside])
    else:
        fitted = pixels(image.resize((64, 32), resample=Image.Resampling.LANCZOS))
        assert drawn.size == (64, 32) and np.array_equal(pixels(drawn)[20:], fitted[20:])
    (drawn,) = fill(models, kind, image, F.interpolate(mask, (82, 150)), height=40, width=56)
    assert drawn.size == (56, 40)
    with pytest.raises(ValueError, match="the mask is 64x32 pixels, but the image is 75x41"):
        fill(models, kind, image, hole())


def test_tiny_pictures_are_mirrored_as_often_as_it_takes(models):
    (drawn,) = fill(models, "textless", photo(5, 3), torch.ones(1, 1, 3, 5))
    assert drawn.size == (5, 3)


@ALL
def test_strength(models, kind):
    """How many steps are gone through, and how much of the picture there is in their start."""
    network, seen, likeness = models[kind].model, [], []
    channels, latent = models[kind].channels, encode_image(models[kind], photo(), 1).flatten()
    with network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])):
        for strength, count in ((0.0, 0), (0.1, 1), (0.5, 5), (1.0, 10)):
            seen.clear()
            fill(models, kind, strength=strength, steps=10)
            assert len(seen) == count
            likeness += [F.cosine_similarity(x[0, :channels].flatten(), latent, dim=0) for x in seen[:1]]
    assert likeness[0] > 2 * likeness[1] and likeness[1] > likeness[2]  # the small latents drown early


@pytest.mark.parametrize("kind", ["text", "textless"])
def test_what_is_under_the_mask_is_not_seen(models, kind):
    other = photo()
    other.paste("red", (10, 5, 30, 20))
    assert np.array_equal(pixels(fill(models, kind)[0]), pixels(fill(models, kind, other)[0]))


@ALL
def test_half_precision(models, kind):
    model = load_model(ckpt=models["paths"][kind], device="cpu", precision="bf16")
    (drawn,) = fill({kind: model}, kind)
    assert np.abs(pixels(drawn) - pixels(fill(models, kind)[0])).mean() < 8


# ---- what each kind does, by other means ----


@torch.no_grad()
def test_text_and_mask_as_diffusers_does_it(models):
    """Its own preparation of mask and masked picture, its networks, its scheduler."""
    model, mask = models["text"], hole()
    torch.manual_seed(1)  # what `fill` draws: the posterior of the masked picture, then the noise to start from
    state, config = model.state_dict(), {"model": inpainting()}
    unet, vae = witness.unet(config, state), witness.vae(config, state)
    vae.register_to_config(scaling_factor=model.scale_factor)
    picture = VaeImageProcessor(vae_scale_factor=2).preprocess(photo())
    pipeline = SimpleNamespace(vae=vae, vae_scale_factor=2)
    pipeline._encode_vae_image = lambda image, generator: StableDiffusionInpaintPipeline._encode_vae_image(
        pipeline, image, generator
    )
    cpu = torch.device("cpu")
    prepared = StableDiffusionInpaintPipeline.prepare_mask_latents(
        pipeline, mask, picture * (mask < 0.5), 1, 32, 64, torch.float32, cpu, None, True
    )
    concat = torch.cat(prepared, dim=1)
    x = torch.randn(1, 4, 16, 32)
    cond, uncond = (model.get_learned_conditioning([text]) for text in ("a red circle", ""))

    def guided(x, t, **options):
        return unet(torch.cat([x, concat], dim=1), t, **options)

    latent = witness.sample(guided, scheduler("ddim", 4), x, uncond, cond, 7.5)
    wanted = tensor_to_images(vae.decode(latent / model.scale_factor).sample)[0]
    (drawn,) = fill(models, "text", steps=4, keep_unmasked=False)
    assert np.abs(pixels(drawn) - pixels(wanted)).max() <= 1


@torch.no_grad()
def test_textless_as_the_public_script_describes_it(models):
    """Picture and mask from 0 to 1, holes black, all three then from -1 to 1; the latent of one with the other."""
    model = models["textless"]
    image, mask = (image_to_tensor(photo()).double() + 1) / 2, hole()
    masked = 2 * ((1 - mask) * image) - 1
    latent = model.first_stage_model.encode(masked.float())
    c = torch.cat([latent, F.interpolate(2 * mask - 1, size=latent.shape[2:])], dim=1)
    torch.manual_seed(1)
    with model.ema_scope():
        x, _ = DDIMSampler(model).sample(2, 1, (3, *latent.shape[2:]), c, verbose=False)
    predicted = ((model.decode_first_stage(x) + 1) / 2).clamp(0, 1)
    wanted = (1 - mask) * image + mask * predicted
    (drawn,) = fill(models, "textless")
    assert (image_to_tensor(drawn) - (2 * wanted - 1)).abs().max() <= 2.01 / 255


@torch.no_grad()
def test_the_loop_keeps_latents_that_no_mask_touches(models):
    model = models["loop"]
    torch.manual_seed(1)
    x0 = encode_image(model, photo(), 1)
    free = torch.zeros(1, 1, 16, 32)
    free[:, :, 2:10, 5:15] = 1  # rows 5 to 19 of pixels touch latents 2 to 9
    c, uc = (model.get_learned_conditioning([text]) for text in ("a red circle", ""))
    options = {"unconditional_guidance_scale": 7.5, "unconditional_conditioning": uc, "verbose": False}
    x, _ = DDIMSampler(model).sample(2, 1, (4, 16, 32), c, mask=1 - free, x0=x0, **options)
    (wanted,) = tensor_to_images(model.decode_first_stage(x))
    (drawn,) = fill(models, "loop", keep_unmasked=False)
    assert np.abs(pixels(drawn) - pixels(wanted)).max() <= 1


# ---- mistakes ----


def test_mistakes(models):
    with pytest.raises(ValueError, match="leave prompts and scale out"):
        inpaint(models["textless"], photo(), hole(), ["a cat"])
    with pytest.raises(ValueError, match="leave prompts and scale out"):
        inpaint(models["textless"], photo(), hole(), scale=3.0)
    with pytest.raises(ValueError, match="feather blends with the pixels that keep_unmasked would keep"):
        fill(models, "text", feather=2, keep_unmasked=False)
    with pytest.raises(ValueError, match="strength must be from 0 to 1, not 2"):
        fill(models, "loop", strength=2)


def test_other_families_are_sent_to_their_scripts(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        model = load_model(ckpt=write_model(tmp_path, depth_config()), device="cpu")
    message = "on text and a depth map, not on text, an image with a mask or text .*: use scripts/img2img.py"
    for call in (takes_text, lambda model: inpaint(model, photo(), hole())):
        with pytest.raises(ValueError, match=message):
            call(model)
