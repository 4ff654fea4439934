"""Partial loads: fitting weights are copied, the rest is reported, and a mostly random start is refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from ldm.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_on_meta,
    fill_model,
    init_from_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from ldm.util import instantiate_from_config
from tests.checkpoint.test_load_weights import FIRST, Tiny, Wrapper, checkpoint, tiny, without
from tests.tiny import TEXT, tiny_config


@pytest.fixture
def file(tmp_path):
    def write(state):
        return save_checkpoint(tmp_path / "a.ckpt", state, overwrite=True)

    return write


def test_fitting_weights_are_copied_and_the_rest_reported(file, caplog):
    given = checkpoint(**{"cond_stage_model.table.weight": torch.ones(7, 3), "extra.a.b": torch.ones(1)})
    model = Tiny(scale=True)
    table = model.cond_stage_model.table.weight.clone()
    missing = init_from_checkpoint(model, file(given.state))
    assert torch.equal(model.get_parameter(FIRST), given.state[FIRST])
    assert torch.equal(model.cond_stage_model.table.weight, table)
    assert {"cond_stage_model.table.weight", "scale_factor"} <= set(missing)
    (record,) = caplog.records
    for text in (
        "1 have another shape: cond_stage_model.table.weight (7x3 in the file, 5x3 here)",
        "2 stay at their initial values: cond_stage_model.table.weight, scale_factor",
        "1 of the file are left out: extra.a.b",
    ):
        assert text in record.getMessage()


def test_complete_file_gives_no_warning(file, caplog):
    caplog.set_level(logging.INFO)
    given = checkpoint()
    init_from_checkpoint(Tiny(), file(given.state | {"cond_stage_model.position_ids": torch.arange(5)[None]}))
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "initial values" not in record.getMessage()


def test_ignored_keys_and_prefix(file, caplog):
    given = checkpoint(ema=True)
    path = file(given.state)
    model = Tiny()
    before = model.cond_stage_model.table.weight.clone()
    init_from_checkpoint(model, path, ignore_keys=["cond_stage_model."])
    assert torch.equal(model.cond_stage_model.table.weight, before)
    wrapper = Wrapper()
    before = wrapper.diffusion_model.out.bias.clone()
    init_from_checkpoint(wrapper, path, ignore_keys=["model.diffusion_model.out.bias"], prefix="model.")
    assert torch.equal(wrapper.diffusion_model.out.bias, before)
    assert torch.equal(wrapper.diffusion_model.out.weight, given.state["model.diffusion_model.out.weight"])
    init_from_checkpoint(tiny(), "absent.ckpt")  # on meta: fill_model will bring everything


def test_schedule_is_not_copied(file):
    model = Tiny()
    betas = model.betas.clone()
    init_from_checkpoint(model, file(checkpoint(betas=torch.ones(7)).state))
    assert torch.equal(model.betas, betas)


def test_ema_weights_alone_are_used(file):
    given = without(checkpoint(ema=True), "model.")
    model = Tiny(use_ema=True)
    init_from_checkpoint(model, file(given.state))
    average = given.state["model_ema.diffusion_modeloutweight"]
    assert torch.equal(model.model.diffusion_model.out.weight, average)
    assert torch.equal(model.model_ema.diffusion_modeloutweight, average)


def test_mostly_random_start_is_refused(file):
    given = checkpoint(**{FIRST: torch.ones(6, 9, 3, 3), "model.diffusion_model.out.weight": torch.ones(3, 3)})
    model = Tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    path = file(without(given, "model.diffusion_model.out.bias").state)
    with pytest.raises(ValueError, match="only 1 of the network's 4 weights fit the file: .* looks like"):
        init_from_checkpoint(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match="nothing in the file fits"):
        init_from_checkpoint(nn.Linear(2, 2), path)
    init_from_checkpoint(model, path, ignore_keys=["model."])  # nobody expects the network then


def test_new_input_channels_start_at_zero(file, caplog):
    caplog.set_level(logging.INFO)
    given = checkpoint(ema=True)
    path = file(given.state)
    model = Tiny(use_ema=True)
    conv = model.model.diffusion_model.input_blocks[0][0]
    conv.weight = nn.Parameter(torch.ones(len(conv.weight), 9, 3, 3))
    model.model_ema = type(model.model_ema)(model.model)
    name = "model_ema.diffusion_modelinput_blocks00weight"
    missing = init_from_checkpoint(model, path, widen={FIRST: 3, name: 4})
    assert torch.equal(conv.weight[:, :3], given.state[FIRST][:, :3]) and conv.weight[:, 3:].eq(0).all()
    average = model.model_ema.get_buffer(name.removeprefix("model_ema."))
    assert torch.equal(average[:, :4], given.state[name]) and average[:, 4:].eq(0).all()
    assert not {FIRST, name} & set(missing)
    assert f"new input channels start at zero: {FIRST} (4 of 9 are in the file)" in caplog.text
    assert caplog.records[0].levelno == logging.INFO

    init_from_checkpoint(model, path)
    assert f"{FIRST} (6x4x3x3 in the file, 6x9x3x3 here)" in caplog.text
    whole = torch.rand(conv.weight.shape)
    init_from_checkpoint(model, file(given.state | {FIRST: whole}), widen={FIRST: 4})
    assert torch.equal(conv.weight, whole)
    other = torch.rand(7, 4, 3, 3)  # another network
    init_from_checkpoint(model, file(given.state | {FIRST: other}), widen={FIRST: 4})
    assert f"{FIRST} (7x4x3x3 in the file, 6x9x3x3 here)" in caplog.text and torch.equal(conv.weight, whole)


def test_text_encoder_of_another_size(file, caplog):
    """A v1-like file starts a model with another text encoder; load_only_unet takes nothing else."""
    torch.manual_seed(0)
    old = instantiate_from_config(tiny_config())
    path = file(old.state_dict())
    config = TEXT["params"]["config"] | {"vocab_size": 20}
    other = {**TEXT, "params": TEXT["params"] | {"config": config}}
    new = instantiate_from_config(tiny_config(cond_stage_config=other, ckpt_path=str(path)))
    assert "token_embedding.weight (16x24 in the file, 20x24 here)" in caplog.text
    assert torch.equal(new.first_stage_model.encoder.conv_in.weight, old.first_stage_model.encoder.conv_in.weight)
    unet = instantiate_from_config(tiny_config(ckpt_path=str(path), load_only_unet=True))
    name = "model.diffusion_model.out.2.bias"
    assert torch.equal(unet.get_parameter(name), old.get_parameter(name))
    assert not torch.equal(unet.first_stage_model.encoder.conv_in.weight, old.first_stage_model.encoder.conv_in.weight)


def test_text_encoder_ema_is_copied(file):
    settings = {"use_ema": True, "ema_cond_stage": True, "cond_stage_trainable": True}
    model = instantiate_from_config(tiny_config(**settings))
    for average, _ in model.averages():
        for name in average.m_name2s_name.values():
            average.get_buffer(name).add_(1.0)
    read = read_checkpoint(file(model.state_dict()))
    key = "transformer.text_model.final_layer_norm.weight"
    half = build_on_meta(tiny_config(**settings))
    report = fill_model(half, read, dtype=torch.float16)
    assert not report.unexpected and {p.dtype for p in half.cond_stage_ema.buffers()} >= {torch.float16}
    with half.ema_scope():
        assert half.cond_stage_model.get_parameter(key).eq(2.0).all()
    assert half.cond_stage_model.get_parameter(key).eq(1.0).all()

    state = {k: v for k, v in read.state.items() if not k.startswith("cond_stage_ema.")}
    plain = build_on_meta(tiny_config(**settings))
    fill_model(plain, Checkpoint(read.path, state))
    with plain.ema_scope():
        assert plain.cond_stage_model.get_parameter(key).eq(1.0).all()
    without_averages = build_on_meta(tiny_config(use_ema=True, cond_stage_trainable=True))
    assert all(k.startswith("cond_stage_ema.") for k in fill_model(without_averages, read).unexpected)
