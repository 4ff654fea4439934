"""Stable Diffusion's special models under scripts/train.py: stopped and gone on with, they end as if never stopped."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ldm.checkpoint import build_on_meta, fill_model, read_checkpoint
from tests.models.test_unclip import EMBEDDER, NOISE, WIDTH
from tests.modules.test_midas import SMALL
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
    """The toys' pictures, and small ones of the latents' size."""

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
def test_a_stopped_run_ends_as_a_whole_one(tmp_path, kind):
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
