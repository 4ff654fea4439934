"""Pictures of training: which there are, of what shape, with what weights."""

from __future__ import annotations

import pytest
import torch

from ldm.images import text_to_tensor
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.image_logs import image_row
from ldm.models.diffusion.special_models import LatentInpaintDiffusion
from tests.golden import golden_configs
from tests.models.test_diffusion_training import Point, point
from tests.models.test_training import batch, build
from tests.tiny import tiny_config

QUICK = {"ddim_steps": 2, "plot_progressive_rows": False}
IMAGE_SHAPE = (2, 3, 32, 32)


def shapes(log: dict) -> dict:
    assert all(torch.isfinite(image).all() for image in log.values())
    return {name: tuple(image.shape) for name, image in log.items()}


def test_every_image_of_a_latent_model():
    model = build(use_ema=True, timesteps=5, log_every_t=2)
    log = model.log_images(
        batch(), N=2, n_row=1, ddim_steps=2, plot_denoise_rows=True, unconditional_guidance_scale=3.0
    )
    found = shapes(log)
    assert found.pop("diffusion_row") == (1, 3, 32, 3 * 32)  # at 0, 2 and 4
    assert found.pop("denoise_row")[2] == found.pop("progressive_row")[2] == 32
    names = {"mask", "inputs", "reconstruction", "conditioning", "samples", "samples_cfg_scale_3.00"}
    assert found == dict.fromkeys(names | {"samples_inpainting", "samples_outpainting"}, IMAGE_SHAPE)


def test_only_what_was_asked_for():
    model = build()
    assert set(model.log_images(batch(), N=1, sample=False, return_keys=["inputs", "nothing"], **QUICK)) == {"inputs"}
    few = model.log_images(batch(), N=1, sample=False, plot_diffusion_rows=False, plot_progressive_rows=False)
    assert shapes(few) == dict.fromkeys(("inputs", "reconstruction", "conditioning"), (1, *IMAGE_SHAPE[1:]))


def test_samples_of_cached_batches_and_trained_encoders():
    model = build(ucg_training={"txt": {"p": 0.1, "val": "a"}})
    cached = {"moments": torch.randn(2, 8, 16, 16), "context": torch.randn(2, 12, 24)}
    found = shapes(model.log_images(cached, inpaint=False, unconditional_guidance_scale=2.0, **QUICK))
    assert set(found) == {"reconstruction", "diffusion_row", "samples", "samples_cfg_scale_2.00"}
    trained = build(cond_stage_trainable=True)
    assert "samples" in trained.log_images(batch(), inpaint=False, unconditional_guidance_scale=2.0, **QUICK)
    assert trained.training  # as it was


def test_labels_for_no_condition():
    model = build()
    empty = model.get_learned_conditioning([""])
    for label in (None, "", [""]):  # the last as public configs have it
        assert torch.equal(model.get_unconditional_conditioning(2, label), empty.expand(2, -1, -1))
    with pytest.raises(ValueError, match="one label for no txt, not"):
        model.get_unconditional_conditioning(2, ["a", "red"])
    assert model.to("meta").get_unconditional_conditioning(2, "").is_meta  # where the model is now


@pytest.mark.parametrize("steps", [0, 200, None])
def test_step_counts_that_do_not_fit_are_clamped(steps):
    log = point(timesteps=4).log_images({"image": torch.rand(1, 8, 8, 4)}, ddim_steps=steps)
    assert torch.isfinite(log["samples"]).all() and log["progressive_row"].shape == (1, 4, 8, 8 * 2)


def test_codebooks_give_another_image():
    vq = {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {
            "ddconfig": golden_configs("diffusion")["vq"],
            "lossconfig": {"target": "torch.nn.Identity"},
            "n_embed": 16,
            "embed_dim": 3,
        },
    }
    model = point(
        first_stage_config=vq,
        channels=3,
        unet_config={"target": f"{Point.__module__}.Point", "params": {"channels": 3}},
    )
    log = model.log_images({"image": torch.rand(2, 16, 16, 3)}, inpaint=False, **QUICK)
    assert {"samples", "samples_x0_quantized"} <= set(shapes(log))


def test_samples_use_the_averages():
    model = build(use_ema=True, cond_stage_trainable=True, ema_cond_stage=True)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.fill_(float("nan"))
    log = model.log_images(batch(), inpaint=False, **QUICK)
    assert torch.isfinite(log["samples"]).all()
    log = model.log_images(batch(), inpaint=False, use_ema_scope=False, **QUICK)
    assert not torch.isfinite(log["samples"]).all()


def test_pixels():
    model = DDPM(
        {"target": f"{Point.__module__}.Point", "params": {"channels": 3}}, timesteps=10, image_size=8, log_every_t=5
    )
    found = shapes(model.log_images({"image": torch.rand(4, 8, 8, 3)}, N=3))
    assert found["inputs"] == found["samples"] == (3, 3, 8, 8) and found["diffusion_row"] == (1, 3, 16, 24)


@pytest.mark.parametrize("trainable", [False, True])
def test_inpainting_models(trainable):
    config = tiny_config(conditioning_key="hybrid", cond_stage_trainable=trainable)
    config["params"]["unet_config"]["params"]["in_channels"] = 9
    model = LatentInpaintDiffusion(**config["params"])
    images = batch() | {"mask": torch.ones(2, 32, 32, 1), "masked_image": batch()["jpg"]}
    log = model.log_images(images, inpaint=False, unconditional_guidance_scale=2.0, **QUICK)
    assert {"samples", "samples_cfg_scale_2.00"} <= set(shapes(log))
    assert torch.isfinite(model.shared_step(images)[0])


def test_rows_run_from_left_to_right():
    panels = [torch.full((2, 3, 4, 5), float(i)) for i in range(3)]
    image = image_row(panels)
    assert image.shape == (1, 3, 8, 15)
    assert image[0, 0, 0].tolist() == [0.0] * 5 + [1.0] * 5 + [2.0] * 5


def test_captions_as_images():
    images = text_to_tensor(["a red circle", "", "a very long caption " * 30], 64, 64)
    assert images.shape == (3, 3, 64, 64) and images[1].eq(1).all()
    assert 0 < images[0].lt(0).sum() < images[2].lt(0).sum()
