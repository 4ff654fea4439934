"""Networks with more input channels than their checkpoint: they start unchanged, and train from there."""

from __future__ import annotations

import logging

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoint import build_on_meta, save_checkpoint
from ldm.data.masks import MaskedImages
from ldm.models.diffusion.special_models import LatentFinetuneDiffusion, LatentInpaintDiffusion
from ldm.util import instantiate_from_config
from tests.golden import assert_agrees, filled, tensor
from tests.test_own_pictures import CONFIGS, config, photos, shrink  # noqa: F401
from tests.tiny import tiny_config
from tests.training import toys

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
AVERAGE = "model_ema.diffusion_modelinput_blocks00weight"
FINETUNE = "stable-diffusion/v1-inpainting-finetune.yaml"


def inpainting(channels: int = 9, **changes):
    """`model:` section of the small model with a mask and a masked image beside the latent."""
    config = tiny_config(conditioning_key="hybrid", **changes)
    config["params"]["unet_config"]["params"]["in_channels"] = channels
    return config | {"target": "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"}


@pytest.fixture(scope="module")
def plain():
    """The model of four channels, its averages unlike its weights."""
    model = filled(instantiate_from_config(tiny_config(use_ema=True)))
    with torch.no_grad():
        for name in model.model_ema.m_name2s_name.values():
            model.model_ema.get_buffer(name).mul_(0.9)
    return model


@pytest.fixture
def file(plain, tmp_path):
    return save_checkpoint(tmp_path / "v1.ckpt", plain.state_dict())


def answers(model, concat=None):
    """What the network makes of one noisy latent, with `concat` (2, 5, 16, 16) beside it."""
    x, context = tensor("x", 2, 4, 16, 16), tensor("context", 2, 12, 24)
    cond = {"c_concat": [concat], "c_crossattn": [context]} if concat is not None else context
    with torch.no_grad():
        return model.apply_model(x, torch.tensor([981, 1]), cond)


@pytest.mark.parametrize("only_unet", [False, True])
def test_a_widened_model_begins_as_it_was(plain, file, caplog, only_unet):
    """Whatever the mask and the masked image; weights and averages."""
    caplog.set_level(logging.INFO)
    model = instantiate_from_config(inpainting(use_ema=True, ckpt_path=str(file), load_only_unet=only_unet)).eval()
    for concat in (torch.ones(2, 5, 16, 16), 10 * tensor("concat", 2, 5, 16, 16)):
        assert_agrees(answers(model, concat), answers(plain), 1e-6)
    if not only_unet:  # which takes weights alone
        with model.ema_scope(), plain.ema_scope():
            assert_agrees(answers(model, concat), answers(plain), 1e-6)
    assert f"{FIRST.removeprefix('model.' if only_unet else '')} (4 of 9 are in the file)" in caplog.text


def test_averages_alone_and_weights_alone(plain, tmp_path):
    state = plain.state_dict()
    averages = {key: value for key, value in state.items() if not key.startswith("model.")}
    weights = {key: value for key, value in state.items() if not key.startswith("model_ema.")}
    for given, wanted in ((averages, state[AVERAGE]), (weights, state[FIRST])):
        path = save_checkpoint(tmp_path / "part.ckpt", given, overwrite=True)
        model = instantiate_from_config(inpainting(use_ema=True, ckpt_path=str(path)))
        for weight in (model.state_dict()[FIRST], model.state_dict()[AVERAGE]):
            assert torch.equal(weight[:, :4], wanted) and weight[:, 4:].eq(0).all()


def test_keep_finetune_dims(plain, tmp_path):
    """A depth-to-image file's fifth channel is no mask."""
    weight = torch.cat([plain.state_dict()[FIRST], torch.ones(32, 1, 3, 3)], dim=1)
    path = save_checkpoint(tmp_path / "depth.ckpt", plain.state_dict() | {FIRST: weight})
    for keep in (4, 5):
        model = instantiate_from_config(inpainting(ckpt_path=str(path), keep_finetune_dims=keep))
        assert model.state_dict()[FIRST][:, 4].eq(keep - 4).all()


def test_no_more_channels_are_taken_than_there_are(plain, file):
    model = instantiate_from_config(inpainting(ckpt_path=str(file), keep_finetune_dims=6))
    weight = model.state_dict()[FIRST]
    assert torch.equal(weight[:, :4], plain.state_dict()[FIRST]) and weight[:, 4:].eq(0).all()


def test_files_with_all_channels_load_as_they_are(tmp_path):
    given = filled(instantiate_from_config(inpainting())).state_dict()
    path = save_checkpoint(tmp_path / "inpainting.ckpt", given)
    model = instantiate_from_config(inpainting(ckpt_path=str(path)))
    assert all(torch.equal(value, given[key]) for key, value in model.state_dict().items() if key in given)


