"""The config of a file, from the shapes of every public family, and descriptions of other files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.checkpoint import Checkpoint, CheckpointError, config_for, describe, detect_config, ema_name, read_checkpoint
from ldm.checkpoint.families import FAMILIES, family_of

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


def test_bundled_model_is_detected():
    bundled = read_checkpoint(ROOT / "models/ldm/shapes64/model.ckpt")
    assert detect_config(bundled.shapes) == "models/ldm/shapes64/config.yaml"


def test_configs_exist_and_belong_to_one_family():
    configs = [config for family in FAMILIES for config in family.configs]
    assert all((ROOT / config).is_file() for config in configs)
    assert len(configs) == len(set(configs)) == 41 + 1  # the public ones and the bundled model's


def config_of(keys: str) -> str:
    """The public config of a key list: "ldm.cin256" is of models/ldm/cin256/config.yaml."""
    folder, _, name = keys.partition(".")
    places = (f"configs/{folder}/{name}.yaml", f"models/{folder}/{name}/config.yaml")
    return next(place for place in places if (ROOT / place).is_file())


LISTS = sorted(path.stem for path in KEYS.glob("*.tsv"))
AUTOENCODERS = [name for name in LISTS if name.startswith(("autoencoder.", "first_stage_models."))]
WHOLE = [name for name in LISTS if name not in AUTOENCODERS]


def plain(shapes):
    """Without averages."""
    return {key: shape for key, shape in shapes.items() if not key.startswith("model_ema.")}


def averages_only(shapes):
    """As `prune` and other tools leave it: the UNet's averages, and everything but the UNet."""
    ema = {ema_name(key): shape for key, shape in shapes.items() if key.startswith("model.")}
    return ema | {key: shape for key, shape in plain(shapes).items() if not key.startswith("model.")}


def without_condition(shapes):
    parts = ("cond_stage_model.", "embedder.", "noise_augmentor.", "low_scale_model.")
    return {key: shape for key, shape in shapes.items() if not key.startswith(parts)}


def unet_alone(shapes):
    return {key: shape for key, shape in shapes.items() if key.startswith("model.")}


@pytest.mark.parametrize("keys", WHOLE)
@pytest.mark.parametrize("held", [dict, plain, averages_only, without_condition, unet_alone])
def test_complete_models_are_recognised(keys, held):
    shapes = held(shapes_of(keys))
    family = family_of(shapes)
    assert family.complete and config_of(keys) in family.configs
    assert detect_config(shapes) == config_for(checkpoint_of(shapes)) == family.configs[0]
    assert describe(shapes).startswith(f"{family.name} ({family.configs[0]}")


@pytest.mark.parametrize("keys", AUTOENCODERS)
def test_autoencoders_are_recognised(keys):
    shapes = shapes_of(keys) | {"loss.logvar": (), "loss.discriminator.main.0.weight": (64, 3, 4, 4)}
    family = family_of(shapes)
    assert not family.complete and config_of(keys) in family.configs
    assert detect_config(shapes) == config_for(checkpoint_of(shapes), complete=False) == family.configs[0]
    with pytest.raises(CheckpointError, match=r"^x.ckpt is an autoencoder \(VAE\) alone, not a complete model"):
        config_for(checkpoint_of(shapes))


def test_first_stage_inside_a_model_is_not_an_autoencoder_file():
    shapes = {f"first_stage_model.{key}": shape for key, shape in shapes_of("first_stage_models.kl-f8").items()}
    assert family_of(shapes) is None and describe(shapes) == "an autoencoder (VAE) alone"


def test_models_with_equal_shapes():
    together = [family.configs for family in FAMILIES if len(family.configs) > 1 and family.complete]
    names = [[config.removesuffix(".yaml").removesuffix("/config").split("/")[-1] for config in g] for g in together]
    assert names == [
        ["v2-inference", "v2-inference-v"],
        ["cin256", "cin-ldm-vq-f8"],
        ["celeba256", "ffhq256", "lsun_beds256", "celebahq-ldm-vq-4", "ffhq-ldm-vq-4", "lsun_bedrooms-ldm-vq-4"],
        ["lsun_churches256", "lsun_churches-ldm-kl-8"],
        ["semantic_synthesis256", "semantic_synthesis512"],
    ]


