"""The sampling loop never has the host wait for the device.

The device is torch's "meta", whose tensors have shapes and no numbers: it refuses a number that the host asks for. What
else has the host wait is a copy from one device to the other, which is counted, as is any number read on the host.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.acceleration import cache_contexts
from ldm.models.diffusion.guidance import Guidance
from ldm.models.diffusion.samplers import SAMPLERS, make_sampler
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, UNetModel
from ldm.modules.diffusionmodules.schedule import make_beta_schedule, schedule_buffers
from tests.golden import golden_configs, tensor

META = torch.device("meta")
READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "aten.equal")
GUIDANCE = {
    "none": {},
    "scale": {"scale": 3.0},
    "scales": {"scale": (3.0, 1.0)},
    "interval": {"scale": 3.0, "interval": (0.5, 5.0)},
    "rescale": {"scale": 3.0, "terms": {"rescale": 0.7}},
    "threshold": {"scale": 3.0, "terms": {"threshold": 0.99}},
    "pag": {"scale": 3.0, "terms": {"pag": 2.0}},
    "cfg_pp": {"scale": 0.6, "cfg_pp": True},
}


class Waits(TorchDispatchMode):
    """Collects the operations that a host waits for: those between devices, and those that read a number."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 or any(name in str(op) for name in READING):
            self.found.append(str(op))
        return out


class Anything:
    """Duck of a model on meta."""

    num_timesteps, parameterization, device = 1000, "eps", META
    alphas_cumprod = schedule_buffers(make_beta_schedule("linear", 1000, 0.00085, 0.012))["alphas_cumprod"]
    middle_block = torch.nn.Sequential(AttentionBlock(32))  # of the network, to be perturbed
    model = SimpleNamespace(diffusion_model=SimpleNamespace(middle_block=middle_block))

    def apply_model(self, x, t, c):
        return x * t[:, None, None, None] + c.mean()


@pytest.fixture
def model():
    return Anything()


def waits_of(model, name, guidance, **options):
    """Those of a drawing of five steps, after the first step, which may compute what is kept."""
    solver, waits = make_sampler(model, name), Waits()
    c = torch.empty(2, 5, 24, device=META)

    def after(i):
        if i == 0:
            waits.__enter__()

    options |= {"eta": 0.5} if solver.supports_eta else {}
    x, _ = solver.sample(
        *(5, 2, (4, 16, 16), c, after),
        **{"unconditional_conditioning": c.clone(), "guidance": Guidance(**guidance), "verbose": False, **options},
    )
    waits.__exit__(None, None, None)
    assert x.device == META and x.shape == (2, 4, 16, 16)
    return waits.found


@pytest.mark.parametrize("guided", GUIDANCE)
@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_waits(model, name, guided):
    if guided == "cfg_pp" and not SAMPLERS[name].func.cfg_pp:
        pytest.skip("not for this sampler")
    assert waits_of(model, name, GUIDANCE[guided]) == []


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_masks_do_not_wait(model, name):
    known, mask = torch.empty(2, 4, 16, 16, device=META), torch.empty(2, 1, 16, 16, device=META)
    assert waits_of(model, name, {"scale": 3.0}, mask=mask, x0=known) == []


def test_image_to_image_and_inversion_do_not_wait(model):
    solver, c = make_sampler(model, "ddim"), torch.empty(2, 5, 24, device=META)
    solver.make_schedule(5)
    with Waits() as waits:
        x, _ = solver.encode(torch.empty(2, 4, 16, 16, device=META), c, 4, verbose=False)
        solver.decode(x, c, 4, verbose=False)
    assert waits.found == []


@torch.no_grad()
def test_the_network_does_not_wait_once_it_was_asked():
    with META:
        unet = UNetModel(**golden_configs("diffusion")["unet"]).eval()
        asked = torch.empty(2, 4, 16, 16), torch.ones(2), torch.empty(2, 5, 24)
    with cache_contexts(unet):
        unet(*asked)
        with Waits() as waits:
            assert unet(*asked).shape == asked[0].shape
    assert waits.found == []


def test_the_test_sees_what_it_is_for():
    with Waits() as waits, torch.no_grad():
        tensor("x", 2).sum().item()
        tensor("x", 2).to(META)
    assert len(waits.found) == 2
