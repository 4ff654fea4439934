"""Stable unCLIP: what a batch becomes, embeddings and their dropout, training for a moment, images of training."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch

from ldm.checkpoint import save_checkpoint
from ldm.models.diffusion.special_models import ImageEmbeddingConditionedLatentDiffusion
from ldm.modules.diffusionmodules.schedule import timestep_embedding
from tests.golden import filled, golden_configs
from tests.tiny import TEXT

WIDTH = 10  # of embeddings; the golden model takes twice as much
EMBEDDER = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPImageEmbedder",
    "params": {
        "config": {
            "text_cfg": {"width": 16, "heads": 2, "vocab_size": 30, "context_length": 8, "embed_dim": WIDTH},
            "vision_cfg": {
                "image_size": 16,
                "patch_size": 8,
                "width": 16,
                "heads": 2,
                "layers": 2,
                "embed_dim": WIDTH,
            },
        }
    },
}
NOISE = {
    "target": "ldm.modules.encoders.modules.CLIPEmbeddingNoiseAugmentation",
    "params": {
        "timestep_dim": WIDTH,
        "noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"},
    },
}
IMAGE_SHAPE = (2, 3, 32, 32)


def build(**changes) -> ImageEmbeddingConditionedLatentDiffusion:
    """The golden model of this kind, with a text encoder and an embedder."""
    torch.manual_seed(0)
    params = copy.deepcopy(golden_configs("sd2")["crossattn_adm"]["params"]) | {"cond_stage_config": TEXT}
    params |= {"embedder_config": EMBEDDER, "noise_aug_config": NOISE, "embedding_dropout": 0.25}
    model = ImageEmbeddingConditionedLatentDiffusion(**params | changes)
    model.learning_rate = 1e-3
    return model


def batch(size: int = 2) -> dict:
    captions = ["a red circle", "a blue square"] * size
    return {"jpg": torch.rand(size, 32, 32, 3) * 2 - 1, "txt": captions[:size]}


def test_embeddings_as_the_network_takes_them():
    model, images = build().eval(), torch.randn(2, 3, 32, 32).clamp(-1, 1)
    z = model.embed_images(images)
    assert z.shape == (2, WIDTH) and torch.equal(z, model.embedder(images))
    for given, levels in ((0, [0, 0]), (torch.tensor([3, 900]), [3, 900])):
        torch.manual_seed(1)
        adm = model.embedding_condition(z, given)
        torch.manual_seed(1)
        level = torch.tensor(levels)
        assert torch.equal(adm[:, :WIDTH], model.noise_augmentor.q_sample(z, level))
        assert torch.equal(adm[:, WIDTH:], timestep_embedding(level, WIDTH))
    torch.manual_seed(1)
    random = model.embedding_condition(z)
    torch.manual_seed(1)
    assert torch.equal(random, torch.cat(model.noise_augmentor(z), dim=1))  # the draws of the public code
    assert build(noise_aug_config=None).embedding_condition(z) is z
    with pytest.raises(ValueError, match="0 to 999, not 1000"):
        model.embedding_condition(z, 1000)


def test_a_batch_becomes_latents_and_condition():
    z, c = build().eval().get_input(batch(), "jpg", bs=1)
    assert z.shape == (1, 4, 16, 16) and c["c_adm"].shape == (1, 2 * WIDTH)
    assert c["c_crossattn"][0].shape == (1, 12, 24)
    other = build(embedding_key="image").eval()
    with pytest.raises(ValueError, match="batches have no 'image'"):
        other.get_input(batch(), "jpg")


def test_embeddings_are_dropped_only_in_training():
    model = build(embedding_dropout=0.25)
    dropped = model.train().get_input(batch(64), "jpg")[1]["c_adm"].eq(0).all(dim=1)
    assert 4 < dropped.sum() < 32
    assert not model.eval().get_input(batch(64), "jpg")[1]["c_adm"].eq(0).all(dim=1).any()
    assert not build(embedding_dropout=0.0).train().get_input(batch(8), "jpg")[1]["c_adm"].eq(0).all(dim=1).any()


def test_training_for_a_moment(tmp_path):
    model = build(cond_stage_trainable=True)
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
    assert any(name.startswith("cond_stage_model") for name in moved)
    assert not any(name.startswith(("first_stage_model", "embedder", "noise_augmentor")) for name in moved)
    assert all(torch.isfinite(value).all() for value in after.values() if value.is_floating_point())
    gradients = [p.grad for p in model.model.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert not any(p.requires_grad for p in model.embedder.parameters())
    assert not model.train().embedder.training


def test_images_of_training():
    log = build(timesteps=5, log_every_t=2).log_images(batch(), ddim_steps=2, unconditional_guidance_scale=3.0)
    names = {"inputs", "reconstruction", "conditioning", "samples", "samples_cfg_scale_3.00"}
    names |= {"samples_inpainting", "samples_outpainting", "mask"}
    assert {name for name, image in log.items() if tuple(image.shape) == IMAGE_SHAPE} == names
    assert all(torch.isfinite(image).all() for image in log.values()) and "progressive_row" in log


def test_guidance_omits_the_image():
    model = build()
    cond = {"c_crossattn": [torch.randn(2, 12, 24)], "c_adm": torch.randn(2, 2 * WIDTH)}
    uncond = model._unconditional_like(cond, 2, None)
    assert uncond.keys() == cond.keys() and not uncond["c_adm"].any()
    assert torch.equal(uncond["c_crossattn"][0][0], model.get_learned_conditioning([""])[0])


def test_starting_from_a_checkpoint(tmp_path):
    """The embedder, too, gets its weights from the file."""
    first = filled(build())
    path = save_checkpoint(tmp_path / "model.ckpt", first.state_dict())
    second = build(ckpt_path=str(path), train_only=["*label_emb*"])
    loaded = second.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in first.state_dict().items())
    assert {n for n, p in second.named_parameters() if p.requires_grad} == {
        f"model.diffusion_model.label_emb.0.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")
    }


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="embedding_dropout must be from 0 to 1, not 2"):
        build(embedding_dropout=2)
    with pytest.raises(ValueError, match="freeze_embedder: false"):
        build(freeze_embedder=False)
    with pytest.raises(ValueError, match="ucg_rate has no effect on a frozen embedder: use embedding_dropout"):
        build(embedder_config={**EMBEDDER, "params": {**EMBEDDER["params"], "ucg_rate": 0.1}})
