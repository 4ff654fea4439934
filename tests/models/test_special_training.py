"""Training Stable Diffusion's special models: runs that go on as if never stopped, batches that processes share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ldm.checkpoint import build_on_meta, fill_model, read_checkpoint
from ldm.util import instantiate_from_config
from tests.golden import filled
from tests.models.test_unclip import EMBEDDER, NOISE, WIDTH
from tests.modules.test_midas import SMALL
from tests.tiny import TEXT, tiny_config
from tests.training import toys

DDPM = "ldm.models.diffusion.ddpm."
LOW_SCALE = {
    "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
    "params": {"max_noise_level": 50},
}
MASKED = {"target": "ldm.data.masks.MaskedImages", "params": {"dataset": toys.pictures(6), "image_key": "jpg"}}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of the model, of its network
    "LatentInpaintDiffusion": ({"conditioning_key": "hybrid"}, {"in_channels": 9}),
    "LatentDepth2ImageDiffusion": (
        {
            "conditioning_key": "hybrid",
            "depth_stage_config": {"target": "ldm.modules.midas.api.MiDaSInference", "params": {"config": SMALL}},
        },
        {"in_channels": 5},
    ),
    "LatentUpscaleDiffusion": (
        {"conditioning_key": "hybrid-adm", "low_scale_config": LOW_SCALE},
        {"in_channels": 7, "num_classes": 50},
    ),
    "ImageEmbeddingConditionedLatentDiffusion": (
        {"conditioning_key": "crossattn-adm", "embedder_config": EMBEDDER, "noise_aug_config": NOISE},
        {"num_classes": "sequential", "adm_in_channels": 2 * WIDTH},
    ),
}


class WithSmall(toys.Pictures):
    """The toys' images, and small ones of the latents' size."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "LR": item["jpg"][::2, ::2]}


def content(kind: str) -> dict[str, Any]:
    params, network = KINDS[kind]
    model = toys.diffusion(**params) | {"target": DDPM + kind}
    model["params"]["unet_config"]["params"] |= network
    small = {"target": f"{__name__}.WithSmall", "params": {"length": 6}}
    data = {"LatentInpaintDiffusion": MASKED, "LatentUpscaleDiffusion": small}.get(kind, toys.pictures(6))
    return toys.config(model, train=data)


@pytest.fixture(autouse=True)
def _small_depth(monkeypatch) -> None:
    monkeypatch.setattr("ldm.modules.midas.api.SIDE", 32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, kind):
    settings = content(kind)
    _, whole = toys.start(tmp_path / "whole", settings, "--max_steps", 4)
    settings["lightning"]["callbacks"] |= {"stop": {"target": "tests.training.toys.SignalAt", "params": {"batch": 1}}}
    code, parts = toys.start(tmp_path / "parts", settings, "--max_steps", 4)
    assert code == 130 and toys.run("--resume", parts, "-t") == 0
    toys.assert_same_weights(toys.weights(parts), toys.weights(whole))
    checkpoint = read_checkpoint(parts / "checkpoints" / "last.ckpt")
    assert checkpoint.global_step == 4
    model = build_on_meta(settings["model"])
    report = fill_model(model, checkpoint)
    assert not report.unexpected and not report.notes
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_processes_generate_what_one_would(kind):
    """Posteriors, noise levels and noise of conditions, what is dropped: each of two has every other row of one's."""
    settings = content(kind)
    data = instantiate_from_config(settings["data"]["params"]["train"])
    batch = torch.utils.data.default_collate([data[i] for i in range(6)])
    model = filled(instantiate_from_config(settings["model"])).train()
    torch.manual_seed(3)
    z, cond = model.get_input(batch, "jpg")
    for rank in range(2):
        model._trainer = SimpleNamespace(global_rank=rank, world_size=2)
        torch.manual_seed(3)
        own_z, own_cond = model.get_input({name: entry[rank::2] for name, entry in batch.items()}, "jpg")
        torch.testing.assert_close(own_z, z[rank::2])
        assert own_cond.keys() == cond.keys()
        for name, entry in cond.items():
            whole, own = (x if isinstance(x, torch.Tensor) else x[0] for x in (entry, own_cond[name]))
            torch.testing.assert_close(own, whole[rank::2])


@pytest.mark.parametrize("layer", ["last", "penultimate"])
def test_all_that_is_trained_of_an_open_clip_tower_gets_gradients(layer):
    """Otherwise processes that train together would wait for a gradient that never comes."""
    tower = {"width": 24, "heads": 3, "layers": 2, "vocab_size": 16, "context_length": 12, "embed_dim": 24}
    params = {"config": tower, "layer": layer, "max_length": 12, "tokenizer": TEXT["params"]["tokenizer"]}
    encoder = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": params}
    model = filled(instantiate_from_config(tiny_config(cond_stage_config=encoder, cond_stage_trainable=True)))
    model.shared_step({"jpg": torch.rand(2, 32, 32, 3), "txt": ["a red circle", "a"]})[0].backward()
    assert all(parameter.grad is not None for parameter in model.trainable_parameters())
    trained = {name for name, p in model.cond_stage_model.named_parameters() if p.requires_grad}
    assert "model.transformer.resblocks.0.attn.in_proj_weight" in trained and "model.ln_final.weight" in trained
    assert len(trained) == 4 + 12 * (2 if layer == "last" else 1)


# ---- parts that nothing gave weights ----


def random_parts(caplog) -> list[str]:
    """What the log says of them, by warning; and forgets it."""
    said = [record.message.partition(": frozen")[0] for record in caplog.records if ": frozen" in record.message]
    caplog.clear()
    return said


def test_frozen_parts_that_stay_random_are_named(tmp_path, caplog, monkeypatch):
    """First stage, text encoder and estimator of depth, each without a file, with one of its own or of the model's."""
    short = ("--max_steps", 1)
    settings = content("LatentDepth2ImageDiffusion")
    _, run = toys.start(tmp_path / "none", settings, *short)
    assert random_parts(caplog) == ["first_stage_model, cond_stage_model, depth_model"]
    assert toys.run("--resume", run, "-t", "--max_steps", 2) == 0
    assert random_parts(caplog) == []

    whole = str(run / "checkpoints" / "last.ckpt")
    midas = settings["model"]["params"]["depth_stage_config"]["params"]
    toys.start(tmp_path / "midas", settings, *short, f"model.params.depth_stage_config.params.path={whole}")
    assert random_parts(caplog) == ["first_stage_model, cond_stage_model"] and "path" not in midas
    toys.start(tmp_path / "whole", settings, *short, f"model.params.ckpt_path={whole}")
    assert random_parts(caplog) == []
