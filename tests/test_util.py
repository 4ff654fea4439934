"""Config targets: resolution, markers, public names with another home, and mistakes."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from ldm.util import ALIASES, default, get_obj_from_str, instantiate_from_config
from tests.golden import REFERENCE


def test_params_and_extra_arguments():
    config = {"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 4}}
    assert instantiate_from_config(config).weight.shape == (4, 3)
    assert instantiate_from_config(OmegaConf.create(config), out_features=5).weight.shape == (5, 3)
    assert config["params"] == {"in_features": 3, "out_features": 4}
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), torch.nn.Identity)


@pytest.mark.parametrize("marker", ["__is_first_stage__", "__is_unconditional__"])
def test_markers_build_nothing(marker):
    assert instantiate_from_config(marker) is None


@pytest.mark.parametrize("public, home", ALIASES.items())
def test_aliases_resolve(public, home):
    assert get_obj_from_str(public) is get_obj_from_str(home)


V1_CONFIGS = ["configs/stable-diffusion/v1-inference.yaml", "configs/stable-diffusion/v1-inpainting-inference.yaml"]


def targets(value):
    if isinstance(value, dict):
        if "target" in value:
            yield value["target"]
        for entry in value.values():
            yield from targets(entry)


@pytest.mark.parametrize("name", V1_CONFIGS)
def test_public_targets_resolve(name):
    config = json.loads((REFERENCE / "public_configs.json").read_text())[name]
    assert all(callable(get_obj_from_str(target)) for target in targets(config))


MISTAKES = [
    ("LatentDiffusion", "not a dotted path"),
    ("ldm.nowhere.Thing", "no module 'ldm.nowhere'"),
    ("ldm.util.Thing", "has no 'Thing'"),
]


@pytest.mark.parametrize("target, message", MISTAKES)
def test_targets_that_do_not_resolve(target, message):
    with pytest.raises(ImportError, match=message):
        get_obj_from_str(target)


@pytest.mark.parametrize("config, message", [({"params": {}}, "'params'"), ("some text", "'some text'"), (3, "not 3")])
def test_configs_without_target(config, message):
    with pytest.raises(ValueError, match=message):
        instantiate_from_config(config)


def test_default():
    assert default(0, 5) == 0 and default(None, 5) == 5 and default(None, lambda: 6) == 6


MISFITS = [
    ({"target": "torch.nn.Linear", "params": {"in_features": 3, "out_feature": 4}}, "'out_feature'"),
    ({"target": "torch.nn.Linear"}, "missing 2 required"),
]


@pytest.mark.parametrize("config, message", MISFITS)
def test_misspelt_keys_are_named(config, message):
    with pytest.raises(ValueError, match=rf"torch.nn.Linear does not fit: .*{message}"):
        instantiate_from_config(config)
    with pytest.raises(ImportError, match="5 is not a dotted path"):
        instantiate_from_config({"target": 5})
