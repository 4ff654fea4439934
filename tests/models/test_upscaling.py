"""The upscaler: its golden, what a batch becomes, training for a moment, images of training."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.special_models import LatentUpscaleDiffusion
from ldm.modules.diffusionmodules.upscaling import ImageConcatWithNoiseAugmentation
from tests.golden import assert_agrees, golden_configs, goldens, latent_diffusion, tensor
from tests.tiny import TEXT

LOW_SCALE = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"noise_schedule_config": {"linear_start": 1e-4, "linear_end": 2e-2}, "max_noise_level": 100},
}
IMAGE_SHAPE = (2, 3, 32, 32)


def build(**changes) -> LatentUpscaleDiffusion:
    """The golden model of this kind, with a text encoder; its latents are half as large as images."""
    torch.manual_seed(0)
    params = copy.deepcopy(golden_configs("sd2")["hybrid_adm"]["params"]) | {"cond_stage_config": TEXT}
    model = LatentUpscaleDiffusion(**params | {"low_scale_config": LOW_SCALE, "low_scale_key": "lr"} | changes)
    model.learning_rate = 1e-3
    return model


def batch(size: int = 2) -> dict:
    images = torch.rand(size, 3, 32, 32) * 2 - 1
    small = F.interpolate(images, scale_factor=0.5, mode="area")
    captions = ["a red circle", "a blue square"][:size]
    return {"jpg": images.movedim(1, -1), "lr": small.movedim(1, -1), "txt": captions}


def test_golden():
    model = latent_diffusion(golden_configs("sd2")["hybrid_adm"]["params"])
    given = {"c_concat": [tensor("concat3", 2, 3, 16, 16)], "c_adm": torch.tensor([20, 20])}
    x, _ = DDIMSampler(model).sample(
        10,
        2,
        (4, 16, 16),
        {**given, "c_crossattn": [tensor("c", 2, 5, 24)]},
        unconditional_conditioning={**given, "c_crossattn": [tensor("uc", 2, 5, 24)]},
        unconditional_guidance_scale=9.0,
        x_T=tensor("x_T", 2, 4, 16, 16),
        verbose=False,
    )
    assert_agrees(x, goldens("sd2")["hybrid_adm.ddim.10"])


def test_small_images_as_the_network_takes_them():
    model, x = build(), torch.randn(2, 3, 16, 16)
    for given, levels in ((7, [7, 7]), (torch.tensor([3, 99]), [3, 99])):
        torch.manual_seed(1)
        concat, level = model.low_scale_condition(x, given)
        assert level.tolist() == levels and level.dtype == torch.int64
        torch.manual_seed(1)
        assert torch.equal(concat, model.low_scale_model.q_sample(x, level))
    torch.manual_seed(1)
    found = model.low_scale_condition(x)  # the draws of the public code
    torch.manual_seed(1)
    wanted = ImageConcatWithNoiseAugmentation(**LOW_SCALE["params"])(x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert model.max_noise_level == 100
    with pytest.raises(ValueError, match="0 to 100, not 101"):
        model.low_scale_condition(x, 101)


def test_a_batch_becomes_latents_and_condition():
    model = build(noise_level_key="level")
    z, c = model.get_input(batch() | {"level": torch.tensor([0, 50])}, "jpg", bs=1)
    assert z.shape == (1, 4, 16, 16) and c["c_concat"][0].shape == (1, 3, 16, 16)
    assert c["c_adm"].tolist() == [0] and c["c_crossattn"][0].shape == (1, 12, 24)
    with pytest.raises(ValueError, match="'lr' is 32x32.*large as the latent, 16x16"):
        build().get_input({**batch(), "lr": batch()["jpg"]}, "jpg")
    with pytest.raises(ValueError, match="batches have no 'lr'"):
        build().get_input({"jpg": batch()["jpg"], "txt": ["a", "a"]}, "jpg")


@pytest.mark.parametrize("trainable", [False, True])
def test_training_for_a_moment(tmp_path, trainable):
    model = build(cond_stage_trainable=trainable, ucg_training={"txt": {"p": 0.5}})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader([batch()] * 2, batch_size=None))
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("model.diffusion_model.label_emb") for name in moved)
    assert any(name.startswith("cond_stage_model") for name in moved) == trainable
    assert not any(name.startswith(("first_stage_model", "low_scale_model")) for name in moved)
    assert all(torch.isfinite(value).all() for value in after.values() if value.is_floating_point())
    gradients = [p.grad for p in model.model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize(
    "low_scale", [LOW_SCALE, {"target": LOW_SCALE["target"].rpartition(".")[0] + ".SimpleImageConcat"}]
)
def test_images_of_training(low_scale):
    model = build(low_scale_config=low_scale, timesteps=5, log_every_t=2)
    log = model.log_images(batch(), ddim_steps=2, unconditional_guidance_scale=3.0)
    names = {"inputs", "reconstruction", "conditioning", "low_scale", "samples", "samples_cfg_scale_3.00"}
    names |= {"samples_inpainting", "samples_outpainting", "mask"}
    assert {name for name, image in log.items() if tuple(image.shape) == IMAGE_SHAPE} == names
    assert all(torch.isfinite(image).all() for image in log.values()) and "progressive_row" in log