def test_no_keys_no_widening(file, caplog):
    model = instantiate_from_config(inpainting(ckpt_path=str(file), finetune_keys=None))
    assert model.state_dict()[FIRST][:, 4:].abs().sum() > 0
    assert f"{FIRST} (32x4x3x3 in the file, 32x9x3x3 here)" in caplog.text


def test_any_entries_may_be_concatenated():
    params = inpainting(channels=6)["params"]
    model = LatentFinetuneDiffusion(concat_keys=["edges", "mask"], c_concat_log_start=0, c_concat_log_end=1, **params)
    batch = {"jpg": torch.rand(2, 32, 32, 3), "txt": ["a", "b"], "mask": torch.ones(2, 32, 32, 1)}
    batch["edges"] = torch.zeros(2, 32, 32)
    _, cond = model.get_input(batch, "jpg", bs=1)
    assert cond["c_concat"][0].shape == (1, 2, 16, 16) and cond["c_concat"][0].mean(dim=(0, 2, 3)).tolist() == [0, 1]
    assert torch.isfinite(model.shared_step(batch)[0])


@torch.no_grad()
def test_a_concatenated_latent_is_shown():
    params = inpainting()["params"] | {"c_concat_log_start": 1, "c_concat_log_end": 5}
    model = filled(LatentInpaintDiffusion(**params))
    batch = {"jpg": tensor("jpg", 1, 32, 32, 3).clamp(-1, 1), "txt": ["a red circle"], "mask": torch.zeros(1, 32, 32)}
    batch["masked_image"] = tensor("masked", 1, 32, 32, 3).clamp(-1, 1)
    torch.manual_seed(3)
    _, cond, log = model._log_inputs(batch, 1)
    assert torch.equal(log["c_concat_decoded"], model.decode_first_stage(cond["c_concat"][0][:, 1:]))
    assert torch.equal(log["masked_image"], batch["masked_image"].movedim(-1, 1))
    model.c_concat_log_start = model.c_concat_log_end = None
    assert "c_concat_decoded" not in model._log_inputs(batch, 1)[2]


# ---- training ----


def test_training_from_a_model_of_four_channels(tmp_path):
    """scripts/train.py: from the plain model's file, on images with random masks."""
    model = toys.diffusion(conditioning_key="hybrid")
    path = save_checkpoint(tmp_path / "v1.ckpt", filled(instantiate_from_config(toys.diffusion())).state_dict())
    model["target"] = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    model["params"]["unet_config"]["params"]["in_channels"] = 9
    content = toys.config(model, length=4)
    masked = {"dataset": toys.pictures(4), "image_key": "jpg"}
    content["data"]["params"]["train"] = {"target": "ldm.data.masks.MaskedImages", "params": masked}
    code, run = toys.start(tmp_path, content, "--max_steps", 2, f"model.params.ckpt_path={path}")
    assert code == 0
    trained = toys.weights(run)
    assert trained[FIRST].shape[1] == 9 and trained[FIRST][:, 4:].abs().amax(dim=(0, 2, 3)).gt(0).all()
    assert trained[AVERAGE][:, 4:].abs().sum() > 0


def test_the_config_is_of_the_public_inpainting_model():
    settings = config(FINETUNE, pictures="photos", model={"params": {"ckpt_path": "v1.ckpt"}})
    public = OmegaConf.to_container(OmegaConf.load(CONFIGS / "stable-diffusion/v1-inpainting-inference.yaml"))
    same = ("unet_config", "first_stage_config", "cond_stage_config", "linear_start", "linear_end", "scale_factor")
    assert all(settings["model"]["params"][name] == public["model"]["params"][name] for name in same)
    model = build_on_meta(settings["model"])
    assert isinstance(model, LatentInpaintDiffusion) and model.finetune_keys == (FIRST, AVERAGE)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 859_535_364


def test_a_small_version_of_it_trains_on_a_folder(photos):  # noqa: F811
    settings = config(FINETUNE, pictures=str(photos), model={"params": {"ckpt_path": "v1.ckpt"}})
    params, data = settings["model"]["params"], settings["data"]["params"]["train"]
    params["unet_config"]["params"]["context_dim"] = 16
    shrink(params)
    data["params"]["dataset"]["params"]["size"] = 32
    dataset = instantiate_from_config(data)
    assert isinstance(dataset, MaskedImages)
    batch = torch.utils.data.default_collate([dataset[i] for i in range(2)])
    model = filled(instantiate_from_config(settings["model"])).train()
    model.shared_step(batch)[0].backward()
    assert model.get_parameter(FIRST).grad[:, 4:].abs().sum() > 0
