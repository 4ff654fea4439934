"""The same weights in other libraries: diffusers' own conversion of our configs and state dicts, and its networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as conversion
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

Config = Mapping[str, Any]  # a public YAML config as values: {"model": {"params": {...}}}
State = Mapping[str, Tensor]  # in published names


def unet(config: Config, state: State) -> UNet2DConditionModel:
    """The UNet of a checkpoint (`model.diffusion_model.*`)."""
    theirs = conversion.create_unet_diffusers_config_from_ldm(config, state)
    return _filled(
        UNet2DConditionModel, theirs, conversion.convert_ldm_unet_checkpoint, state, "model.diffusion_model."
    )


def vae(config: Config, state: State) -> AutoencoderKL:
    """The first stage of a checkpoint (`first_stage_model.*`)."""
    theirs = conversion.create_vae_diffusers_config_from_ldm(config, state)
    return _filled(AutoencoderKL, theirs, conversion.convert_ldm_vae_checkpoint, state, "first_stage_model.")


def text(tower: Mapping[str, Any], state: State) -> CLIPTextModel:
    """The text tower of a checkpoint (`cond_stage_model.transformer.*`); `tower` holds its sizes."""
    last = tower["vocab_size"] - 1
    model = CLIPTextModel(CLIPTextConfig(**tower, hidden_act="quick_gelu", bos_token_id=last - 1, eos_token_id=last))
    weights = conversion.convert_ldm_clip_checkpoint(dict(state))
    if not any(key.startswith("text_model.") for key in model.state_dict()):  # transformers 5
        weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    report = model.load_state_dict(weights, strict=False)
    assert not report.missing_keys and all("position_ids" in key for key in report.unexpected_keys), report
    return model.eval()


def open_clip_text(size: Mapping[str, Any], state: State) -> CLIPTextModel:
    """OpenCLIP's text tower of a checkpoint (`cond_stage_model.model.*`) without its last block; `size` of all of it.

    So diffusers has Stable Diffusion 2's tower, whose penultimate layer is then the last.
    """
    last = f"cond_stage_model.model.transformer.resblocks.{size['layers'] - 1}."
    state = {key: value for key, value in state.items() if not key.startswith(last)}
    model = CLIPTextModel(CLIPTextConfig(**_clip_sizes({**size, "layers": size["layers"] - 1})))
    weights = conversion.convert_open_clip_checkpoint(model, state)
    if not any(key.startswith("text_model.") for key in model.state_dict()):  # transformers 5
        weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
    return _strictly(model, weights)


def clip_text_with_projection(size: Mapping[str, Any], state: State) -> CLIPTextModelWithProjection:
    """The text tower of a whole CLIP in OpenAI's names."""
    model = CLIPTextModelWithProjection(CLIPTextConfig(**_clip_sizes(size)))
    return _strictly(model, conversion.convert_open_clip_checkpoint(model, dict(state), prefix=""))


def clip_vision(size: Mapping[str, Any], state: State) -> CLIPVisionModelWithProjection:
    """The vision tower of a whole CLIP in OpenAI's names; its blocks by diffusers' conversion of those for text."""
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**_clip_sizes(size)))
    # the width of its blocks, which diffusers has looked for under either name
    blocks = SimpleNamespace(config=SimpleNamespace(hidden_size=size["width"], projection_dim=size["width"]))
    weights = conversion.convert_open_clip_checkpoint(blocks, dict(state), prefix="visual.")
    weights = {key.replace("text_model.", "vision_model."): v for key, v in weights.items() if ".layers." in key}
    names = {"conv1.weight": "embeddings.patch_embedding.weight", "class_embedding": "embeddings.class_embedding"}
    names |= {"positional_embedding": "embeddings.position_embedding.weight"}
    names |= {f"ln_pre.{w}": f"pre_layrnorm.{w}" for w in ("weight", "bias")}
    names |= {f"ln_post.{w}": f"post_layernorm.{w}" for w in ("weight", "bias")}
    weights |= {f"vision_model.{theirs}": state[f"visual.{ours}"] for ours, theirs in names.items()}
    return _strictly(model, weights | {"visual_projection.weight": state["visual.proj"].T})


def _clip_sizes(size: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes in OpenCLIP's names, in those of transformers."""
    names = {"width": "hidden_size", "heads": "num_attention_heads", "layers": "num_hidden_layers"}
    names |= {"vocab_size": "vocab_size", "context_length": "max_position_embeddings", "embed_dim": "projection_dim"}
    names |= {"image_size": "image_size", "patch_size": "patch_size"}
    sizes = {names[key]: value for key, value in size.items() if key in names}
    sizes |= {"intermediate_size": 4 * size["width"], "hidden_act": "quick_gelu" if size.get("quick_gelu") else "gelu"}
    if "vocab_size" in size:
        sizes |= {"bos_token_id": size["vocab_size"] - 2, "eos_token_id": size["vocab_size"] - 1}
    return sizes


def _strictly(model: nn.Module, weights: State) -> nn.Module:
    report = model.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys and all("position_ids" in key for key in report.missing_keys), report
    return model.eval()


def _filled(
    kind: type[nn.Module], config: dict[str, Any], convert: Callable[..., dict[str, Tensor]], state: State, prefix: str
) -> nn.Module:
    ours = {key: value for key, value in state.items() if key.startswith(prefix)}
    weights = convert(ours, config=config)
    assert len(weights) == len(ours), f"{len(ours)} weights became {len(weights)}"
    with torch.device("meta"):
        model = kind.from_config(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    scheduler: Any,
    x: Tensor,
    uncond: Tensor,
    cond: Tensor,
    scale: float,
    concat: Tensor | None = None,
    labels: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Latents from noise x (B, C, h, w) by classifier-free guidance, as diffusers' pipelines do it.

    concat (2 B, C', h, w), labels (2 B, ...): what the network sees beside the latents and the text.
    """
    both = torch.cat([uncond, cond])
    for t in scheduler.timesteps:
        seen = torch.cat([x, x]) if concat is None else torch.cat([torch.cat([x, x]), concat], dim=1)
        without, with_ = unet(seen, t, encoder_hidden_states=both, class_labels=labels).sample.chunk(2)
        x = scheduler.step(without + scale * (with_ - without), t, x, **options).prev_sample
    return x
