"""Our networks with random weights, and baselines with the same weights in diffusers and transformers.

The baselines are prepared as diffusers' guide (docs/source/en/optimization/fp16.md) says: half precision,
channels_last, `torch.compile` of the network with CUDA graphs.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ldm import acceleration
from ldm.checkpoint import build_on_meta

if TYPE_CHECKING:
    from diffusers import AutoencoderKL as DiffusersAutoencoderKL

    from ldm.models.diffusion.ddpm import LatentDiffusion
    from ldm.modules.encoders.clip_text import CLIPTextModel

Config = Mapping[str, Any]  # {"model": {"params": {...}}}
N = TypeVar("N", bound=nn.Module)

POOL = 4_194_301  # random numbers for weights; a prime, so that no two channels are equal


class Unavailable(ValueError):
    """A mode that this machine does not support."""


def prepare(network: N, mode: str, device: torch.device, config: Config | None = None) -> N:
    """Prepare a copy of a network, which shares its weights, for a mode of `settings.MODES`.

    Args:
        network: A network with weights.
        mode: "eager", "compile" or "int8".
        device: Where it is.
        config: The model's config, for "compile".

    Raises:
        Unavailable: If this machine does not support the mode.
    """
    network = sharing_copy(network)
    if device.type == "cpu":
        acceleration.accelerate(network)
    else:
        network = channels_last(network)
    if mode == "int8":
        try:
            acceleration.quantize_int8(network)
        except ValueError as error:
            raise Unavailable(str(error)) from error
    elif mode == "compile":
        assert config is not None
        if not acceleration.compile_network(around(config, network, device)):
            raise Unavailable("it has no effect here")
    return network


def around(config: Config, network: nn.Module, device: torch.device) -> LatentDiffusion:
    """Build the config's model around a UNet, without encoder and first stage."""
    model = on_meta(config["model"])
    model.first_stage_model = model.cond_stage_model = nn.Identity()
    model.model.diffusion_model = network
    return model.to(device)


def channels_last(network: N) -> N:
    """Convert convolution weights to channels-last order, in place."""
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch declares it nowhere


def sharing_copy(network: N) -> N:
    """Copy modules and parameters but not memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, memo | {id(buffer): buffer for buffer in network.buffers()})


def on_meta(model_config: Mapping[str, Any]) -> LatentDiffusion:
    """Build a config's model without weights, to count operations and to take networks from."""
    return cast("LatentDiffusion", build_on_meta(model_config)).eval().requires_grad_(False)


@torch.no_grad()
def with_weights(network: N, device: torch.device, dtype: torch.dtype = torch.float32) -> N:
    """Copy a network from `on_meta` with random weights that preserve the scale of activations.

    Norms are the identity and biases 0; buffers stay.
    """
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0), device="cpu")
    weights = {name: _weight(name, p, pool).to(dtype) for name, p in network.named_parameters()}
    network = copy.deepcopy(network)
    network.load_state_dict(weights, strict=False, assign=True)
    return network.to(device).eval().requires_grad_(False)


def _weight(name: str, like: Tensor, pool: Tensor) -> Tensor:
    if like.ndim < 2:
        return torch.full(like.shape, float(name.endswith("weight")), device="cpu")  # norms, biases
    weight = torch.empty(like.numel(), device="cpu")
    scale = like[0].numel() ** -0.5
    for start in range(0, len(weight), POOL):
        part = weight[start : start + POOL]
        torch.mul(pool[: len(part)], scale, out=part)
    return weight.view(like.shape)


# ---- baselines ----


def has_baselines() -> bool:
    """Whether diffusers and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("diffusers", "transformers"))


def baseline_modes(device: torch.device) -> tuple[str, ...]:
    """Modes of the baselines: compiled on a GPU, which the guide is about; on a CPU compiling takes minutes."""
    return ("eager", "compiled") if device.type == "cuda" else ("eager",)


def prepare_baseline(network: nn.Module, mode: str) -> nn.Module:
    """Prepare a baseline network for one of `baseline_modes`."""
    network = channels_last(network)
    if mode == "compiled":
        network.forward = compile_baseline(network.forward)
    return network


def compile_baseline(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with CUDA graphs."""
    return torch.compile(function, mode="max-autotune", fullgraph=True)


def diffusers_unet(config: Config, network: nn.Module) -> nn.Module:
    """Build UNet2DConditionModel with the weights of our UNet."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import single_file_utils as conversion

    state = _prefixed("model.diffusion_model.", network)
    theirs = conversion.create_unet_diffusers_config_from_ldm(config, state)
    return _filled(UNet2DConditionModel, theirs, conversion.convert_ldm_unet_checkpoint(state, config=theirs))


def diffusers_vae(config: Config, network: nn.Module) -> DiffusersAutoencoderKL:
    """Build AutoencoderKL with the weights of our first stage."""
    from diffusers import AutoencoderKL
    from diffusers.loaders import single_file_utils as conversion

    state = _prefixed("first_stage_model.", network)
    theirs = conversion.create_vae_diffusers_config_from_ldm(config, state)
    return _filled(AutoencoderKL, theirs, conversion.convert_ldm_vae_checkpoint(state, config=theirs))


def transformers_text(network: CLIPTextModel) -> nn.Module:
    """Build transformers' CLIPTextModel with the weights of our text tower."""
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


def diffusers_loop(config: Config, network: nn.Module) -> Callable[[Tensor, Tensor, Tensor, int, float], Tensor]:
    """Build StableDiffusionPipeline with DDIM around a UNet.

    Returns:
        A function (latents, context, unconditional context, steps, scale) -> latents.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    params = config["model"]["params"]
    schedule = {"beta_start": params["linear_start"], "beta_end": params["linear_end"]}
    schedule |= {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    # never run: diffusers 0.30 derives the scale factor of latents from its number of blocks
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    stage = AutoencoderKL(**blocks, block_out_channels=(1,) * 4, norm_num_groups=1)
    pipe = StableDiffusionPipeline(
        **parts, vae=stage, unet=network, scheduler=DDIMScheduler(**schedule), requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)

    def sample(x: Tensor, context: Tensor, unconditional: Tensor, steps: int, scale: float) -> Tensor:
        return pipe(
            prompt_embeds=context,
            negative_prompt_embeds=unconditional,
            num_inference_steps=steps,
            guidance_scale=scale,
            latents=x,
            height=x.shape[2] * pipe.vae_scale_factor,
            width=x.shape[3] * pipe.vae_scale_factor,
            output_type="latent",
        ).images

    return sample


def _prefixed(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in network.state_dict().items()}


def _filled(kind: Any, config: Any, weights: dict[str, Tensor]) -> Any:
    with torch.device("meta"):
        model = kind.from_config(config)
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval().requires_grad_(False)
