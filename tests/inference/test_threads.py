"""Calls from several threads give the images of sequential calls, and leave the global random state alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import inference
from tests.tiny import write_tiny

OPTIONS = {"steps": 3, "sampler": "euler_a", "scale": 2.0, "progress": False}
PHOTO = Image.effect_noise((32, 32), 90).convert("RGB")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    ckpt = write_tiny(tmp_path_factory.mktemp("tiny"), use_ema=True)
    return inference.load_model(ckpt=ckpt, device="cpu")


def text_to_image(model, seed):
    return inference.txt2img(model, ["a red circle"], seed=seed, **OPTIONS)


def image_to_image(model, seed):
    return inference.img2img(model, ["a red circle"], PHOTO, seed=seed, strength=0.7, **OPTIONS)


def inpainting(model, seed):
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24] = 1
    return inference.inpaint(model, PHOTO, mask, ["a red circle"], seed=seed, strength=0.7, **OPTIONS)


def tiling(model, seed):
    """Half of the calls change the padding of all convolutions."""
    tiling = "both" if seed % 2 else None
    return inference.txt2img(model, ["a red circle"], seed=seed, tiling=tiling, **OPTIONS)


@pytest.mark.parametrize("call", [text_to_image, image_to_image, inpainting, tiling])
@pytest.mark.parametrize("threads", [2, 4])
def test_images_of_threads_are_those_of_sequential_calls(model, call, threads):
    expected = [np.asarray(call(model, seed)[0]) for seed in range(12)]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(lambda seed: np.asarray(call(model, seed)[0]), range(12)))
    assert all((one == other).all() for one, other in zip(found, expected))
    assert len({image.tobytes() for image in expected}) == 12


def test_two_models_do_not_share_noise(model, tmp_path):
    other = inference.load_model(ckpt=write_tiny(tmp_path), device="cpu")
    expected = [np.asarray(text_to_image(one, seed)[0]) for seed in range(6) for one in (model, other)]
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(text_to_image, one, seed) for seed in range(6) for one in (model, other)]
        found = [np.asarray(call.result()[0]) for call in calls]
    assert all((one == other).all() for one, other in zip(found, expected))


@pytest.mark.parametrize("call", [text_to_image, image_to_image, inpainting])
def test_a_seed_leaves_the_global_generators_alone(model, call):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    call(model, 1)
    assert torch.equal(torch.rand(4), expected)
