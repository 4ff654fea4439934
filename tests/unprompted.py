"""Toys of the models without text: latents 8x8x3 of a vector-quantised first stage, f = 4."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.checkpoint import save_checkpoint
from ldm.util import instantiate_from_config
from tests.golden import filled

ENCODERS = "ldm.modules.encoders.modules."
UNET = {
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_heads": 2,
}
ATTENDING = {"use_spatial_transformer": True, "transformer_depth": 1, "context_dim": 16}
FIRST_STAGE = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 32,
        "ddconfig": {
            "double_z": False,
            "z_channels": 3,
            "resolution": 32,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 32,
            "ch_mult": [1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}


def _encoder(name: str, **params: Any) -> dict[str, Any]:
    return {"target": ENCODERS + name, "params": params}


def _classes(count: int) -> dict[str, Any]:
    return {
        "cond_stage_config": _encoder("ClassEmbedder", embed_dim=16, n_classes=count, key="class_label"),
        "cond_stage_key": "class_label",
        "conditioning_key": "crossattn",
        "unet": ATTENDING,
    }


TOYS = {
    "nothing": {"cond_stage_config": "__is_unconditional__"},
    "classes": _classes(1001),  # as cin256-v2: the last is none
    "classes_only": _classes(10),
    "labels": {  # embedded by the network itself
        "cond_stage_config": {"target": "torch.nn.Identity"},
        "cond_stage_key": "class_label",
        "conditioning_key": "adm",
        "unet": {"num_classes": 5},
    },
    "layout": {  # two objects on 10x10 cells; class 100 is none
        "cond_stage_config": _encoder(
            "BERTEmbedder", n_embed=16, n_layer=1, vocab_size=101, max_seq_len=8, use_tokenizer=False
        ),
        "cond_stage_key": "coordinates_bbox",
        "conditioning_key": "crossattn",
        "unet": ATTENDING,
    },
    "segmentation": {
        "cond_stage_config": _encoder("SpatialRescaler", n_stages=2, in_channels=6, out_channels=3),
        "cond_stage_key": "segmentation",
        "conditioning_key": "concat",
        "unet": {"in_channels": 6},
    },
}


def toy_config(name: str, **changes: Any) -> dict[str, Any]:
    """`model:` section of one of the `TOYS`."""
    own = copy.deepcopy(TOYS[name]) | changes
    unet = {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET | own.pop("unet", {})}
    schedule = {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000}
    params = {
        "image_size": 8,
        "channels": 3,
        "cond_stage_trainable": own["cond_stage_config"] != "__is_unconditional__",
    }
    first_stage = copy.deepcopy(FIRST_STAGE)
    params |= {"unet_config": unet, "first_stage_config": first_stage, "use_ema": False, **schedule, **own}
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


def toy(name: str, **changes: Any) -> Any:
    """One of the `TOYS`, filled."""
    return filled(instantiate_from_config(toy_config(name, **changes)))


def write_toy(folder: Path, name: str, global_step: int | None = 7, **changes: Any) -> Path:
    """The checkpoint of a toy as `folder`/model.ckpt, with its config.yaml beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = toy_config(name, **changes)
    OmegaConf.save({"model": config}, folder / "config.yaml")
    save_checkpoint(folder / "model.ckpt", toy(name, **changes).state_dict(), global_step=global_step)
    return folder / "model.ckpt"
