"""A v1 checkpoint in Lightning 1.x's layout, through `load_model`: small, and (slow) in its full size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from ldm.checkpoint import build_on_meta
from ldm.inference import load_model
from tests.checkpoint.test_families import ROOT
from tests.lightning1 import save_lightning1
from tests.reference.fill import fill, values

V1 = ROOT / "configs/stable-diffusion/v1-inference.yaml"


def small_v1() -> DictConfig:
    """The v1 config with everything narrow."""
    config = OmegaConf.load(V1)
    params = config.model.params
    params.unet_config.params.update(model_channels=32, context_dim=32)
    params.first_stage_config.params.ddconfig.ch = 32
    tower = {"vocab_size": 49408, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"intermediate_size": 64, "max_position_embeddings": 77}
    params.cond_stage_config.params = {"config": tower}
    return config


def write_v1(config: DictConfig, path: Path) -> list[str]:
    """A file for `config` with deterministic weights; its keys."""
    state = {
        key: torch.empty_like(value, device="cpu") if value.is_meta else value
        for key, value in build_on_meta(config.model).state_dict().items()
    }
    fill(state)
    save_lightning1(path, state)
    return list(state)


def check_loaded(model: torch.nn.Module, keys: list[str], path: Path) -> None:
    state = model.state_dict()
    assert set(state) == set(keys)
    assert not [key for key, value in state.items() if value.is_meta or value.device.type != "cpu"]
    for key in [key for key in keys if key.endswith(("time_embed.0.weight", "layers.1.mlp.fc1.bias", "conv_out.bias"))]:
        assert torch.equal(state[key], torch.from_numpy(values(key, tuple(state[key].shape)))), key
    if Path("/proc/self/maps").exists():
        assert str(path) in Path("/proc/self/maps").read_text()  # nothing was copied


def test_small_v1_file(tmp_path):
    config = small_v1()
    OmegaConf.save(config, tmp_path / "small.yaml")
    keys = write_v1(config, tmp_path / "model.ckpt")
    model = load_model(tmp_path / "small.yaml", tmp_path / "model.ckpt", device="cpu")
    check_loaded(model, keys, tmp_path / "model.ckpt")
    assert not model.training


@pytest.mark.slow
def test_full_size_v1_file(tmp_path):
    path = tmp_path / "model.ckpt"
    try:
        keys = write_v1(OmegaConf.load(V1), path)
        assert len(keys) == 1143
        check_loaded(load_model(ckpt=path, device="cpu"), keys, path)
    finally:
        path.unlink(missing_ok=True)  # pytest keeps its folders, and this is 4 GB
