"""MiDaS: transformers' DPT with the same weights gives the same depth; files and folders of weights; sizes."""

from __future__ import annotations

import pytest
import torch
from transformers import DPTConfig, DPTForDepthEstimation

from ldm.checkpoint import CheckpointError, build_on_meta, save_checkpoint
from ldm.modules.midas import api
from ldm.modules.midas.api import MiDaSInference, fit, from_transformers, load_midas_transform, load_model
from ldm.modules.midas.dpt import StandardizedConv
from tests.golden import assert_agrees, difference, tensor
from tests.reference.fill import fill

SMALL = {
    "width": 48,
    "depth": 4,
    "heads": 4,
    "hooks": [2, 3],
    "grid": 4,
    "stem": 32,
    "stages": [[128, 2], [256, 1], [384, 2]],
    "features": 16,
}
TARGET = "ldm.modules.midas.api.MiDaSInference"


def dpt(small: bool = True) -> DPTForDepthEstimation:
    """transformers' network of the published sizes, or of those in SMALL."""
    hybrid = {"is_hybrid": True, "layer_norm_eps": 1e-6}
    if not small:
        return DPTForDepthEstimation(DPTConfig(**hybrid, neck_hidden_sizes=[256, 512, 768, 768]))
    backbone = {
        "model_type": "bit",
        "global_padding": "same",
        "layer_type": "bottleneck",
        "depths": [2, 1, 2],
        "hidden_sizes": [128, 256, 384],
        "embedding_size": 32,
        "out_features": ["stage1", "stage2", "stage3"],
        "embedding_dynamic_padding": True,
    }
    config = DPTConfig(
        **hybrid,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=64,
        backbone_config=backbone,
        backbone_featmap_shape=[1, 384, 4, 4],
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[128, 256, 48, 48],
        fusion_hidden_size=16,
    )
    return DPTForDepthEstimation(config).eval()


@pytest.fixture(scope="module")
def theirs() -> DPTForDepthEstimation:
    model = dpt()
    fill(model.state_dict())
    model.head.head[4].bias.data.fill_(1.0)  # or the last ReLU would leave little
    return model


@pytest.fixture
def ours(theirs) -> MiDaSInference:
    model = MiDaSInference(config=SMALL)
    model.model.load_state_dict(from_transformers(theirs.state_dict()))
    return model


@torch.no_grad()
def test_depth_is_that_of_transformers(ours, theirs):
    x = tensor("picture", 2, 3, 64, 64).clamp(-1, 1)
    depth, wanted = ours(x), theirs(x).predicted_depth[:, None]
    assert wanted.std() > 0.01 and (wanted > 0).float().mean() > 0.5
    assert_agrees(depth, wanted, 1e-5)
    assert_agrees((depth - depth.mean()) / depth.std(), (wanted - wanted.mean()) / wanted.std(), 1e-4)


def test_names_and_shapes_of_the_published_size():
    """Every weight has one place: 366 in MiDaS, the same 122 million numbers."""
    with torch.device("meta"):
        mine, renamed = MiDaSInference().model.state_dict(), from_transformers(dpt(small=False).state_dict())
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in renamed.items()}
    assert len(mine) == 366 and sum(value.numel() for value in mine.values()) == 122_377_985
    assert {
        "pretrained.model.patch_embed.backbone.stem.conv.weight",
        "pretrained.model.patch_embed.backbone.stages.2.blocks.8.norm3.weight",
        "pretrained.model.blocks.11.attn.qkv.weight",
        "pretrained.act_postprocess3.0.project.0.weight",
        "pretrained.act_postprocess4.4.weight",
        "scratch.layer1_rn.weight",
        "scratch.refinenet1.resConfUnit2.conv1.weight",
        "scratch.output_conv.4.bias",
    } <= mine.keys()


