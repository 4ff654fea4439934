"""The parts of training that are here already: batches, what is trained, a few steps under Lightning."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from ldm.checkpoint import save_checkpoint
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage
from ldm.models.diffusion.ddpm import DiffusionWrapper, LatentDiffusion, image_sides
from ldm.models.diffusion.special_models import LatentInpaintDiffusion
from ldm.util import instantiate_from_config
from tests.golden import golden_configs
from tests.reference.fill import fill
from tests.tiny import tiny_config

KL = golden_configs("diffusion")["kl"]
NO_LOSS = {"target": "torch.nn.Identity"}


def batch(size: int = 2) -> dict:
    return {"jpg": torch.rand(size, 32, 32, 3) * 2 - 1, "txt": ["a red circle", "a blue square"][:size]}


def build(**changes) -> LatentDiffusion:
    torch.manual_seed(0)
    model = instantiate_from_config(tiny_config(**changes))
    model.learning_rate = 1e-3
    return model


def test_only_what_is_to_be_trained_is(tmp_path):
    model = build(cond_stage_trainable=True, use_ema=True)
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
    trainer.fit(model, torch.utils.data.DataLoader([batch(2)] * 2, batch_size=None))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert not any(name.startswith("first_stage_model") for name in moved)
    assert any(name.startswith("model.diffusion_model") for name in moved)
    assert any(name.startswith("cond_stage_model") for name in moved)
    assert any(name.startswith("model_ema") for name in moved) and model.model_ema.num_updates == 2


def test_frozen_stages_stay_in_evaluation_mode():
    model = build().train()
    assert model.model.training and not model.first_stage_model.training and not model.cond_stage_model.training
    assert not any(p.requires_grad for p in model.cond_stage_model.parameters())
    assert build(cond_stage_trainable=True).train().cond_stage_model.training


def test_a_batch_becomes_latents_and_condition():
    model = build()
    z, c = model.get_input(batch(), "jpg")
    assert z.shape == (2, 4, 16, 16) and c.shape == (2, 12, 24)
    trainable = build(cond_stage_trainable=True)
    assert trainable.get_input(batch(), "jpg", bs=1)[1] == ["a red circle"]
    loss, parts = model.shared_step(batch())
    assert loss.ndim == 0 and torch.isfinite(loss) and "train/loss_simple" in parts


def test_learning_rate_schedule_of_the_config():
    schedule = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": {
            "warm_up_steps": [10],
            "cycle_lengths": [10**13],
            "f_start": [1e-6],
            "f_max": [1.0],
            "f_min": [1.0],
        },
    }
    (optimizer,), (entry,) = build(scheduler_config=schedule).configure_optimizers()
    scheduler = entry["scheduler"]
    assert entry["interval"] == "step"
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(0.5e-3, rel=1e-4)


def test_scale_factor_is_saved_where_it_is_measured():
    assert "scale_factor" not in build().state_dict()
    assert build(scale_by_std=True).state_dict()["scale_factor"] == pytest.approx(0.18215)


def test_inpainting_sees_mask_and_masked_image():
    config = tiny_config(conditioning_key="hybrid")
    config["params"]["unet_config"]["params"]["in_channels"] = 9
    model = LatentInpaintDiffusion(**config["params"])
    mask = torch.zeros(2, 32, 32, 1)
    mask[:, :16] = 1
    images = batch() | {"mask": mask, "masked_image": batch()["jpg"] * (1 - mask)}
    _, cond = model.get_input(images, "jpg")
    (concat,) = cond["c_concat"]
    assert concat.shape == (2, 5, 16, 16) and concat[0, 0, :8].eq(1).all() and concat[0, 0, 8:].eq(0).all()
    assert torch.isfinite(model.shared_step(images)[0])


def test_starting_from_a_checkpoint(tmp_path, caplog):
    first = AutoencoderKL(KL, NO_LOSS, embed_dim=4)
    path = save_checkpoint(tmp_path / "kl.ckpt", first.state_dict())
    second = AutoencoderKL(KL, NO_LOSS, embed_dim=4, ckpt_path=str(path), ignore_keys=["decoder"])
    assert torch.equal(second.encoder.conv_in.weight, first.encoder.conv_in.weight)
    assert not torch.equal(second.decoder.conv_in.weight, first.decoder.conv_in.weight)
    assert "stay at their initial values: decoder." in caplog.text


def test_averages_start_from_a_file_without_any(tmp_path):
    path = save_checkpoint(tmp_path / "plain.ckpt", build().state_dict())
    model = build(use_ema=True, ckpt_path=str(path))
    weights = dict(model.model.named_parameters())
    assert all(torch.equal(weights[n], model.model_ema.get_buffer(s)) for n, s in model.model_ema.m_name2s_name.items())


def test_class_labels_are_handed_over_as_published():
    """`adm`: labels come as the cross-attention list."""
    config = tiny_config(conditioning_key="adm", cond_stage_config="__is_unconditional__")
    unet = config["params"]["unet_config"]["params"]
    del unet["context_dim"], unet["use_spatial_transformer"]
    wrapper = DiffusionWrapper({**config["params"]["unet_config"], "params": unet | {"num_classes": 10}}, "adm").eval()
    fill(wrapper.state_dict())
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([1, 2])
    y = torch.tensor([3, 4])
    with torch.no_grad():
        assert torch.equal(wrapper(x, t, c_crossattn=[y]), wrapper.diffusion_model(x, t, y=y))
    with pytest.raises(ValueError, match="'adm' needs 'c_crossattn'"):
        wrapper(x, t)


def test_public_class_path_of_inpainting():
    from ldm.models.diffusion import ddpm

    assert ddpm.LatentInpaintDiffusion is LatentInpaintDiffusion
    with pytest.raises(AttributeError, match="LatentOutpaintDiffusion"):
        _ = ddpm.LatentOutpaintDiffusion


def test_identity_first_stage():
    config = tiny_config(first_stage_config={"target": "ldm.models.autoencoder.IdentityFirstStage"}, scale_factor=2.0)
    model = instantiate_from_config(config)
    x = torch.randn(1, 4, 8, 8)
    z = model.get_first_stage_encoding(model.encode_first_stage(x))
    assert torch.equal(model.decode_first_stage(z), x) and model.latent_size(7, 9) == (7, 9)
    with pytest.raises(ValueError, match="ddconfig has no option drop_out"):
        AutoencoderKL({**KL, "drop_out": 0.5}, NO_LOSS, embed_dim=4)
    assert IdentityFirstStage(vq_interface=True).quantize(x)[0] is x


def test_groups_of_narrow_networks():
    groups = {
        norm.num_channels // norm.num_groups
        for norm in AutoencoderKL(KL, NO_LOSS, embed_dim=4, channels_per_group=8).modules()
        if isinstance(norm, torch.nn.GroupNorm)
    }
    assert groups == {8}
    with pytest.raises(ValueError, match="channels_per_group=5"):
        AutoencoderKL(KL, NO_LOSS, embed_dim=4, channels_per_group=5)


MISTAKES = [
    ({"conditioning_key": "crossatn"}, "'crossatn' is not one of"),
    ({"parameterization": "e"}, "'e' is not one of eps, x0, v"),
    ({"loss_type": "huber"}, "'huber' is not one of l1, l2"),
    ({"num_timesteps_cond": 1001}, "num_timesteps_cond=1001"),
    ({"given_betas": [0.1, 2.0]}, "betas must be"),
]


@pytest.mark.parametrize("change, message", MISTAKES)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        build(**change)


@pytest.mark.parametrize("size", ["x", [4], [4, 0], [1, 2, 3], 2.5])
def test_an_image_size_that_is_none(size):
    with pytest.raises(ValueError, match="image_size must be"):
        image_sides(size)
