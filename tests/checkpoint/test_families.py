"""Which config a file needs, told from the shapes of every public family, and what else a file may be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.checkpoint import Checkpoint, CheckpointError, config_for, describe, detect_config, ema_name, read_checkpoint
from ldm.checkpoint.families import FAMILIES

ROOT = Path(__file__).parents[2]
KEYS = ROOT / "tests" / "reference" / "keys"
V1 = "configs/stable-diffusion/v1-inference.yaml"
V1_INPAINTING = "configs/stable-diffusion/v1-inpainting-inference.yaml"


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    """Key -> shape of one of the public key lists."""
    rows = (line.split("\t") for line in (KEYS / f"{name}.tsv").read_text().splitlines())
    return {key: () if shape == "-" else tuple(int(n) for n in shape.split("x")) for key, shape, _ in rows}


def checkpoint_of(shapes: dict[str, tuple[int, ...]]) -> Checkpoint:
    return Checkpoint(Path("x.ckpt"), {key: torch.empty(shape, device="meta") for key, shape in shapes.items()})


def test_v1_families_are_detected():
    assert detect_config(shapes_of("stable-diffusion.v1-inference")) == V1
    assert detect_config(shapes_of("stable-diffusion.v1-inpainting-inference")) == V1_INPAINTING
    assert config_for(checkpoint_of(shapes_of("stable-diffusion.v1-inference"))) == V1


def test_the_bundled_model_is_detected_anywhere():
    bundled = read_checkpoint(ROOT / "models/ldm/shapes64/model.ckpt")
    assert detect_config(bundled.shapes) == "models/ldm/shapes64/config.yaml"


def test_configs_of_families_that_load_exist():
    for family in FAMILIES:
        if family.loads:
            assert (ROOT / family.configs[0]).is_file(), family


def test_partial_v1_files_are_still_v1():
    whole = shapes_of("stable-diffusion.v1-inference")
    unet = {key: shape for key, shape in whole.items() if key.startswith("model.")}
    assert detect_config(unet) == V1
    ema = {ema_name(key): shape for key, shape in unet.items()}
    rest = {key: shape for key, shape in whole.items() if not key.startswith("model.")}
    assert detect_config({**ema, **rest}) == V1
    with_control = {**whole, "control_model.zero_convs.0.0.weight": (320, 320, 1, 1)}
    assert detect_config(with_control) == V1


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ("stable-diffusion.v2-inference", "Stable Diffusion v2 (configs/stable-diffusion/v2-inference.yaml or "),
        ("stable-diffusion.v2-inference-v", "v2-inference-v.yaml"),
        ("stable-diffusion.v2-inpainting-inference", "Stable Diffusion v2 inpainting"),
        ("stable-diffusion.v2-1-stable-unclip-h-inference", "Stable Diffusion v2 unCLIP"),
        ("stable-diffusion.x4-upscaling", "x4 upscaler"),
        ("latent-diffusion.txt2img-1p4B-eval", "configs/latent-diffusion/txt2img-1p4B-eval.yaml"),
        ("ldm.text2img256", "models/ldm/text2img256/config.yaml"),
        ("latent-diffusion.cin256-v2", "ImageNet"),
        ("retrieval-augmented-diffusion.768x768", "retrieval-augmented diffusion"),
        ("ldm.celeba256", "a latent diffusion model of a kind"),
        ("ldm.inpainting_big", "a latent diffusion model of a kind"),
        ("first_stage_models.kl-f8", "an autoencoder (VAE) alone"),
        ("first_stage_models.vq-f4", "an autoencoder (VAE) alone"),
    ],
)
def test_other_public_families_are_named_and_refused(keys, name):
    shapes = shapes_of(keys)
    assert detect_config(shapes) is None
    assert name in describe(shapes)
    with pytest.raises(CheckpointError, match=r"^x\.ckpt ") as caught:
        config_for(checkpoint_of(shapes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("channels", [(8, "InstructPix2Pix"), (5, "of a kind that is not known")])
def test_other_widths_of_the_first_convolution(channels):
    shapes = shapes_of("stable-diffusion.v1-inference")
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (320, channels[0], 3, 3)
    assert channels[1] in describe(shapes)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.attn1.to_q.lora_A.weight", "a LoRA"),
        ("down_blocks.0.attentions.0.attn1.processor.to_q_lora.down.weight", "a LoRA"),
        ("lycoris_x.hada_w1_a", "a LoRA"),
        ("control_model.input_hint_block.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("down_blocks.0.resnets.0.conv1.weight", "a UNet in the diffusers layout"),
        ("encoder.down_blocks.0.resnets.0.conv1.weight", "an autoencoder (VAE) in the diffusers layout"),
        ("first_stage_model.decoder.conv_in.weight", "an autoencoder (VAE) alone"),
        ("text_model.embeddings.token_embedding.weight", "a text encoder alone"),
        ("input_blocks.0.0.weight", "a UNet alone"),
        ("emb_params", "a textual inversion embedding"),
        ("<my-cat>", "a textual inversion embedding"),
    ],
)
def test_files_that_hold_no_whole_model(key, name):
    checkpoint = checkpoint_of({key: (4, 4)})
    assert describe(checkpoint.shapes) == name
    with pytest.raises(CheckpointError, match="not a whole model") as caught:
        config_for(checkpoint)
    assert f"x.ckpt is {name}" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "SDXL"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
    ],
)
def test_later_models_are_named(key, name):
    with pytest.raises(CheckpointError, match=f"looks like {name}, a family that this version does not load"):
        config_for(checkpoint_of({key: (4, 4)}))


def test_files_that_say_nothing():
    with pytest.raises(CheckpointError, match=r"no model that is known here \(its first weights: fc.weight\)"):
        config_for(checkpoint_of({"fc.weight": (10, 10)}))


def test_ema_names_are_those_of_the_public_files():
    expected = [key for key in shapes_of("stable-diffusion.v1-inpainting-inference") if key.startswith("model_ema.")]
    weights = [key for key in shapes_of("stable-diffusion.v1-inpainting-inference") if key.startswith("model.")]
    assert [ema_name(key) for key in weights] == expected[2:]  # decay and num_updates come first