@pytest.mark.parametrize("kind", ["midas", "checkpoint", "folder"])
def test_weights_from_a_file(theirs, ours, tmp_path, kind):
    """From MiDaS' file, from a depth-to-image checkpoint, from transformers' folder; also in a model built on meta."""
    weights = {**ours.model.state_dict(), "pretrained.model.head.weight": torch.ones(3, 48)}
    if kind == "folder":
        theirs.save_pretrained(tmp_path)
        path = tmp_path
    elif kind == "midas":
        path = tmp_path / "midas.pt"
        torch.save(weights, path)
    else:
        inside = {f"depth_model.model.{key}": value for key, value in weights.items()}
        path = save_checkpoint(tmp_path / "depth.ckpt", inside | {"model.diffusion_model.out.2.bias": torch.ones(4)})
    model = build_on_meta({"target": TARGET, "params": {"config": SMALL, "path": str(path)}})
    assert all(torch.equal(value, weights[key]) for key, value in model.model.state_dict().items())


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights of MiDaS: it needs model.safetensors or"):
        MiDaSInference(config=SMALL, path=tmp_path)
    path = save_checkpoint(tmp_path / "a.ckpt", {"model.diffusion_model.out.2.bias": torch.ones(4)})
    with pytest.raises(CheckpointError):
        MiDaSInference(config=SMALL, path=path)
    with pytest.raises(ValueError, match="model_type must be 'dpt_hybrid', got 'midas_v21'"):
        MiDaSInference("midas_v21")


SIZES = [((512, 512), (384, 384)), ((512, 768), (384, 576)), ((256, 320), (320, 384)), ((384, 1000), (384, 992))]


@pytest.mark.parametrize("size, wanted", SIZES)
def test_images_are_fitted(size, wanted):
    assert fit(torch.zeros(1, 3, *size)).shape[2:] == wanted


def test_fitting_keeps_the_range_and_what_already_fits():
    edge = torch.ones(1, 3, 500, 500)
    edge[..., 250:] = -1
    assert fit(edge).abs().max() <= 1
    x = tensor("x", 1, 3, 384, 384).clamp(-1, 1)
    assert_agrees(fit(x), x, 1e-6)


@pytest.mark.parametrize("dtype, bar", [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
@torch.no_grad()
def test_oblong_images_and_half_precision(ours, dtype, bar):
    x = tensor("picture", 1, 3, 96, 64).clamp(-1, 1)
    depth = ours(x)
    rounded = ours.to(dtype)(x)
    assert depth.shape == (1, 1, 96, 64) and rounded.dtype == torch.float32
    assert difference(rounded, depth) < bar


@torch.no_grad()
def test_filters_are_standardised_before_they_are_rounded():
    """In half precision 1e-8 is 0, and a filter of equal weights would be 0 / 0."""
    conv = StandardizedConv(4, 4, 1).half()
    conv.weight.fill_(0.5)
    assert conv(torch.ones(1, 4, 8, 8).half()).eq(0).all()


@torch.no_grad()
def test_published_helpers(tmp_path, monkeypatch):
    transform = load_midas_transform("dpt_hybrid")
    image = torch.rand(100, 150, 3)
    found = transform({"image": image.numpy(), "name": "x"})
    assert found["name"] == "x" and found["image"].shape == (3, 256, 384)
    torch.testing.assert_close(torch.from_numpy(found["image"]), fit(2 * image.movedim(-1, 0)[None] - 1)[0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="midas_models/dpt_hybrid-midas-501f0c75.pt: download"):
        load_model("dpt_hybrid")
    with pytest.raises(ValueError, match="got 'dpt_large'"):
        load_midas_transform("dpt_large")
    monkeypatch.setattr(api, "MiDaSInference", lambda model_type, path: MiDaSInference(model_type, config=SMALL))
    model, _ = load_model("dpt_hybrid", tmp_path / "x.pt")
    assert model(tensor("x", 1, 3, 32, 32)).shape == (1, 1, 32, 32)
