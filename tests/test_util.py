"""Building from configs (targets, markers, moved names, mistakes), and the small published helpers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ldm import util
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


def test_helpers_for_tensors(capsys):
    images, maps, rows = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, 4), torch.arange(6.0).reshape(2, 3)
    assert [util.isimage(x) for x in (images, images[:, :1], maps, rows, "x")] == [True, True, False, False, False]
    assert [util.ismap(x) for x in (images, maps, rows, "x")] == [False, True, False, False]
    assert util.mean_flat(rows).tolist() == [1.0, 4.0] and util.mean_flat(images).shape == (2,)
    assert util.count_params(torch.nn.Linear(3, 4), verbose=True) == 16
    assert capsys.readouterr().out == "Linear has 0.00 M params.\n"
    assert util.exists(0) and not util.exists(None)
    assert util.autocast(lambda x, y=1: x + y)(2, y=3) == 5


def test_captions_as_images():
    texts = util.log_txt_as_img((64, 32), ["", "a red circle", ["a list", "of two"]], size=8)
    assert texts.shape == (3, 3, 32, 64) and texts.dtype == torch.float32
    assert bool((texts[0] == 1).all()) and texts.max() == 1 and -1 <= texts.min() < 0
    long = util.log_txt_as_img((64, 64), ["word " * 20])
    assert long[0, 0, 32:].min() < 1  # wrapped, not cut off at the right


def _double(part, worker_id=0):
    return part * 2 if isinstance(part, np.ndarray) else [(value * 2, worker_id) for value in part]


@pytest.mark.parametrize("processes", [True, False])
def test_parallel_data_prefetch(processes):
    data = np.arange(10).reshape(5, 2)
    doubled = util.parallel_data_prefetch(_double, data, 2, cpu_intensive=processes)
    assert np.array_equal(doubled, data * 2)
    found = util.parallel_data_prefetch(_double, {"a": 1, "b": 2, "c": 3}, 2, "list", processes, use_worker_id=True)
    assert found == [(2, 0), (4, 0), (6, 1)]
    with pytest.raises(TypeError, match="unsupported operand"):
        util.parallel_data_prefetch(_double, [None, None], 2, "list", processes)
    for given, workers, kind in (([1], 0, "list"), ([1], 1, "tuple"), (data, 1, "list")):
        with pytest.raises(ValueError, match="target_data_type|cannot split"):
            util.parallel_data_prefetch(_double, given, workers, kind, processes)


def test_another_distribution_of_ldm(monkeypatch, caplog):
    util.warn_about_other_distributions.cache_clear()
    util.warn_about_other_distributions()
    assert not caplog.records
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"stable-diffusion-sdkit": "2.1.5"}[name])
    util.warn_about_other_distributions.cache_clear()
    for _ in range(2):
        util.warn_about_other_distributions()
    (record,) = caplog.records
    assert "stable-diffusion-sdkit 2.1.5" in record.getMessage() and "pip uninstall" in record.getMessage()
