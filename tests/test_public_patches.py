"""What public tools patch or override takes effect: samplers' methods, layers' forwards and hooks, weights in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ldm.inference import BUNDLED_CKPT, load_model
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.util import instantiate_from_config, public_path
from tests.golden import filled
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def model():
    return filled(instantiate_from_config(tiny_config())).eval()


def sample(sampler: type, model: nn.Module, **options: object) -> torch.Tensor:
    """Sample two latents in ten steps with guidance."""
    cond, uncond = (model.get_learned_conditioning([prompt] * 2) for prompt in ("a red circle", ""))
    images, _ = sampler(model).sample(
        S=10,
        batch_size=2,
        shape=(4, 16, 16),
        conditioning=cond,
        verbose=False,
        unconditional_guidance_scale=3.0,
        unconditional_conditioning=uncond,
        **options,
    )
    return images


OVERRIDES = [
    (DDIMSampler, "make_schedule", 1),
    (DDIMSampler, "ddim_sampling", 1),
    (DDIMSampler, "p_sample_ddim", 10),
    (DDIMSampler, "register_buffer", None),
    (PLMSSampler, "make_schedule", 1),
    (PLMSSampler, "plms_sampling", 1),
    (PLMSSampler, "p_sample_plms", 10),
    (PLMSSampler, "register_buffer", None),
]


@pytest.mark.parametrize("base, name, count", OVERRIDES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_overridden_methods_of_samplers_are_called(model, base, name, count):
    calls = []

    def override(self, *args, **kwargs):
        calls.append(name)
        return getattr(super(subclass, self), name)(*args, **kwargs)

    subclass = type("Subclass", (base,), {name: override})
    sample(subclass, model)
    assert len(calls) == count if count else calls


def test_q_sample_is_called_under_a_mask(model, monkeypatch):
    calls, original = [], model.q_sample
    monkeypatch.setattr(model, "q_sample", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    sample(DDIMSampler, model, mask=torch.ones(2, 1, 16, 16), x0=torch.randn(2, 4, 16, 16))
    assert len(calls) == 10


def test_attributes_of_samplers_and_networks(model):
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, ddim_eta=0.5, verbose=False)
    names = "betas alphas_cumprod alphas_cumprod_prev sqrt_one_minus_alphas_cumprod ddim_timesteps ddim_sigmas"
    names += " ddim_alphas ddim_alphas_prev ddim_sqrt_one_minus_alphas ddim_sigmas_for_original_num_steps"
    assert not [name for name in names.split() if not hasattr(sampler, name)]
    network = model.model.diffusion_model
    assert network.dtype == torch.float32
    names = "num_res_blocks attention_resolutions channel_mult use_checkpoint num_heads"
    assert not [name for name in names.split() if not hasattr(network, name)]


# ---- a model of `load_model`, whatever accelerates it ----


@pytest.fixture(scope="module")
def predict() -> Callable[[], torch.Tensor]:
    """The bundled model's prediction for fixed inputs; `predict.network` is its UNet."""
    loaded = load_model(ckpt=public_path(BUNDLED_CKPT), device="cpu")
    cond = loaded.get_learned_conditioning(["a red circle", "a blue star"])
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def run() -> torch.Tensor:
        return loaded.apply_model(x, torch.tensor([10, 900]), cond).clone()

    run.network = loaded.model.diffusion_model
    run.before = run()
    return run


def difference(predict: Callable[[], torch.Tensor]) -> float:
    return float((predict() - predict.before).abs().max())


PARTS = ["attn2.to_k", "ff.net.0.proj", "ff.net.2", "proj_in", "in_layers.2", ".conv"]


def part_of(network: nn.Module, end: str) -> nn.Module:
    return next(module for name, module in network.named_modules() if name.endswith(end) and hasattr(module, "weight"))


@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv2d])
def test_a_replaced_forward_of_a_torch_class_takes_effect(predict, layer):
    original = layer.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", lambda self, x: original(self, x) * 1.5)
        assert difference(predict) > 1e-6
    assert difference(predict) == 0


@pytest.mark.parametrize("end", PARTS)
def test_a_replaced_forward_of_an_instance_takes_effect(predict, end):
    part = part_of(predict.network, end)
    original, before = part.forward, vars(part).copy()
    part.forward = lambda *args: original(*args) * 1.5
    try:
        assert difference(predict) > 1e-6
    finally:
        del part.forward
        vars(part).update({name: before[name] for name in ("forward",) if name in before})  # an accelerated layer's
    assert difference(predict) == 0


@pytest.mark.parametrize("end", PARTS)
def test_a_forward_hook_takes_effect(predict, end):
    hook = part_of(predict.network, end).register_forward_hook(lambda module, args, output: output * 1.5)
    try:
        assert difference(predict) > 1e-6
    finally:
        hook.remove()
    assert difference(predict) == 0


@pytest.mark.parametrize("end", PARTS)
def test_weights_changed_in_place_take_effect(predict, end):
    part = part_of(predict.network, end)
    before = part.weight.detach().clone()
    part.weight.data.mul_(1.5)  # how LoRA is merged: not counted as a change by autograd
    try:
        assert difference(predict) > 1e-6
    finally:
        part.weight.data.copy_(before)
    assert difference(predict) == 0
