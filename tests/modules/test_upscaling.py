"""Noise augmentation of conditions: the goldens, the schedule's published buffers, CLIP's embeddings."""

from __future__ import annotations

import pytest
import torch

from ldm.modules.diffusionmodules.schedule import timestep_embedding
from ldm.modules.diffusionmodules.upscaling import (
    AbstractLowScaleModel,
    ImageConcatWithNoiseAugmentation,
    SimpleImageConcat,
)
from ldm.modules.encoders.clip_image import CLIPEmbeddingNoiseAugmentation
from tests.golden import REFERENCE, assert_agrees, goldens, tensor

G = goldens("sd2")
UPSCALER = {"noise_schedule_config": {"linear_start": 1e-4, "linear_end": 2e-2}, "max_noise_level": 350}
UNCLIP = {"noise_schedule_config": {"timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}}


def test_golden_of_a_given_level():
    level = torch.from_numpy(G["noise_aug.level"])
    torch.manual_seed(6)
    z, same = ImageConcatWithNoiseAugmentation(**UPSCALER)(tensor("concat3", 2, 3, 16, 16), level)
    assert_agrees(z, G["noise_aug.x"], 1e-6)
    assert torch.equal(same, level)


def test_golden_of_random_levels():
    """Levels are drawn before the noise."""
    torch.manual_seed(6)
    z, level = ImageConcatWithNoiseAugmentation(**UPSCALER, to_cuda=True)(tensor("concat3", 2, 3, 16, 16))
    assert level.dtype == torch.int64 and level.tolist() == G["noise_aug.level_random"].tolist()
    assert_agrees(z, G["noise_aug.x_random"], 1e-6)


@pytest.mark.parametrize(
    "prefix, config, model",
    [
        ("low_scale_model.", "x4-upscaling", ImageConcatWithNoiseAugmentation(**UPSCALER)),
        ("noise_augmentor.", "v2-1-stable-unclip-h-inference", CLIPEmbeddingNoiseAugmentation(**UNCLIP)),
    ],
)
def test_published_buffers(prefix, config, model):
    lines = (REFERENCE / "keys" / f"stable-diffusion.{config}.tsv").read_text().splitlines()
    wanted = [line for line in lines if line.startswith(prefix)]
    found = [f"{prefix}{key}\t{len(value)}\tfloat32" for key, value in model.state_dict().items()]
    assert found == wanted and len(found) == 8


def test_levels():
    model = ImageConcatWithNoiseAugmentation(max_noise_level=1000)
    x = torch.randn(500, 1)
    _, level = model(x)
    assert 0 <= level.min() < 50 and 950 < level.max() < 1000
    assert model.levels(7, 3, x.device).tolist() == [7, 7, 7]
    assert model.levels(torch.tensor([1, 2]), 2, x.device).tolist() == [1, 2]
    small = ImageConcatWithNoiseAugmentation(**UPSCALER)
    assert small.levels(350, 1, x.device).tolist() == [350] and small(x)[1].max() < 350
    for wrong, augmentor, last in (
        (1000, model, 999),
        (-1, model, 999),
        (351, small, 350),
        (1, SimpleImageConcat(), 0),
    ):
        with pytest.raises(ValueError, match=f"levels are 0 to {last}, not {wrong}"):
            augmentor.levels(wrong, 2, x.device)
    with pytest.raises(ValueError, match="max_noise_level must be 1 to 1000"):
        ImageConcatWithNoiseAugmentation(max_noise_level=1001)


def test_signal_and_noise():
    model = ImageConcatWithNoiseAugmentation()
    x, noise, level = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0, 999])
    z, _ = model(x, level, noise)
    a = torch.cumprod(1 - torch.linspace(1e-2, 0.02**0.5, 1000, dtype=torch.float64) ** 2, 0)[level].view(2, 1, 1, 1)
    assert_agrees(z, a.sqrt() * x + (1 - a).sqrt() * noise, 1e-6)


def test_conditions_as_they_are():
    x = torch.randn(3, 3, 4, 4)
    z, level = SimpleImageConcat()(x, torch.tensor([1, 2, 3]))
    assert z is x and level.tolist() == [0, 0, 0] and level.dtype == torch.int64
    assert not SimpleImageConcat().state_dict()
    with pytest.raises(NotImplementedError):
        AbstractLowScaleModel()(x)


# ---- CLIP's embeddings ----


@pytest.fixture
def stats(tmp_path):
    path = tmp_path / "stats.th"
    mean, std = torch.randn(1, 6), torch.rand(1, 6) + 0.5
    torch.save((mean, std), path)
    return path, mean, std


def test_embeddings_are_noised_in_their_own_units(stats):
    path, mean, std = stats
    model = CLIPEmbeddingNoiseAugmentation(**UNCLIP, clip_stats_path=str(path), timestep_dim=6)
    x, noise, level = torch.randn(2, 6), torch.randn(2, 6), torch.tensor([0, 600])
    z, embedding = model(x, level, noise)
    a = model.alphas_cumprod[level][:, None]
    assert_agrees(z, mean + std * (a.sqrt() * (x - mean) / std + (1 - a).sqrt() * noise), 1e-5)
    assert torch.equal(embedding, timestep_embedding(level, 6))
    torch.manual_seed(1)
    z, embedding = model(x)
    torch.manual_seed(1)
    level = torch.randint(0, 1000, (2,))
    assert torch.equal(embedding, timestep_embedding(level, 6))
    assert torch.equal(z, model(x, level)[0])


def test_without_statistics():
    model = CLIPEmbeddingNoiseAugmentation(**UNCLIP, timestep_dim=8)
    x, noise, level = torch.randn(2, 8), torch.randn(2, 8), torch.tensor([3, 600])
    assert_agrees(model(x, level, noise)[0], ImageConcatWithNoiseAugmentation(**UNCLIP)(x, level, noise)[0], 1e-6)


def test_statistics_are_read_when_needed(tmp_path, stats):
    model = CLIPEmbeddingNoiseAugmentation(clip_stats_path=str(tmp_path / "none" / "ViT-L-14_stats.th"))
    with pytest.raises(FileNotFoundError, match=r"none/ViT-L-14_stats.th is missing.*Karlo.*clip_stats_path"):
        model(torch.zeros(1, 6))
    (tmp_path / "none").mkdir()
    stats[0].rename(model.clip_stats_path)
    assert model(torch.zeros(1, 6))[0].shape == (1, 6)


@pytest.mark.parametrize("content", [b"<html>", b""])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "stats.th"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"stats.th does not hold two tensors"):
        CLIPEmbeddingNoiseAugmentation(clip_stats_path=str(path)).stats()


def test_files_that_run_something_are_refused(tmp_path):
    path = tmp_path / "stats.th"
    torch.save((torch.zeros(2), print), path)
    with pytest.raises(ValueError, match="does not hold two tensors"):
        CLIPEmbeddingNoiseAugmentation(clip_stats_path=str(path)).stats()
