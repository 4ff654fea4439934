"""The same weights in diffusers and transformers, made ready as diffusers' guide to speed says.

The guide (docs/source/en/optimization/fp16.md): half precision, channels_last, `torch.compile` of the whole network
with CUDA graphs. Only this module imports either library.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.networks import in_channels_last

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, ModelMixin

    from ldm.modules.encoders.clip_text import CLIPTextModel as OurCLIPTextModel

Config = Mapping[str, Any]  # {"model": {"params": {...}}}
P = ParamSpec("P")
R = TypeVar("R")


def available() -> bool:
    """Whether both libraries are installed."""
    return all(importlib.util.find_spec(name) for name in ("diffusers", "transformers"))


def unet(config: Config, network: nn.Module) -> nn.Module:
    """UNet2DConditionModel with the weights of our UNet."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import single_file_utils as conversion

    state = _named("model.diffusion_model.", network)
    theirs = conversion.create_unet_diffusers_config_from_ldm(config, state)
    return _filled(UNet2DConditionModel, theirs, conversion.convert_ldm_unet_checkpoint(state, config=theirs))


def vae(config: Config, network: nn.Module) -> AutoencoderKL:
    """AutoencoderKL with the weights of our first stage."""
    from diffusers import AutoencoderKL
    from diffusers.loaders import single_file_utils as conversion

    state = _named("first_stage_model.", network)
    theirs = conversion.create_vae_diffusers_config_from_ldm(config, state)
    return _filled(AutoencoderKL, theirs, conversion.convert_ldm_vae_checkpoint(state, config=theirs))


def text(network: OurCLIPTextModel) -> nn.Module:
    """transformers' CLIPTextModel with the weights of our text tower."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ours = network.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    sizes: dict[str, Any] = {
        name: getattr(ours, name) for name in (*names, "max_position_embeddings", "layer_norm_eps")
    }
    end = ours.eos_token_id
    model: nn.Module = CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=end - 1, eos_token_id=end, pad_token_id=end))
    weights = {name: value for name, value in network.state_dict().items() if "position_ids" not in name}
    if not any(name.startswith("text_model.") for name in model.state_dict()):  # transformers 5
        weights = {name.removeprefix("text_model."): value for name, value in weights.items()}
    report = model.load_state_dict(weights, strict=False, assign=True)
    if report.unexpected_keys or any("position_ids" not in name for name in report.missing_keys):
        raise ValueError(f"transformers' text tower differs from ours: {report}")
    return model.to(next(network.parameters()).device).eval().requires_grad_(False)


def pipeline(config: Config, network: nn.Module) -> Callable[..., Tensor]:
    """(latents, context, no context, steps, scale) to latents: StableDiffusionPipeline with DDIM around a UNet."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    params = config["model"]["params"]
    schedule = {"beta_start": params["linear_start"], "beta_end": params["linear_end"]}
    schedule |= {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    # never run: diffusers 0.30 asks it how much smaller its latents are, by the number of its blocks
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    stage = AutoencoderKL(**blocks, block_out_channels=(1,) * 4, norm_num_groups=1)
    pipe = StableDiffusionPipeline(
        **parts, vae=stage, unet=network, scheduler=DDIMScheduler(**schedule), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)

    def draw(x: Tensor, context: Tensor, nothing: Tensor, steps: int, scale: float) -> Tensor:
        """Latents (B, C, h, w) from noise of that shape, under contexts (B, L, D)."""
        return pipe(
            prompt_embeds=context,
            negative_prompt_embeds=nothing,
            num_inference_steps=steps,
            guidance_scale=scale,
            latents=x,
            height=x.shape[2] * pipe.vae_scale_factor,
            width=x.shape[3] * pipe.vae_scale_factor,
            output_type="latent",
        ).images

    return draw


def made_ready(network: nn.Module, way: str) -> nn.Module:
    """A network of theirs for a way of `peer_ways`, as the guide says."""
    network = in_channels_last(network)
    if way == "compiled":
        network.forward = compiled(network.forward)
    return network


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """A function compiled as the guide says; CUDA graphs are part of it."""
    return torch.compile(function, mode="max-autotune", fullgraph=True)


def peer_ways(device: torch.device) -> tuple[str, ...]:
    """Compiled on a GPU, which the guide is about; on a CPU its best setting that takes no minutes of compiling."""
    return ("eager", "compiled") if device.type == "cuda" else ("eager",)


def _named(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in network.state_dict().items()}


def _filled(kind: type[ModelMixin], config: Config, weights: dict[str, Tensor]) -> ModelMixin:
    with torch.device("meta"):
        model = kind.from_config(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)
