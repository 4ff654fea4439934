"""The configs for one's own pictures: they fit their classes, and a small version of each trains on a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import default_collate

from ldm.checkpoint import build_on_meta
from ldm.data.cache import ensure_caches
from ldm.data.folder import ImageFolder
from ldm.util import instantiate_from_config
from tests.golden import filled

CONFIGS = Path(__file__).parent.parent / "configs"
FIRST_STAGE = "autoencoder/folder-kl-f8.yaml"
TEXT = "latent-diffusion/folder-256.yaml"
UNCONDITIONAL = "latent-diffusion/folder-256-unconditional.yaml"
FINETUNE = "stable-diffusion/v1-finetune.yaml"
FULL = "stable-diffusion/v1-finetune-full.yaml"
ALL = [(FIRST_STAGE,), (TEXT,), (TEXT, UNCONDITIONAL), (FINETUNE,), (FINETUNE, FULL)]


def config(*names: str, **given: str) -> dict:
    """The configs merged and `given` on top, as the trainer does it."""
    merged = OmegaConf.merge(*(OmegaConf.load(CONFIGS / name) for name in names), given)
    return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)


def ready(*names: str, pictures: object = "photos") -> dict:
    given = {"pictures": str(pictures)}
    if TEXT in names:
        given["first_stage"] = "first.ckpt"
    if FINETUNE in names:
        given["model"] = {"params": {"ckpt_path": "v1.ckpt"}}
    return config(*names, **given)


@pytest.fixture
def photos(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (36, 48, 3), np.uint8)).save(tmp_path / f"photos/{i}.jpg")
        (tmp_path / f"photos/{i}.txt").write_text("a photo of noise")
    return tmp_path / "photos"


@pytest.mark.parametrize("names", ALL)
def test_models_fit_their_configs(names) -> None:
    model = build_on_meta(ready(*names)["model"])
    assert any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("names", ALL)
def test_data_fits_its_configs(names, photos) -> None:
    sections = ready(*names, pictures=photos)["data"]["params"]
    train = sections["train"]
    assert ready(*names)["data"]["target"] == "main.DataModuleFromConfig"
    dataset = instantiate_from_config(train["params"].get("dataset", train))
    assert dataset[0]["image"].shape == (512, 512, 3) if FINETUNE in names else (256, 256, 3)
    if "validation" in sections:
        assert (len(dataset), len(instantiate_from_config(sections["validation"]))) == (3, 1)


def test_the_pair_fits_together() -> None:
    first, second = build_on_meta(ready(FIRST_STAGE)["model"]), build_on_meta(ready(TEXT)["model"])
    weights = {key: value.shape for key, value in first.state_dict().items() if not key.startswith("loss.")}
    assert weights == {key: value.shape for key, value in second.first_stage_model.state_dict().items()}
    assert second.latent_size(256, 256) == (second.image_size, second.image_size)


def test_fine_tuning_is_of_the_public_v1_and_trains_the_attention_to_text_alone() -> None:
    settings = ready(FINETUNE)
    public = OmegaConf.to_container(OmegaConf.load(CONFIGS / "stable-diffusion/v1-inference.yaml"))
    for part in (
        "unet_config",
        "first_stage_config",
        "cond_stage_config",
        "linear_start",
        "linear_end",
        "scale_factor",
    ):
        assert settings["model"]["params"][part] == public["model"]["params"][part]
    model = build_on_meta(settings["model"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(".attn2." in name for name in trained) and len(trained) == 16 * 5
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 43_962_560
    whole = build_on_meta(ready(FINETUNE, FULL)["model"])
    assert sum(p.numel() for p in whole.parameters() if p.requires_grad) == 859_520_964


def shrink(params: dict) -> None:
    """The same model of a thousandth of the size, for pictures of 32 pixels."""
    unet, first_stage = params["unet_config"]["params"], params["first_stage_config"]["params"]
    unet |= {"model_channels": 32, "channel_mult": [1, 1], "attention_resolutions": [1], "num_res_blocks": 1}
    first_stage["ddconfig"] |= {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    first_stage.pop("ckpt_path", None)
    params.pop("ckpt_path", None)
    params["image_size"] = 4
    if isinstance(params["cond_stage_config"], dict):
        tower = {"hidden_size": unet["context_dim"], "num_hidden_layers": 1, "num_attention_heads": 2}
        tower |= {"intermediate_size": 32}
        params["cond_stage_config"]["params"] = {**(params["cond_stage_config"].get("params") or {}), "config": tower}


@pytest.mark.parametrize("names", ALL[1:])
def test_a_small_version_trains_on_a_folder(names, photos, tmp_path) -> None:
    settings = ready(*names, pictures=photos)
    settings["model"]["params"]["unet_config"]["params"]["context_dim"] = None if UNCONDITIONAL in names else 16
    shrink(settings["model"]["params"])
    settings["model"]["params"].pop("scheduler_config", None)  # its first step is too small to be seen
    model = filled(instantiate_from_config(settings["model"])).train()
    model.learning_rate = 1e-3
    train = settings["data"]["params"]["train"]
    if FINETUNE in names:
        train["params"]["folder"] = str(tmp_path / "cache")
        train["params"]["dataset"]["params"]["size"] = 32
        ensure_caches(model, settings["data"])
    else:
        train["params"]["size"] = 32
    dataset = instantiate_from_config(train)
    if FINETUNE in names:
        dataset.check(model)
    batch = default_collate([dataset[i] for i in range(2)])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.shared_step(batch)[0].backward()
    optimizer = model.configure_optimizers()
    (optimizer[0][0] if isinstance(optimizer, tuple) else optimizer).step()
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == ({"model", "cond_stage_model"} if names == (TEXT,) else {"model"})


def test_captions_are_needed_by_the_text_config_alone(photos) -> None:
    (photos / "0.txt").unlink()
    with pytest.raises(ValueError, match="1 of 4 images .* have no caption"):
        ImageFolder(**ready(TEXT, pictures=photos)["data"]["params"]["train"]["params"])
    ImageFolder(**ready(TEXT, UNCONDITIONAL, pictures=photos)["data"]["params"]["train"]["params"])
