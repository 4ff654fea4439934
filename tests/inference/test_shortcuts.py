"""`model.shortcuts` in every way of drawing."""

from __future__ import annotations

import numpy as np
import pytest

from ldm import inference
from ldm.inference import Shortcuts
from tests.inference.test_guided_drawing import GUIDED, UNGUIDED, models, pixels  # noqa: F401
from tests.unprompted import toy

WAYS = GUIDED | {f"unguided {name}": way for name, way in UNGUIDED.items()}


@pytest.fixture
def inner():
    """Counts how often the middle of a model's network is computed, from `inner(model)` on."""
    hooks = []

    def count(model):
        calls = []
        middle = model.model.diffusion_model.middle_block
        hooks.append(middle.register_forward_hook(lambda module, args, out: calls.append(len(out))))
        return calls

    yield count
    for hook in hooks:
        hook.remove()


def drawn(model, call, shortcuts, **options):
    model.shortcuts = shortcuts
    try:
        return pixels(call(model, seed=1, progress=False, **options))
    finally:
        del model.shortcuts


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_drawing_caches(models, inner, way):  # noqa: F811
    name, call = WAYS[way]
    calls = inner(models[name])
    plain = pixels(call(models[name], steps=4, seed=1, progress=False))
    asked = len(calls)
    assert asked % 4 == 0
    again = drawn(models[name], call, Shortcuts(), steps=4)
    assert np.array_equal(again, plain) and len(calls) == 2 * asked
    cached = drawn(models[name], call, Shortcuts(cache_features=3), steps=4)  # full, not, not, full
    assert len(calls) == 2 * asked + asked // 2
    assert cached.shape == plain.shape and not np.array_equal(cached, plain)
    assert np.array_equal(drawn(models[name], call, Shortcuts(cache_features=3), steps=4), cached)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "heun", "dpm2", "unipc", "dpmpp_2m_sde"])
def test_every_sampler_saves_work(models, inner, sampler):  # noqa: F811
    name, call = WAYS["txt2img"]
    calls = inner(models[name])
    drawn(models[name], call, Shortcuts(), steps=10, sampler=sampler)
    asked = len(calls)
    drawn(models[name], call, Shortcuts(cache_features=2), steps=10, sampler=sampler)
    assert 0.4 * asked <= len(calls) - asked <= 0.6 * asked  # plms asks twice in its first step


@pytest.mark.parametrize("way", ["txt2img", "img2img", "inpaint", "upscale", "class2img"])
def test_every_way_of_drawing_merges(models, way):  # noqa: F811
    name, call = WAYS[way]
    plain = pixels(call(models[name], steps=2, seed=1, progress=False))
    merged = drawn(models[name], call, Shortcuts(merge_tokens=0.5), steps=2)
    assert merged.shape == plain.shape and not np.array_equal(merged, plain)
    assert np.array_equal(pixels(call(models[name], steps=2, seed=1, progress=False)), plain)


def test_refusals():
    with pytest.raises(ValueError, match="not 0"):
        Shortcuts(cache_features=0)
    with pytest.raises(ValueError, match="not 0.9"):
        Shortcuts(merge_tokens=0.9)
    model = toy("nothing")
    model.shortcuts = Shortcuts(merge_tokens=0.5)
    with pytest.raises(ValueError, match="this network has none"):
        inference.noise2img(model, 1, steps=1, progress=False)
