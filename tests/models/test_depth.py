"""The depth-to-image model: what it concatenates, where depth comes from, training, files with and without MiDaS."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from omegaconf import OmegaConf

from ldm.checkpoint import Checkpoint, build_on_meta, fill_model, save_checkpoint
from ldm.models.diffusion.special_models import LatentDepth2ImageDiffusion
from ldm.util import instantiate_from_config
from tests.golden import REFERENCE, assert_agrees, filled, tensor
from tests.modules.test_midas import SMALL
from tests.tiny import tiny_config

QUICK = {"ddim_steps": 2, "plot_diffusion_rows": False, "plot_progressive_rows": False, "n_row": 1}


def depth_config(**changes):
    """`model:` section of a small depth-to-image model: latents 16x16, images 32x32."""
    estimator = {"target": "ldm.modules.midas.api.MiDaSInference", "params": {"config": SMALL}}
    config = tiny_config(conditioning_key="hybrid", depth_stage_config=estimator, **changes)
    config["params"]["unet_config"]["params"]["in_channels"] = 5
    return config | {"target": "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion"}


@pytest.fixture(scope="module")
def filled_model() -> LatentDepth2ImageDiffusion:
    model = filled(instantiate_from_config(depth_config()))
    model.depth_model.model.scratch["output_conv"][4].bias.data.fill_(1.0)  # or the last ReLU would leave little
    return model


@pytest.fixture
def model(filled_model) -> LatentDepth2ImageDiffusion:
    """The filled model, its own for a test."""
    model = build_on_meta(depth_config())
    fill_model(model, Checkpoint(REFERENCE / "depth.ckpt", filled_model.state_dict()))
    return model


@pytest.fixture(autouse=True)
def _small_pictures(monkeypatch) -> None:
    monkeypatch.setattr("ldm.modules.midas.api.SIDE", 64)  # 384 takes a second


def batch(**entries):
    return {"jpg": tensor("jpg", 2, 32, 32, 3).clamp(-1, 1), "txt": ["a red circle", "a blue square"], **entries}


def without_depth(model) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if not key.startswith("depth_model.")}


# ---- depth ----


@pytest.mark.parametrize("given", [(384, 384), (9, 13)])
def test_depth_is_prepared_as_in_diffusers(model, given):
    """StableDiffusionDepth2ImgPipeline.prepare_depth_map, for an image of 128x192 and a first stage of factor 8."""
    depth = 700.0 * tensor("depth", 2, *given) - 3.0
    pipeline = SimpleNamespace(vae_scale_factor=8)
    prepare = StableDiffusionDepth2ImgPipeline.prepare_depth_map
    wanted = prepare(pipeline, torch.zeros(2, 3, 128, 192), depth, 2, False, torch.float32, torch.device("cpu"))
    found = model.depth_condition(depth[:, None], (16, 24))
    assert_agrees(found, wanted, 1e-6)
    assert found.amin(dim=(1, 2, 3)).tolist() == [-1, -1] and found.amax(dim=(1, 2, 3)).tolist() == [1, 1]


def test_flat_depth_and_scale(model):
    assert model.depth_condition(torch.full((1, 1, 8, 8), 3.0), (4, 4)).eq(-1).all()
    depth = tensor("depth", 1, 1, 32, 32)
    assert_agrees(model.depth_condition(250.0 * depth + 7.0, (8, 8)), model.depth_condition(depth, (8, 8)), 1e-5)


def test_estimates_are_made_at_midas_size(model):
    depth = model.estimate_depth(tensor("image", 2, 3, 80, 120).clamp(-1, 1))
    assert depth.shape == (2, 1, 64, 96) and depth.dtype == torch.float32 and depth.std() > 0


def test_depth_of_a_batch(model):
    """From `midas_in`, images or depth itself, or else from the image to learn."""
    size = (16, 16)
    other = tensor("other", 2, 32, 32, 3).clamp(-1, 1)
    from_picture = model.concat_condition(batch(), size)
    from_other = model.concat_condition(batch(midas_in=other), size)
    assert from_picture.shape == (2, 1, *size) and not torch.equal(from_picture, from_other)
    assert torch.equal(from_picture, model.concat_condition(batch(midas_in=batch()["jpg"]), size))
    depth = tensor("depth", 2, 32, 32)
    given = model.concat_condition(batch(midas_in=depth), size)
    assert torch.equal(given, model.depth_condition(depth[:, None], size))
    assert torch.equal(given, model.concat_condition(batch(midas_in=depth[..., None]), size))


# ---- training ----


@pytest.mark.parametrize("trainable", [False, True])
def test_training_and_images_of_it(trainable):
    model = filled(instantiate_from_config(depth_config(cond_stage_trainable=trainable)))
    loss, _ = model.shared_step(batch())
    loss.backward()
    assert torch.isfinite(loss) and model.model.diffusion_model.input_blocks[0][0].weight.grad[:, 4].abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in model.depth_model.parameters())
    log = model.log_images(batch(), N=2, inpaint=False, unconditional_guidance_scale=2.0, **QUICK)
    assert {"samples", "samples_cfg_scale_2.00", "depth", "reconstruction"} <= log.keys()
    assert log["depth"].shape == (2, 3, 32, 32) and log["depth"].max() == 1


def test_the_estimator_is_never_in_training_mode():
    model = instantiate_from_config(depth_config()).train()
    assert model.training and not any(module.training for module in model.depth_model.modules())
    model.depth_model = None
    assert model.train().training


def test_starting_from_a_model_without_depth(tmp_path, caplog):
    """A 4-channel file: the depth channel starts at zero, and no depth is estimated by random weights."""
    path = save_checkpoint(tmp_path / "v2.ckpt", filled(instantiate_from_config(tiny_config())).state_dict())
    model = instantiate_from_config(depth_config(ckpt_path=str(path)))
    assert model.model.diffusion_model.input_blocks[0][0].weight[:, 4].eq(0).all()
    assert "has no weights to estimate depth" in caplog.text and model.depth_model is None
    assert torch.isfinite(model.shared_step(batch(midas_in=tensor("depth", 2, 32, 32)))[0])
    with pytest.raises(ValueError, match="no weights to estimate depth"):
        model.shared_step(batch())


def test_an_estimator_with_its_own_weights_stays(filled_model, tmp_path):
    path = save_checkpoint(tmp_path / "v2.ckpt", filled(instantiate_from_config(tiny_config())).state_dict())
    midas = tmp_path / "midas.pt"
    torch.save(filled_model.depth_model.model.state_dict(), midas)
    config = depth_config(ckpt_path=str(path), load_only_unet=True)
    config["params"]["depth_stage_config"]["params"]["path"] = str(midas)
    trained = instantiate_from_config(config)
    assert torch.isfinite(trained.shared_step(batch())[0])
    for model in (trained, build_on_meta(config)):
        if model is not trained:  # as for sampling: a file without the estimator leaves the one that there is
            fill_model(model, Checkpoint(path, without_depth(trained)))
        images = tensor("image", 1, 3, 64, 64).clamp(-1, 1)
        assert torch.equal(model.estimate_depth(images), filled_model.estimate_depth(images))


def test_one_entry_of_a_batch():
    with pytest.raises(ValueError, match="concat_keys names the one entry that depth comes from"):
        instantiate_from_config(depth_config(concat_keys=["midas_in", "mask"]))


# ---- files ----


def test_published_names_are_loaded_strictly(filled_model, model, caplog):
    assert "depth_model.model.pretrained.model.blocks.0.attn.qkv.weight" in filled_model.state_dict()
    caplog.set_level(logging.INFO)
    state = filled_model.state_dict() | {"depth_model.model.pretrained.model.head.bias": torch.ones(1000)}
    half = build_on_meta(depth_config(ckpt_path="away.ckpt", load_only_unet=True))
    report = fill_model(half, Checkpoint(REFERENCE / "depth.ckpt", state), dtype=torch.float16)
    assert not report.unexpected and report.ignored == ("depth_model.model.pretrained.model.head.bias",)
    assert half.depth_model.model.pretrained["model"].cls_token.dtype == torch.float16
    images = tensor("image", 1, 3, 64, 64).clamp(-1, 1)
    assert torch.equal(model.estimate_depth(images), filled_model.estimate_depth(images))
    state.pop("depth_model.model.scratch.output_conv.4.bias")
    with pytest.raises(ValueError, match="1 of .* weights are missing, e.g. depth_model"):
        fill_model(build_on_meta(depth_config()), Checkpoint(REFERENCE / "depth.ckpt", state))


def test_a_file_without_midas_takes_depth_from_an_image(filled_model):
    model = build_on_meta(depth_config())
    fill_model(model, Checkpoint(REFERENCE / "depth.ckpt", without_depth(filled_model)))
    depth = tensor("depth", 1, 1, 32, 32)
    assert torch.equal(model.depth_condition(depth, (16, 16)), filled_model.depth_condition(depth, (16, 16)))
    with pytest.raises(ValueError, match=r"no weights to estimate depth \(depth_model\.\*\): .* \(--depth\)"):
        model.estimate_depth(torch.zeros(1, 3, 64, 64))
    assert set(model.state_dict()) == set(without_depth(filled_model))


def test_the_public_config_is_built_without_memory():
    config = OmegaConf.to_container(
        OmegaConf.load(REFERENCE.parents[1] / "configs/stable-diffusion/v2-midas-inference.yaml")
    )["model"]
    params = config["params"] | {"cond_stage_config": "__is_unconditional__"}
    model = build_on_meta({"target": "ldm.models.diffusion.ddpm.LatentDepth2ImageDiffusion", "params": params})
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(key.startswith("depth_model.model.") for key in model.state_dict()) == 366
