"""Public training configs train on folders in the layouts of their data, with networks made tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ldm.util import REPOSITORY
from tests.data import public_layouts as layouts
from tests.golden import golden_configs
from tests.tiny import TEXT
from tests.training.toys import run

UNET = {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1], "attention_resolutions": [1]}
LOSS = {"disc_start": 1, "perceptual_weight": 0.0}


def imagenet(root: Path, part: str) -> dict[str, Any]:
    return {"root": str(layouts.imagenet(root, part)), "config": {"size": 64}}


def imagenet_sr(root: Path, part: str) -> dict[str, Any]:
    return {"root": str(layouts.imagenet(root, part)), "size": 64}


def lsun(kind: str, folder: str):
    return lambda root, part: {"root": str(layouts.lsun(root, kind, folder)), "size": 32}


def faces(root: Path, part: str) -> dict[str, Any]:
    return {"root": str(layouts.faces(root)), "size": 32}


def openimages(size: int, crop_size: int | None = None):
    sizes = {"size": size} | ({"crop_size": crop_size} if crop_size else {})
    return lambda root, part: {"root": str(layouts.openimages(root)), **sizes}


def landscapes(root: Path, part: str) -> dict[str, Any]:
    return {"root": str(layouts.landscapes(root)), "size": 64, "crop_size": 32}


def previews(root: Path, part: str) -> dict[str, Any]:
    return {"root": str(layouts.previews(root) / part), "size": 64}


LAYOUTS = {
    "configs/autoencoder/autoencoder_kl_32x32x4.yaml": imagenet_sr,
    "configs/latent-diffusion/celebahq-ldm-vq-4.yaml": faces,
    "configs/latent-diffusion/cin-ldm-vq-f8.yaml": imagenet,
    "configs/latent-diffusion/ffhq-ldm-vq-4.yaml": faces,
    "configs/latent-diffusion/lsun_bedrooms-ldm-vq-4.yaml": lsun("bedrooms", "bedrooms"),
    "configs/latent-diffusion/lsun_churches-ldm-kl-8.yaml": lsun("church_outdoor", "churches"),
    "models/first_stage_models/kl-f8/config.yaml": openimages(48, 32),
    "models/first_stage_models/vq-f4/config.yaml": openimages(48, 32),
    "models/ldm/bsr_sr/config.yaml": openimages(32),
    "models/ldm/layout2img-openimages256/config.yaml": openimages(32),
    "models/ldm/semantic_synthesis512/config.yaml": landscapes,
    "models/ldm/text2img256/config.yaml": previews,
}


def tiny_model(config: dict[str, Any]) -> dict[str, Any]:
    """Overrides that make the networks of a `model:` section small, and leave the factor of its first stage."""
    params = config["params"]
    if "unet_config" not in params:
        return {"ddconfig": _tiny_stage(params["ddconfig"])} | _tiny_loss(params)
    unet = dict(UNET)
    changes: dict[str, Any] = {"image_size": 8}
    stage = params["first_stage_config"]["params"]
    changes["first_stage_config"] = {"params": {"ddconfig": _tiny_stage(stage["ddconfig"]), "n_embed": 16}}
    if "n_embed" not in stage:
        del changes["first_stage_config"]["params"]["n_embed"]
    if "context_dim" in params["unet_config"]["params"]:
        unet |= {"context_dim": 32, "transformer_depth": 1}
    changes["unet_config"] = {"params": unet}
    condition = params.get("cond_stage_config")
    if isinstance(condition, dict):
        target = condition["target"].rpartition(".")[2]
        tiny = {"ClassEmbedder": {"embed_dim": 32, "n_classes": 1000}, "BERTEmbedder": {"n_embed": 32, "n_layer": 1}}
        changes["cond_stage_config"] = {"params": tiny.get(target, {})}
        if target == "BERTEmbedder" and condition["params"].get("use_tokenizer", True):
            changes["cond_stage_config"]["params"] |= {"tokenizer": TEXT["params"]["tokenizer"]}
    return changes


def _tiny_stage(ddconfig: dict[str, Any]) -> dict[str, Any]:
    return {"ch": 32, "ch_mult": [1] * len(ddconfig["ch_mult"]), "num_res_blocks": 1, "attn_resolutions": []}


def _tiny_loss(params: dict[str, Any]) -> dict[str, Any]:
    return {"lossconfig": {"params": LOSS}} if "LPIPS" in params["lossconfig"]["target"] else {}


def train(tmp_path: Path, name: str, *changes: dict[str, Any], settings: tuple[str, ...] = ()) -> int:
    """The script on a published config with `changes` merged into it, for two steps."""
    trainer = {"accelerator": "cpu", "max_steps": 2, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    callbacks = {"image_logger": {"params": {"disabled": True}}}
    run_settings = {"lightning": {"trainer": trainer, "callbacks": callbacks}}
    paths = [REPOSITORY / name]
    for number, change in enumerate([*changes, run_settings]):
        paths.append(tmp_path / f"{number}.yaml")
        OmegaConf.save(change, paths[-1])
    return run("--base", *paths, "-t", "-l", tmp_path / "logs", *settings)


@pytest.mark.parametrize("name", LAYOUTS)
def test_training(tmp_path, name):
    config = OmegaConf.to_container(OmegaConf.load(REPOSITORY / name))
    data: dict[str, Any] = {"batch_size": 2, "num_workers": 0}
    for part in ("train", "validation"):
        data[part] = {"params": LAYOUTS[name](tmp_path / part, part)}
    change = {"model": {"params": tiny_model(config["model"])}, "data": {"params": data}}
    assert train(tmp_path, name, change) == 0
    (folder,) = (tmp_path / "logs").iterdir()
    assert (folder / "checkpoints/last.ckpt").is_file()


def test_inpainting_on_a_web_data_set(tmp_path):
    """Stable Diffusion v2 inpainting: tars, filters, transforms and masks as in the published config."""
    name = "configs/stable-diffusion/v2-inpainting-inference.yaml"
    layouts.tars(tmp_path / "tars")
    (tmp_path / "filters.yaml").write_text("[triangle]")
    transforms = [
        {"target": "torchvision.transforms.Resize", "params": {"size": 16, "interpolation": 3}},
        {"target": "torchvision.transforms.RandomCrop", "params": {"size": 16}},
    ]
    split = {"image_transforms": transforms}
    settings = tuple(f'data.params.{part}.shards="{{00000..00001}}.tar"' for part in ("train", "validation"))
    data = {"tar_base": str(tmp_path / "tars"), "filter_word_list": str(tmp_path / "filters.yaml")}
    data |= {"batch_size": 2, "num_workers": 0, "train": split, "validation": split}
    golden = golden_configs("diffusion")
    unet = golden["unet"] | {"in_channels": 9}
    changes = {
        "image_size": 8,
        "unet_config": {"params": unet},
        "first_stage_config": {"params": {"ddconfig": golden["kl"]}},
    }
    whole = OmegaConf.to_container(OmegaConf.load(REPOSITORY / name))
    whole["model"]["params"] |= {"cond_stage_config": TEXT}
    whole["model"]["params"]["unet_config"]["params"] = unet
    OmegaConf.save(whole, tmp_path / "whole.yaml")
    change = {"model": {"params": changes}, "data": {"params": data}}
    change["lightning"] = {"trainer": {"val_check_interval": 2}}
    assert train(tmp_path, str(tmp_path / "whole.yaml"), change, settings=settings) == 0


def test_shards_elsewhere_are_named(tmp_path, capsys):
    name = "configs/stable-diffusion/v2-inpainting-inference.yaml"
    whole = OmegaConf.to_container(OmegaConf.load(REPOSITORY / name))
    whole["model"] = {"target": "tests.training.toys.TwoPlayers", "base_learning_rate": 1e-3}
    OmegaConf.save(whole, tmp_path / "whole.yaml")
    change = {"data": {"params": {"filter_word_list": None}}}
    assert train(tmp_path, str(tmp_path / "whole.yaml"), change) == 2
    assert "nothing is downloaded: put the tars into a folder" in capsys.readouterr().err
