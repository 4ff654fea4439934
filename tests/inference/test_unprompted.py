"""Drawing without text against loops made by hand, with toys of every kind; what a training step makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ldm.data.layouts import Box
from ldm.inference import (
    Pipeline,
    check_labels,
    class2img,
    layout2img,
    layout_tokens,
    noise2img,
    segmentation2img,
    txt2img,
)
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.model_info import ModelInfo, SamplingDefaults
from tests.unprompted import toy

QUICK = {"steps": 4, "seed": 3, "progress": False}


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int16) for image in images])


def assert_same(images, by_hand) -> None:
    """Within a level: rows of another batch differ in the last bits."""
    assert pixels(images).shape == pixels(by_hand).shape
    assert np.abs(pixels(images) - pixels(by_hand)).max() <= 1


class ByHand:
    """A model as samplers see it, whose network is a function of (x, t)."""

    def __init__(self, model, network):
        self.alphas_cumprod, self.num_timesteps = model.alphas_cumprod, model.num_timesteps
        self.parameterization, self.device = model.parameterization, model.device
        self.apply_model = lambda x, t, cond: network(x, t)


@torch.no_grad()
def drawn(model, network, count, size=(8, 8), eta=0.0):
    torch.manual_seed(QUICK["seed"])
    solver = DDIMSampler(ByHand(model, network))
    latents, _ = solver.sample(QUICK["steps"], count, (3, *size), None, eta=eta, verbose=False)
    return Pipeline(model).decode(latents)


def test_nothing():
    model = toy("nothing")
    images = noise2img(model, 2, eta=0.5, **QUICK)
    assert [image.size for image in images] == [(32, 32)] * 2
    assert_same(images, drawn(model, lambda x, t: model.model(x, t), 2, eta=0.5))
    for sampler in ("plms", "dpm_solver"):
        assert np.abs(pixels(noise2img(model, 2, sampler=sampler, **QUICK)) - pixels(images)).max() > 0


def test_ancestral():
    model = toy("nothing", timesteps=12)
    images = noise2img(model, 2, sampler="ancestral", **QUICK)
    torch.manual_seed(QUICK["seed"])
    assert_same(images, Pipeline(model).decode(model.p_sample_loop(None, (2, 3, 8, 8), verbose=False)))
    with pytest.raises(ValueError, match="ancestral sampling has no guidance: use scale 1, or DDIM"):
        class2img(toy("classes"), [1], scale=2.0, sampler="ancestral", **QUICK)


def guided_by_hand(model, cond, uncond, scale):
    def network(x, t):
        without = model.apply_model(x, t, uncond)
        return without + scale * (model.apply_model(x, t, cond) - without)

    return network


# How a model of 10 classes comes to know the one that means none: by its training, or by the one who asks.
TRAINED = {"ucg_training": {"class_label": {"p": 0.1, "val": 9}}}


@pytest.mark.parametrize(
    ("name", "changes", "given", "null"),
    [
        ("classes", {}, None, 1000),
        ("classes", {}, 4, 4),
        ("classes_only", TRAINED, None, 9),
        ("classes_only", TRAINED, 0, 0),
    ],
)
def test_guidance_away_from_the_null_class(name, changes, given, null):
    model = toy(name, **changes)
    table = model.cond_stage_model.embedding.weight.detach()
    network = guided_by_hand(model, table[[1, 5]][:, None], table[[null, null]][:, None], 3.0)
    images = class2img(model, [1, 5], scale=3.0, null_class=given, **QUICK)
    assert_same(images, drawn(model, network, 2))
    assert np.abs(pixels(images) - pixels(class2img(model, [1, 5], **QUICK))).max() > 1  # 1 is without guidance


def test_a_network_that_embeds_labels():
    model = toy("labels")
    cond, uncond = torch.tensor([1, 4]), torch.tensor([0, 0])
    network = guided_by_hand(model, {"c_crossattn": [cond]}, {"c_crossattn": [uncond]}, 2.0)
    assert_same(class2img(model, [1, 4], scale=2.0, null_class=0, **QUICK), drawn(model, network, 2))
    with pytest.raises(ValueError, match="classes are 0 to 4; there is no class 5"):
        class2img(model, [1, 5], **QUICK)


def test_without_a_null_class():
    model = toy("classes_only")
    with pytest.raises(ValueError, match="none of this model's 10 classes is known to mean no class.*: use scale 1"):
        class2img(model, [1], scale=2.0, **QUICK)
    with pytest.raises(ValueError, match="classes are 0 to 9; there is no class 10"):
        class2img(model, [1], scale=2.0, null_class=10, **QUICK)
    with pytest.raises(ValueError, match="there is no class -1"):
        check_labels(model, [-1])


def test_the_models_own_scale():
    model = toy("classes")
    model.info = ModelInfo("toy.ckpt", sampling=SamplingDefaults(scale=3.0))
    assert_same(class2img(model, [1], **QUICK), class2img(model, [1], scale=3.0, **QUICK))


def test_layout():
    model = toy("layout")
    tokens = layout_tokens(model, [[Box(7, 0.25, 0.5, 0.5, 0.5)], []])
    assert tokens.tolist() == [[7, 42, 97, 100, 100, 100, 0, 99], [100] * 6 + [0, 99]]
    with torch.no_grad():
        context = model.cond_stage_model.transformer(tokens, return_embeddings=True)
    images = layout2img(model, tokens, **QUICK)
    assert_same(images, drawn(model, lambda x, t: model.apply_model(x, t, {"c_crossattn": [context]}), 2))
    with pytest.raises(ValueError, match="at most 2 objects, not 3"):
        layout_tokens(model, [[Box(0, 0, 0, 1, 1)] * 3])


def test_segmentation():
    model = toy("segmentation")
    ids = torch.arange(42 * 50).reshape(42, 50) // 400  # 50x42 pixels, floored to 48x40
    images = segmentation2img(model, ids, 2, **QUICK)
    assert [image.size for image in images] == [(48, 40)] * 2
    square = ids[:40, :48]
    images = segmentation2img(model, square, 2, **QUICK)
    planes = torch.stack([square == number for number in range(6)])[None].float()
    with torch.no_grad():
        cond = model.cond_stage_model(planes).expand(2, -1, -1, -1)
    assert_same(images, drawn(model, lambda x, t: model.apply_model(x, t, {"c_concat": [cond]}), 2, (10, 12)))
    with pytest.raises(ValueError, match=r"class ids \[6, 7\], but this model's are 0 to 5"):
        segmentation2img(model, ids + 2, **QUICK)


@pytest.mark.parametrize("draw", [lambda model: noise2img(model, 1), lambda model: layout2img(model, None)])
def test_models_that_draw_from_something_else(draw):
    with pytest.raises(ValueError, match="is conditioned on class labels, not on .*: use scripts/sample_diffusion.py"):
        draw(toy("classes"))
    with pytest.raises(ValueError, match="is conditioned on nothing but noise, not on text"):
        txt2img(toy("nothing"), ["a"])


BATCHES = {
    "layout": {"coordinates_bbox": torch.tensor([[7, 42, 97, 100, 100, 100, 0, 99]] * 2)},
    "labels": {"class_label": torch.tensor([1, 4])},
    "classes": {"class_label": torch.tensor([1, 1000])},
    "segmentation": {"segmentation": torch.eye(6)[torch.arange(32 * 32).reshape(1, 32, 32).repeat(2, 1, 1) % 6]},
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_step_of_training(name):
    """What the condition is made of gets a gradient."""
    model = toy(name).train()
    loss, _ = model.shared_step({"image": torch.rand(2, 32, 32, 3) * 2 - 1, **BATCHES[name]})
    loss.backward()
    own = model.model.diffusion_model.label_emb if name == "labels" else model.cond_stage_model
    assert loss.isfinite() and all(p.grad is not None and p.grad.abs().max() > 0 for p in own.parameters())
    if name == "layout":  # its tokens are shown, not taken for a picture
        batch = BATCHES[name] | {"image": torch.zeros(2, 32, 32, 3)}
        log = model.eval().log_images(batch, N=1, sample=False, plot_progressive_rows=False)
        assert log["conditioning"].shape == (1, 3, 32, 32)
