"""UNets of every kind that public configs describe, against the goldens."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.golden import assert_agrees, filled, golden_configs, goldens, tensor

CASES = [(file, name) for file in ("unet_pub", "unet_sd2") for name in golden_configs(file)]


@pytest.mark.parametrize("file, name", CASES)
def test_golden(file, name):
    case = golden_configs(file)[name]
    model = filled(UNetModel(**case["config"]))
    assert len(model.state_dict()) == case["keys"]
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    inputs = {}
    if case["context"]:
        inputs["context"] = tensor(f"{name}.context", *case["context"])
    if case["y"] == "noise":
        inputs["y"] = tensor(f"{name}.y", case["input"][0], case["config"]["adm_in_channels"])
    elif case["y"]:
        inputs["y"] = torch.tensor(case["y"])
    golden = goldens(file)
    with torch.no_grad():
        out = model(tensor(f"{name}.x", *case["input"]), torch.from_numpy(golden[f"{name}.t"]), **inputs)
    assert_agrees(out, golden[f"{name}.out"])


@pytest.fixture(scope="module")
def v1_tiny():
    return filled(UNetModel(**golden_configs("unet_pub")["v1_tiny"]["config"]))


@pytest.mark.parametrize("size", [(2, 3), (7, 9), (12, 20), (11, 16)])
def test_any_size(v1_tiny, size):
    """The public UNet only takes sizes that halve evenly three times."""
    with torch.no_grad():
        out = v1_tiny(tensor("x", 1, 4, *size), torch.tensor([5]), context=tensor("context", 1, 7, 24))
    assert out.shape == (1, 4, *size) and torch.isfinite(out).all()


@pytest.mark.parametrize("more", [{"conv_resample": False}, {"resblock_updown": True}, {}])
@pytest.mark.parametrize("size", [(1, 1), (3, 9), (4, 5), (7, 11)])
def test_sides_that_averaging_cannot_halve(more, size):
    config = {"image_size": 8, "in_channels": 3, "out_channels": 3, "model_channels": 64, "num_res_blocks": 1}
    net = UNetModel(**config, attention_resolutions=[2], channel_mult=[1, 1, 2], num_heads=2, **more).eval()
    x, t = tensor("x", 1, 3, *size), torch.tensor([5])
    if min(size) < 4 and more:
        with pytest.raises(ValueError, match="the image is too small for this network.*use a larger size"):
            net(x, t)
        return
    with torch.no_grad():
        assert net(x, t).shape == x.shape


def test_gradient_checkpointing_changes_nothing():
    config = golden_configs("unet_pub")["depth2_legacy"]["config"]
    gradients = []
    for use_checkpoint in (False, True):
        model = filled(UNetModel(**{**config, "use_checkpoint": use_checkpoint})).train()
        out = model(tensor("x", 1, 4, 8, 8), torch.tensor([5]), context=tensor("context", 1, 7, 16))
        out.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_half_precision_weights(v1_tiny):
    """bfloat16 weights take and give float32, close to the float32 network."""
    x, t, context = tensor("x", 1, 4, 16, 16), torch.tensor([5]), tensor("context", 1, 7, 24)
    half = filled(UNetModel(**golden_configs("unet_pub")["v1_tiny"]["config"])).bfloat16()
    with torch.no_grad():
        exact, rough = v1_tiny(x, t, context), half(x, t, context)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).norm() / exact.norm()) < 0.05


BASE = {
    "image_size": 8,
    "in_channels": 4,
    "model_channels": 32,
    "out_channels": 4,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1, 2],
    "num_heads": 4,
}
MISTAKES = [
    ({"num_heads": -1}, "num_heads or num_head_channels"),
    ({"num_heads": 5}, "not divisible"),
    ({"use_spatial_transformer": True}, "needs context_dim"),
    ({"context_dim": 8}, "no effect"),
    ({"num_res_blocks": [1, 2, 3]}, "3 entries for the 2 levels"),
    ({"num_classes": "sequential"}, "adm_in_channels"),
    ({"num_classes": "many"}, "'many'"),
]


@pytest.mark.parametrize("change, message", MISTAKES)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        UNetModel(**{**BASE, **change})


def test_labels_only_where_they_belong():
    plain, labelled = UNetModel(**BASE), UNetModel(**BASE, num_classes=10)
    x, t = torch.zeros(1, 4, 8, 8), torch.tensor([1])
    with pytest.raises(ValueError, match="needs y"):
        labelled(x, t)
    with pytest.raises(ValueError, match="without num_classes"):
        plain(x, t, y=torch.tensor([1]))
