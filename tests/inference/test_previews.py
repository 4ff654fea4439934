"""Previews: what they show is like what comes out, and showing it changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import inference
from ldm.inference.previews import Previews
from tests.tiny import write_tiny

PROMPTS = ["a large red circle", "a small blue square", "a yellow triangle", "a white square on a black background"]


def test_previews_are_like_the_pictures():
    model = inference.load_model(device="cpu")  # the bundled one
    seen: list[tuple[int, int, list[Image.Image]]] = []
    expected: dict[int, list[Image.Image]] = {}
    previews = Previews(model, 4, lambda images, step, total: seen.append((step, total, images)))

    def on_step(x0: torch.Tensor, step: int, total: int) -> None:
        previews(x0, step, total)
        expected[step] = inference.Pipeline(model).decode(x0)

    options = {"steps": 10, "sampler": "ddim", "seed": [1, 2, 3, 4], "progress": False}
    pictures = inference.txt2img(model, PROMPTS, **options, on_step=on_step)
    assert [(step, total) for step, total, _ in seen] == [(4, 10), (8, 10)]
    assert all(image.size == pictures[0].size for _, _, images in seen for image in images)
    step, _, images = seen[-1]
    # by latent position, since colours come in blocks
    shown, real = (
        np.stack([np.asarray(image.resize((8, 8), Image.Resampling.BOX)) for image in row]).ravel()
        for row in (images, expected[step])
    )
    assert np.corrcoef(shown, real)[0, 1] > 0.75  # 0.82
    assert [p.tobytes() for p in inference.txt2img(model, PROMPTS, **options)] == [p.tobytes() for p in pictures]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return inference.load_model(ckpt=write_tiny(tmp_path_factory.mktemp("tiny")), device="cpu")


def test_previews_draw_no_numbers_of_the_run(model):
    shown: list[tuple[int, int]] = []
    options = {"steps": 4, "sampler": "ddim", "eta": 1.0, "seed": 5, "strength": 0.5, "progress": False}
    photo = Image.new("RGB", (32, 32), "red")
    plain = inference.img2img(model, ["a"], photo, **options)
    previews = Previews(model, 1, lambda images, step, total: shown.append((step, total)))
    assert inference.img2img(model, ["a"], photo, **options, on_step=previews)[0].tobytes() == plain[0].tobytes()
    assert shown == [(1, 2), (2, 2)]
    with pytest.raises(ValueError, match="not every 0 steps"):
        Previews(model, 0, print)
