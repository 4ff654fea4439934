"""Ours and theirs on the same weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks import networks
from benchmarks.compare import psnr
from benchmarks.networks import Unavailable, on_meta, prepare, sharing_copy, with_weights
from tests.golden import assert_agrees, tensor
from tests.tiny import tiny_config

CPU = torch.device("cpu")
CONFIG = {"model": tiny_config()}


@pytest.fixture(scope="module")
def model():
    return on_meta(CONFIG["model"])


@torch.no_grad()
def test_baselines_compute_the_same(model):
    unet = with_weights(model.model.diffusion_model, CPU)
    x, t, context = tensor("x", 2, 4, 8, 8), torch.tensor([981, 1]), tensor("context", 2, 7, 24)
    theirs = networks.prepare_baseline(networks.diffusers_unet(CONFIG, unet), "eager")
    assert_agrees(unet(x, t, context=context), theirs(x, t, encoder_hidden_states=context).sample, 1e-5)
    first_stage = with_weights(model.first_stage_model, CPU)
    assert_agrees(first_stage.decode(x), networks.diffusers_vae(CONFIG, first_stage).decode(x).sample, 1e-5)
    text, tokens = with_weights(model.cond_stage_model.transformer, CPU), torch.randint(16, (2, 12))
    assert_agrees(text(tokens).last_hidden_state, networks.transformers_text(text)(tokens).last_hidden_state, 1e-5)


@torch.no_grad()
def test_random_weights_preserve_the_scale(model):
    unet = with_weights(model.model.diffusion_model, CPU)
    out = unet(tensor("x", 2, 4, 16, 16), torch.tensor([500, 500]), context=tensor("context", 2, 7, 24))
    assert 0.1 < out.std() < 10 and torch.isfinite(out).all()
    again = with_weights(model.model.diffusion_model, CPU)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters()))
    assert with_weights(model.model.diffusion_model, CPU, torch.float16).out[2].weight.dtype == torch.float16


def test_random_weights_have_distinct_channels(monkeypatch):
    monkeypatch.setattr(networks, "POOL", 101)
    pool = torch.randn(101)
    weight = networks._weight("weight", torch.empty(20, 16, device="meta"), pool)
    assert len(weight.unique(dim=0)) == 20


def test_a_copy_shares_weights_and_nothing_else(model):
    unet = with_weights(model.model.diffusion_model, CPU)
    copy = sharing_copy(unet)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(unet.parameters(), copy.parameters()))
    copy.to(memory_format=torch.channels_last)
    assert unet.input_blocks[0][0].weight.is_contiguous()
    assert not {id(module) for module in unet.modules()} & {id(module) for module in copy.modules()}


def test_int8_leaves_the_weights_that_it_is_given(model):
    unet = with_weights(model.model.diffusion_model, CPU)
    x, t, context = tensor("x", 2, 4, 16, 16), torch.tensor([500, 500]), tensor("context", 2, 7, 24)
    with torch.no_grad():
        before = unet(x, t, context=context)
        try:
            coarse = prepare(unet, "int8", CPU)(x, t, context=context)
        except Unavailable as error:
            pytest.skip(str(error))
        assert psnr(coarse, before) > 20
        assert torch.equal(unet(x, t, context=context), before)


def test_psnr_uses_the_range_as_peak():
    reference = torch.tensor([0.0, 2.0, 1.0, 1.0])
    assert psnr(reference + 0.02, reference) == pytest.approx(40, abs=1e-3)
    assert psnr(reference, reference) is None
