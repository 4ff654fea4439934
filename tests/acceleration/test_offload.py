"""One part of a model at a time where it computes: on meta, whose tensors say where they are; and by numbers."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from ldm.acceleration import OffloadHook, unload_afterwards
from ldm.acceleration import offload as offload_model
from ldm.inference import load_model, txt2img
from tests.tiny import write_tiny

META, CPU = torch.device("meta"), torch.device("cpu")


class Stage(nn.Module):
    """Two layers that share a weight, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.first.weight

    def encode(self, x):  # not a call of the stage itself, as in autoencoders
        return self.tied(self.second(self.first(x)))


def places(part):
    return {tensor.device for tensor in part.state_dict().values()}


def test_one_part_at_a_time():
    a, b = Stage().eval(), Stage().eval()
    before = dict(a.named_parameters())
    with torch.no_grad(), OffloadHook([a, b], META):
        assert a.encode(torch.zeros(2, 3)).device == META
        assert (places(a), places(b)) == ({META}, {CPU})
        assert a.tied.weight is a.first.weight
        b.encode(torch.zeros(2, 3, device=META))
        assert (places(a), places(b)) == ({CPU}, {META})
        assert all(tensor is before[name] for name, tensor in a.named_parameters())
    assert places(b) == {CPU}


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_same_picture(tmp_path, monkeypatch, use_ema):
    monkeypatch.setattr(sys.modules["ldm.acceleration.offload"], "SMALL", 0)
    path = write_tiny(tmp_path, use_ema=use_ema)
    how = {"steps": 2, "height": 32, "width": 32, "seed": 3, "progress": False, "scale": 3.0}
    (plain,) = txt2img(load_model(ckpt=path, device="cpu"), ["a red circle"], **how)
    model = load_model(ckpt=path, device="cpu")
    handle = offload_model(model, CPU).list_on(model)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names, came, load = {part: name for name, part in model.named_children()}, [], handle._load
    monkeypatch.setattr(handle, "_load", lambda part: (came.append(names[part]), load(part)))
    (apart,) = txt2img(model, ["a red circle"], **how)
    assert came == ["cond_stage_model", "model", "first_stage_model"]
    assert np.abs(np.asarray(plain, float) - np.asarray(apart, float)).max() <= 1
    assert all(tensor.equal(weights[name]) for name, tensor in model.state_dict().items())
    assert handle._on_device is None
    handle.remove()
    assert handle not in model.acceleration and not model.model._forward_pre_hooks


def test_the_model_says_where_it_computes():
    model = nn.Module()
    model.big, model.few = nn.Linear(3000, 3000), nn.Linear(2, 2)
    handle = offload_model(model, META)
    assert (places(model.big), places(model.few)) == ({CPU}, {META})
    with unload_afterwards(handle.list_on(model) and model):
        model.big(torch.zeros(1, 3000))
        assert places(model.big) == {META}
    assert places(model.big) == {CPU}


def test_the_option_offloads_the_model(tmp_path):
    model = load_model(ckpt=write_tiny(tmp_path), device="cpu", lowvram=True)
    (handle,) = [handle for handle in model.acceleration if handle.name == "offload"]
    assert handle.device == model.device == CPU
    assert handle._on_device is None  # not even after the network was asked what it predicts
