"""The same weights in other libraries: diffusers' own conversion of our configs and state dicts, and its networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as conversion
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

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
    unet: UNet2DConditionModel, scheduler: Any, x: Tensor, uncond: Tensor, cond: Tensor, scale: float, **options: Any
) -> Tensor:
    """Latents from noise x (B, C, h, w) by classifier-free guidance, as diffusers' pipelines do it."""
    both = torch.cat([uncond, cond])
    for t in scheduler.timesteps:
        without, with_ = unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample.chunk(2)
        x = scheduler.step(without + scale * (with_ - without), t, x, **options).prev_sample
    return x