def test_depth_to_image_is_recognised():
    shapes = shapes_of("stable-diffusion.v2-inpainting-inference")
    shapes |= {"model.diffusion_model.input_blocks.0.0.weight": (320, 5, 3, 3)}
    for held in (dict, averages_only, unet_alone):
        assert detect_config(held(shapes)) == "configs/stable-diffusion/v2-midas-inference.yaml"


def test_both_unclip_models_are_distinguished():
    shapes = shapes_of("stable-diffusion.v2-1-stable-unclip-h-inference")
    assert "unclip-h" in detect_config(shapes)
    shapes["model.diffusion_model.label_emb.0.0.weight"] = (1280, 1536)
    assert "unclip-l" in detect_config(shapes) and "unclip-l" in detect_config(averages_only(shapes))
    shapes["model.diffusion_model.label_emb.0.0.weight"] = (1280, 1000)
    assert detect_config(shapes) is None


@pytest.mark.parametrize(
    ("keys", "table", "size"),
    [
        ("ldm.cin256", "embedding", (10, 512)),
        ("ldm.layout2img-openimages256", "transformer.token_emb", (30522, 512)),
        ("ldm.text2img256", "embedding", (30522, 640)),
    ],
)
def test_public_unet_with_another_text_encoder_is_unknown(keys, table, size):
    own = without_condition(shapes_of(keys)) | {f"cond_stage_model.{table}.weight": size}
    assert detect_config(own) is None
    with pytest.raises(CheckpointError, match="name its config with --config"):
        config_for(checkpoint_of(own))


def test_partial_v1_files_are_still_v1():
    whole = shapes_of("stable-diffusion.v1-inference")
    unet = {key: shape for key, shape in whole.items() if key.startswith("model.")}
    assert detect_config(unet) == V1
    ema = {ema_name(key): shape for key, shape in unet.items()}
    rest = {key: shape for key, shape in whole.items() if not key.startswith("model.")}
    assert detect_config({**ema, **rest}) == V1
    with_control = {**whole, "control_model.zero_convs.0.0.weight": (320, 320, 1, 1)}
    assert detect_config(with_control) == V1


@pytest.mark.parametrize("channels", [(8, "InstructPix2Pix"), (5, "of an unknown kind")])
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
def test_incomplete_models_are_described(key, name):
    checkpoint = checkpoint_of({key: (4, 4)})
    assert describe(checkpoint.shapes) == name
    with pytest.raises(CheckpointError, match="not a complete model") as caught:
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
def test_later_model_families_are_named(key, name):
    with pytest.raises(CheckpointError, match=f"looks like {name}, a family that this version does not load"):
        config_for(checkpoint_of({key: (4, 4)}))


def test_variants_of_v1_are_distinguished():
    v1 = shapes_of("stable-diffusion.v1-inference")
    first = {"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}
    assert describe(v1 | first | {"cc_projection.weight": (768, 772)}) == "Zero-1-to-3"
    # image variations: pictures as the condition, by OpenAI's CLIP
    tower = {"cond_stage_model.model.token_embedding.weight": (49408, 768)}
    variations = without_condition(v1) | tower
    assert detect_config(variations) is None
    with pytest.raises(CheckpointError, match="name its config with --config"):
        config_for(checkpoint_of(variations))


def test_unknown_files_are_refused():
    with pytest.raises(CheckpointError, match=r"no known model \(its first weights: fc.weight\)"):
        config_for(checkpoint_of({"fc.weight": (10, 10)}))


def test_ema_names_match_public_files():
    expected = [key for key in shapes_of("stable-diffusion.v1-inpainting-inference") if key.startswith("model_ema.")]
    weights = [key for key in shapes_of("stable-diffusion.v1-inpainting-inference") if key.startswith("model.")]
    assert [ema_name(key) for key in weights] == expected[2:]  # decay and num_updates come first
