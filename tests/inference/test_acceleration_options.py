"""`AccelerationOptions` in every task."""

from __future__ import annotations

import numpy as np
import pytest

from ldm import inference
from ldm.inference import AccelerationOptions
from tests.inference.test_sampling_options import GUIDED, UNGUIDED, models, pixels  # noqa: F401
from tests.unprompted import toy

CALLS = GUIDED | {f"unguided {name}": task for name, task in UNGUIDED.items()}


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


def sample(model, call, acceleration, **options):
    return pixels(call(model, seed=1, progress=False, acceleration=acceleration, **options))


@pytest.mark.parametrize("task", CALLS)
def test_every_task_caches(models, inner, task):  # noqa: F811
    name, call = CALLS[task]
    calls = inner(models[name])
    plain = pixels(call(models[name], steps=4, seed=1, progress=False))
    asked = len(calls)
    assert asked % 4 == 0
    again = sample(models[name], call, AccelerationOptions(), steps=4)
    assert np.array_equal(again, plain) and len(calls) == 2 * asked
    cached = sample(models[name], call, AccelerationOptions(cache_features=3), steps=4)  # full, not, not, full
    assert len(calls) == 2 * asked + asked // 2
    assert cached.shape == plain.shape and not np.array_equal(cached, plain)
    assert np.array_equal(sample(models[name], call, AccelerationOptions(cache_features=3), steps=4), cached)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "heun", "dpm2", "unipc", "dpmpp_2m_sde"])
def test_every_sampler_saves_work(models, inner, sampler):  # noqa: F811
    name, call = CALLS["txt2img"]
    calls = inner(models[name])
    sample(models[name], call, AccelerationOptions(), steps=10, sampler=sampler)
    asked = len(calls)
    sample(models[name], call, AccelerationOptions(cache_features=2), steps=10, sampler=sampler)
    assert 0.4 * asked <= len(calls) - asked <= 0.6 * asked  # plms asks twice in its first step


@pytest.mark.parametrize("task", ["txt2img", "img2img", "inpaint", "upscale", "class2img"])
def test_every_task_merges(models, task):  # noqa: F811
    name, call = CALLS[task]
    plain = pixels(call(models[name], steps=2, seed=1, progress=False))
    merged = sample(models[name], call, AccelerationOptions(merge_tokens=0.5), steps=2)
    assert merged.shape == plain.shape and not np.array_equal(merged, plain)
    assert np.array_equal(pixels(call(models[name], steps=2, seed=1, progress=False)), plain)


def test_refusals():
    with pytest.raises(ValueError, match="not 0"):
        AccelerationOptions(cache_features=0)
    with pytest.raises(ValueError, match="not 2.5"):
        AccelerationOptions(cache_features=2.5)
    with pytest.raises(ValueError, match="not 0.9"):
        AccelerationOptions(merge_tokens=0.9)
    model = toy("nothing")
    merging = AccelerationOptions(merge_tokens=0.5)
    with pytest.raises(ValueError, match="this network has none"):
        inference.noise2img(model, 1, steps=1, progress=False, acceleration=merging)
