"""What weights say about their config."""

from __future__ import annotations

import logging

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import families
from ldm.inference import load_first_stage, load_model, read_config, resolve_size
from ldm.inference.loading import predicts
from tests.tiny import tiny_config, write_tiny

BUNDLED = "models/ldm/shapes64/"


@pytest.fixture
def oracle(monkeypatch):
    """Makes the networks of tiny models predict noise perfectly where there is nothing but noise."""
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    monkeypatch.setattr(UNetModel, "forward", lambda self, x, t, context=None, y=None: x + 0.1)


def test_the_trained_model_is_seen_to_predict_v():
    assert predicts(load_model(ckpt=BUNDLED + "model.ckpt")) == "v"


def test_a_model_of_v_under_a_config_of_noise_is_said(tmp_path, caplog):
    config = read_config(BUNDLED + "config.yaml")
    config["model"]["params"].update({"parameterization": "eps", "rescale_betas_zero_snr": False})
    OmegaConf.save(config, tmp_path / "eps.yaml")
    caplog.set_level(logging.WARNING)
    load_model(tmp_path / "eps.yaml", BUNDLED + "model.ckpt")
    assert "seems to use v-prediction" in caplog.text and "eps.yaml says parameterization: eps" in caplog.text


def test_a_model_of_noise_under_a_config_of_v_is_said(tmp_path, caplog, oracle):
    path = write_tiny(tmp_path, parameterization="v")
    load_model(ckpt=path)
    assert "seems to use eps-prediction" in caplog.text and "parameterization: v" in caplog.text


def test_a_right_config_is_not_talked_about(tmp_path, caplog, oracle):
    load_model(ckpt=write_tiny(tmp_path))
    assert "looks like" not in caplog.text


@pytest.mark.parametrize("first", ["eps", "v"])
def test_of_the_configs_of_a_family_the_network_chooses(tmp_path, monkeypatch, caplog, oracle, first):
    """Stable Diffusion v2 has two configs, which shapes cannot tell apart."""
    path = write_tiny(tmp_path)
    places = []
    for kind in (first, {"eps": "v", "v": "eps"}[first]):
        places.append(str(tmp_path / f"{kind}.yaml"))
        OmegaConf.save({"model": tiny_config(parameterization=kind)}, places[-1])
    family = families.Family("a family of two", tuple(places), {"unet": True})
    monkeypatch.setattr(families, "FAMILIES", (family,))
    model = load_model(ckpt=path)
    assert model.parameterization == "eps" and "seems to use" not in caplog.text
    assert load_model(str(tmp_path / "v.yaml"), path).parameterization == "v"  # the user's word counts
    assert "seems to use eps-prediction" in caplog.text


def test_of_a_family_with_one_config_the_first_step_tells(tmp_path, monkeypatch, caplog, oracle):
    """The network is not asked while it loads; a model of noise under a config of v is said once, when it draws."""
    path, place = write_tiny(tmp_path), str(tmp_path / "only.yaml")
    OmegaConf.save({"model": tiny_config(parameterization="v")}, place)
    (tmp_path / "config.yaml").unlink(missing_ok=True)
    monkeypatch.setattr(families, "FAMILIES", (families.Family("a family of one", (place,), {"unet": True}),))
    model = load_model(ckpt=path)
    assert "looks like" not in caplog.text
    x, text = torch.randn(1, model.channels, 16, 16), model.get_learned_conditioning(["red"])
    for _ in range(2):
        model.apply_model(x, torch.full((1,), model.num_timesteps - 1), text)
    assert caplog.text.count("seems to use eps-prediction") == 1 and "only.yaml says parameterization: v" in caplog.text
    caplog.clear()
    load_model(ckpt=path).apply_model(x, torch.full((1,), model.num_timesteps // 2), text)  # too late to tell
    assert "looks like" not in caplog.text


def test_asking_leaves_the_random_numbers_alone(tmp_path):
    path = write_tiny(tmp_path)
    state = torch.get_rng_state()
    load_model(ckpt=path)
    assert torch.get_rng_state().equal(state)


def test_a_first_stage_comes_from_a_whole_model_or_its_own_file(tmp_path):
    whole = load_first_stage(ckpt=write_tiny(tmp_path))
    assert whole.downsampling_factor == 2 and not whole.training
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_first_stage(ckpt=tmp_path / "none.ckpt")


def test_a_config_may_name_the_size_to_draw_at(tmp_path):
    path = write_tiny(tmp_path)
    config = read_config(tmp_path / "config.yaml")
    OmegaConf.save({**config, "sampling": {"size": 48}}, tmp_path / "config.yaml")
    model = load_model(ckpt=path)
    assert resolve_size(model) == (48, 48) and resolve_size(model, 32) == (32, 48)
    OmegaConf.save({**config, "sampling": {"size": "large"}}, tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="`sampling:` has size: 'large'"):
        load_model(ckpt=path)
