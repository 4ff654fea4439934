"""A model of the v1 structure small enough for tests, as a config and as files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm.checkpoint import save_checkpoint
from ldm.util import instantiate_from_config
from tests.golden import filled, golden_configs

TEXT = {
    "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    "params": {
        "max_length": 12,
        "tokenizer": {
            "target": "ldm.modules.encoders.tokenizer.WordTokenizer",
            "params": {"words": ["a", "red", "blue", "circle", "square"]},
        },
        "config": {
            "vocab_size": 16,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 12,
        },
    },
}

# What makes it a retrieval-augmented model, whose condition comes from outside.
RETRIEVAL = {"cond_stage_config": {"target": "torch.nn.Identity"}, "cond_stage_key": "nix"}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """`model:` section of the small golden model (latents 16x16x4, f = 2) with a text encoder."""
    params = copy.deepcopy(golden_configs("diffusion")["model"]) | {"cond_stage_config": TEXT} | changes
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


def upscaler_config() -> dict[str, Any]:
    """`model:` section of a small x4 upscaler: text, a small picture of the latents' size, and its noise level."""
    params = copy.deepcopy(golden_configs("sd2")["hybrid_adm"]["params"]) | {"cond_stage_config": TEXT}
    params["first_stage_config"]["params"]["ddconfig"]["ch_mult"] = [1, 2, 2]  # f = 4
    params["low_scale_config"] = {
        "target": "ldm.modules.diffusionmodules.upscaling.ImageConcatWithNoiseAugmentation",
        "params": {"noise_schedule_config": {"linear_start": 1e-4, "linear_end": 2e-2}, "max_noise_level": 90},
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentUpscaleDiffusion", "params": params}


def super_resolution_config() -> dict[str, Any]:
    """`model:` section of a small model of the bsr_sr structure: a small picture beside the latents of a VQ f = 4."""
    unet = golden_configs("diffusion")["unet"] | {"in_channels": 6, "out_channels": 3, "use_spatial_transformer": False}
    first_stage = {"ddconfig": golden_configs("diffusion")["vq"], "lossconfig": {"target": "torch.nn.Identity"}}
    params = {
        **{"linear_start": 0.0015, "linear_end": 0.0155, "timesteps": 1000, "image_size": 16, "channels": 3},
        **{"cond_stage_key": "LR_image", "cond_stage_config": {"target": "torch.nn.Identity"}, "concat_mode": True},
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {key: unet[key] for key in unet if key not in ("transformer_depth", "context_dim", "legacy")},
        },
        "first_stage_config": {
            "target": "ldm.models.autoencoder.VQModelInterface",
            "params": first_stage | {"n_embed": 64, "embed_dim": 3},
        },
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


def write_tiny(folder: Path, name: str = "model.ckpt", **changes: Any) -> Path:
    """A filled checkpoint of the small golden model in `folder`, with its config.yaml beside it."""
    return write_model(folder, tiny_config(**changes), name)


def write_model(folder: Path, config: dict[str, Any], name: str = "model.ckpt") -> Path:
    """The same of another `model:` section."""
    OmegaConf.save({"model": config}, folder / "config.yaml")
    path = folder / name
    save_checkpoint(path, filled(instantiate_from_config(config)).state_dict(), global_step=7)
    return path


def write_clip(folder: Path, width: int, vocab_size: int = 49408) -> Path:
    """A small CLIP in transformers' layout in `folder`, with embeddings of `width` numbers and pictures of 28x28."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": vocab_size, "projection_dim": width}
    vision = {**tower, "image_size": 28, "patch_size": 14, "projection_dim": width}
    filled(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))).save_pretrained(folder)
    return folder
