"""Prompts as conditions: negative prompts, and prompt options with the bundled model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.shapes.evaluator import evaluate
from ldm.inference import PromptOptions, img2img, inpaint, load_model, txt2img
from ldm.inference.conditioning import text_condition

PROMPTS = ["a large red circle", "a small blue square on a white background", "a green star"]
LONG = (
    "a large red circle to the left of a small blue square , on a white background , and to the right of a green star"
)
HOLE = torch.zeros(1, 1, 64, 64)
HOLE[..., 16:48, 16:48] = 1


@pytest.fixture(scope="module")
def model():
    return load_model("models/ldm/shapes64/config.yaml", "models/ldm/shapes64/model.ckpt", device="cpu")


def sample(model, prompts=PROMPTS, **options) -> np.ndarray:
    options = {"seed": [3, 4, 5][: len(prompts)], "steps": 3, "progress": False, **options}
    return np.stack([np.asarray(image, np.int16) for image in txt2img(model, prompts, **options)])


def conditions(model, negative, scale=3.0):
    with torch.no_grad():
        return text_condition(model, PROMPTS, negative, scale != 1)


def test_plain_prompts_are_encoded_as_published(model):
    guided = conditions(model, "gray")
    with torch.no_grad():
        assert torch.equal(guided.cond, model.get_learned_conditioning(PROMPTS))
        assert torch.equal(guided.uncond, model.get_learned_conditioning(["gray"]).expand(3, -1, -1))
    assert torch.equal(conditions(model, ["gray"] * 3).uncond, guided.uncond)


def test_one_negative_prompt_per_image(model):
    uncond = conditions(model, ["gray", "", "gray"]).uncond
    assert torch.equal(uncond[0], uncond[2])
    for row, text in enumerate(("gray", "")):
        torch.testing.assert_close(uncond[row : row + 1], conditions(model, text).uncond[:1])
    both = sample(model, negative_prompt=["circle", "", "circle"])
    for text, rows in (("circle", [0, 2]), ("", [1])):
        assert np.abs(both - sample(model, negative_prompt=text))[rows].max() <= 1
    assert np.abs(both - sample(model))[0].max() > 5


def test_as_many_negative_prompts_as_prompts(model, caplog):
    with pytest.raises(ValueError, match="there are 2 negative prompts for 3 prompts: give one, or 3"):
        conditions(model, ["a", "b"])
    guided = conditions(model, ["", "gray", ""], scale=1.0)
    assert guided.uncond is None and "has no effect at scale 1" in caplog.text


def test_long_prompts_of_either_side_count_for_both(model):
    guided = text_condition(model, ["a green star"], [LONG], True, PromptOptions(long_prompt=True))
    assert guided.cond.shape == guided.uncond.shape == (1, 48, 128)
    with torch.no_grad():
        expected = model.get_learned_conditioning(["a green star", ""]).flatten(0, 1)
    torch.testing.assert_close(guided.cond[0], expected)


@pytest.mark.parametrize(
    ("plain", "otherwise", "prompt_options"),
    [
        ("a large red circle", "a large (red:1.5) circle", PromptOptions(emphasis=True)),
        (LONG, LONG, PromptOptions(long_prompt=True)),
        ("a large red circle", "a large red circle", PromptOptions(clip_skip=2)),
    ],
)
def test_prompt_options_change_images_of_the_bundled_model(model, plain, otherwise, prompt_options):
    assert np.array_equal(sample(model), sample(model, prompt_options=PromptOptions()))
    difference = np.abs(sample(model, [plain]) - sample(model, [otherwise], prompt_options=prompt_options))
    assert difference.max() > 3
    options = {"steps": 2, "progress": False, "seed": 1}
    start = txt2img(model, [plain], **options)[0]
    both = (PromptOptions(), prompt_options)
    images = [img2img(model, [otherwise], start, **options, prompt_options=how)[0] for how in both]
    assert images[0] != images[1]
    images = [inpaint(model, start, HOLE, [otherwise], **options, prompt_options=how)[0] for how in both]
    assert images[0] != images[1]


def test_emphasis_keeps_the_content(model):
    """A weight moves what it is on, and the rest of the picture is still what the prompt says."""
    prompts = [f"a large ({colour}:1.5) {shape}" for colour, shape in (("red", "circle"), ("blue", "square"))] * 4
    seeds = list(range(8))
    pictures = txt2img(model, prompts, prompt_options=PromptOptions(emphasis=True), seed=seeds, progress=False)
    said = [prompt.replace("(", "").replace(":1.5)", "") for prompt in prompts]
    assert sum(evaluate(np.asarray(picture), text).all for picture, text in zip(pictures, said)) >= 6
