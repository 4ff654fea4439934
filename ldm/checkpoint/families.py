"""Recognise what a checkpoint is by its keys and shapes: the public configs that fit, or why it cannot be used.

To add a family, add a row to `FAMILIES`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.checkpoint.reading import Checkpoint, CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

UNET = "model.diffusion_model."

# The table of tokens or classes of each kind of conditioning.
TEXT_TOWERS = {
    "clip": "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "openclip": "cond_stage_model.model.token_embedding.weight",
    "bert": "cond_stage_model.transformer.token_emb.weight",
    "class": "cond_stage_model.embedding.weight",
}


def ema_name(key: str) -> str:
    """Return `LitEma`'s name for the average of a weight: no dots, and no `model.` before a UNet's.

    Averages of a condition's encoder, which only models with `ema_cond_stage` have, have a prefix of their own.
    """
    if key.startswith("cond_stage_model."):
        return "cond_stage_ema." + key.removeprefix("cond_stage_model.").replace(".", "")
    return "model_ema." + key.removeprefix("model.").replace(".", "")


@dataclass(frozen=True)
class Features:
    """The sizes that tell families apart; None where a file has no such part."""

    unet: bool = False  # any weight of a UNet, plain or EMA
    in_channels: int | None = None  # of the UNet: latent 4, inpainting 9, ...
    width: int | None = None  # the UNet's model_channels
    context: int | None = None  # width of the context of cross-attention
    vector: int | None = None  # width of the class or vector that is added to the timestep embedding
    text: str | None = None  # one of TEXT_TOWERS
    vocabulary: int | None = None
    # of an autoencoder in a file of its own; its factor is pixels per latent, along a side
    ae_width: int | None = None
    ae_factor: int | None = None
    ae_channels: int | None = None
    ae_codes: int | None = None  # entries of the codebook
    ae_attention: bool = False


def features(shapes: Shapes) -> Features:
    """Return the `Features` of a file with these shapes by published key."""
    text = next((name for name, key in TEXT_TOWERS.items() if shapes.get(key)), None)
    tower: dict[str, Any] = {"text": text, "vocabulary": shapes[TEXT_TOWERS[text]][0] if text else None}
    if not any(key.startswith((UNET, ema_name(UNET))) for key in shapes):
        return Features(**tower, **_autoencoder(shapes))
    width, in_channels = _unet_shape(shapes, "input_blocks.0.0.weight", 4)[:2]
    contexts = (shape[-1] for key, shape in shapes.items() if re.search(r"attn2\.?to_k\.?weight$", key) and shape)
    vectors = (_unet_shape(shapes, name, 2)[-1] for name in ("label_emb.weight", "label_emb.0.0.weight"))
    return Features(
        unet=True,
        in_channels=in_channels,
        width=width,
        context=next(contexts, None),
        vector=next((vector for vector in vectors if vector is not None), None),
        **tower,
    )


def _unet_shape(shapes: Shapes, name: str, axes: int) -> tuple[int | None, ...]:
    """Return the shape of the UNet's weight `name`, plain or EMA; all None if there is none with so many axes."""
    shape = shapes.get(UNET + name) or shapes.get(ema_name(UNET + name)) or ()
    return shape if len(shape) == axes else (None,) * axes


def _autoencoder(shapes: Shapes) -> dict[str, Any]:
    """Return the features of a file that holds only an autoencoder, without a prefix."""
    first, latent = shapes.get("encoder.conv_in.weight"), shapes.get("post_quant_conv.weight")
    if not first or not latent:
        return {}
    levels = {match[1] for key in shapes if (match := re.match(r"encoder\.down\.(\d+)\.", key))}
    return {
        "ae_width": first[0],
        "ae_factor": 2 ** (len(levels) - 1),
        "ae_channels": latent[1],
        "ae_codes": shapes.get("quantize.embedding.weight", (None,))[0],
        "ae_attention": "decoder.mid.attn_1.q.weight" in shapes,
    }


@dataclass(frozen=True)
class Family:
    """A kind of model: how to recognise its files, and the public configs that fit them.

    Where shapes cannot tell several configs apart, the first is used unless the loader knows more: Stable Diffusion
    v2's two differ in what the network predicts, which the loader finds out by running it; configs for other data sets
    differ in nothing that sampling uses. A family without configs is recognised only to be refused.
    """

    name: str
    configs: tuple[str, ...] = ()
    wants: Mapping[str, Any] = field(default_factory=dict)  # features of its files
    tower: Mapping[str, Any] = field(default_factory=dict)  # features of files that include the tower
    key: str | None = None  # a prefix of keys of its files
    complete: bool = True  # a model to sample from, not only an autoencoder

    @property
    def loads(self) -> bool:
        """Whether there is a config for its files."""
        return bool(self.configs)

    def fits(self, found: Features, shapes: Shapes) -> bool:
        """Return whether a file with these features and shapes is of this family."""
        if self.key is not None and not any(key.startswith(self.key) for key in shapes):
            return False
        if found.text is not None and any(getattr(found, name) != value for name, value in self.tower.items()):
            return False
        return all(getattr(found, name) == value for name, value in self.wants.items())

    def __str__(self) -> str:
        named = " or ".join(self.configs[:2]) + (", ..." if len(self.configs) > 2 else "")
        return f"{self.name} ({named})" if named else self.name


def _sd(*names: str) -> tuple[str, ...]:
    return tuple(f"configs/stable-diffusion/{name}.yaml" for name in names)


def _ldm(*names: str) -> tuple[str, ...]:
    return tuple(f"configs/latent-diffusion/{name}.yaml" for name in names)


def _models(*names: str) -> tuple[str, ...]:
    return tuple(f"models/ldm/{name}/config.yaml" for name in names)


def _unet(width: int, in_channels: int, context: int | None = None, vector: int | None = None) -> dict[str, Any]:
    return {"unet": True, "width": width, "in_channels": in_channels, "context": context, "vector": vector}


def _first_stage(name: str, factor: int, channels: int, codes: int | None = None, *others: str) -> Family:
    kind = "KL-regularised" if codes is None else "vector-quantised"
    wants = {"unet": False, "ae_width": 128, "ae_factor": factor, "ae_channels": channels, "ae_codes": codes}
    return Family(
        f"the {kind} autoencoder {name} alone",
        (f"models/first_stage_models/{name}/config.yaml", *others),
        wants | {"ae_attention": "noattn" not in name},
        complete=False,
    )


UNKNOWN = Family("a latent diffusion model of an unknown kind", wants={"unet": True})

# The first row that fits counts.
FAMILIES = (
    Family("SDXL", key="conditioner.embedders."),
    Family("Stable Diffusion 3", key=UNET + "joint_blocks."),
    Family("Flux", key=UNET + "double_blocks."),
    Family("Flux", key="double_blocks."),
    Family("Zero-1-to-3", key="cc_projection."),
    Family("Stable Diffusion v1", _sd("v1-inference"), _unet(320, 4, 768), {"text": "clip"}),
    Family("Stable Diffusion v1 inpainting", _sd("v1-inpainting-inference"), _unet(320, 9, 768), {"text": "clip"}),
    Family("InstructPix2Pix on Stable Diffusion v1", (), _unet(320, 8, 768)),
    Family("Stable Diffusion v2", _sd("v2-inference", "v2-inference-v"), _unet(320, 4, 1024)),
    Family("Stable Diffusion v2 inpainting", _sd("v2-inpainting-inference"), _unet(320, 9, 1024)),
    Family("Stable Diffusion v2 depth2img", _sd("v2-midas-inference"), _unet(320, 5, 1024)),
    Family("Stable Diffusion v2 unCLIP on ViT-H", _sd("v2-1-stable-unclip-h-inference"), _unet(320, 4, 1024, 2048)),
    Family("Stable Diffusion v2 unCLIP on ViT-L", _sd("v2-1-stable-unclip-l-inference"), _unet(320, 4, 1024, 1536)),
    Family("the Stable Diffusion x4 upscaler", _sd("x4-upscaling"), _unet(256, 7, 1024, 1024)),
    Family(
        "the latent diffusion text-to-image model txt2img-f8-large",
        _ldm("txt2img-1p4B-eval"),
        _unet(320, 4, 1280),
        {"text": "bert"},
    ),
    Family("latent diffusion text2img256", _models("text2img256"), _unet(192, 3, 640), {"text": "bert"}),
    Family(
        "class-conditional latent diffusion on ImageNet, f4",
        _ldm("cin256-v2"),
        _unet(192, 3, 512),
        {"text": "class", "vocabulary": 1001},
    ),
    Family(
        "class-conditional latent diffusion on ImageNet, f8",
        _models("cin256") + _ldm("cin-ldm-vq-f8"),
        _unet(256, 4, 512),
        {"text": "class", "vocabulary": 1000},
    ),
    Family(
        "unconditional latent diffusion on CelebA-HQ, FFHQ or LSUN bedrooms",
        _models("celeba256", "ffhq256", "lsun_beds256")
        + _ldm("celebahq-ldm-vq-4", "ffhq-ldm-vq-4", "lsun_bedrooms-ldm-vq-4"),
        _unet(224, 3),
    ),
    Family(
        "unconditional latent diffusion on LSUN churches",
        _models("lsun_churches256") + _ldm("lsun_churches-ldm-kl-8"),
        _unet(192, 4),
    ),
    Family(
        "latent diffusion for semantic synthesis",
        _models("semantic_synthesis256", "semantic_synthesis512"),
        _unet(128, 6),
    ),
    Family("latent diffusion for super-resolution", _models("bsr_sr"), _unet(160, 6)),
    Family("latent diffusion for inpainting", _models("inpainting_big"), _unet(256, 7)),
    Family(
        "layout-to-image latent diffusion",
        _models("layout2img-openimages256"),
        _unet(128, 3, 512),
        {"text": "bert", "vocabulary": 8192},
    ),
    Family(
        "retrieval-augmented diffusion", ("configs/retrieval-augmented-diffusion/768x768.yaml",), _unet(448, 16, 768)
    ),
    Family("the bundled model of shapes", _models("shapes64"), {"text": "clip", "vocabulary": 35, "context": 128}),
    UNKNOWN,
    _first_stage("kl-f4", 4, 3, None, "configs/autoencoder/autoencoder_kl_64x64x3.yaml"),
    _first_stage("kl-f8", 8, 4, None, "configs/autoencoder/autoencoder_kl_32x32x4.yaml"),
    _first_stage("kl-f16", 16, 16, None, "configs/autoencoder/autoencoder_kl_16x16x16.yaml"),
    _first_stage("kl-f32", 32, 64, None, "configs/autoencoder/autoencoder_kl_8x8x64.yaml"),
    _first_stage("vq-f4", 4, 3, 8192),
    _first_stage("vq-f4-noattn", 4, 3, 8192),
    _first_stage("vq-f8", 8, 4, 16384),
    _first_stage("vq-f8-n256", 8, 4, 256),
    _first_stage("vq-f16", 16, 8, 16384),
)

# Files without a complete model: what they are, and keys that only they have.
PARTS = (
    ("a LoRA", r"lora_(up|down|A|B)\b|lora_(unet|te\d?)_|_lora\.|\.(hada_w|lokr_w|oft_)"),
    ("a ControlNet", r"^(control_model\.|controlnet_|input_hint_block\.|zero_convs\.)"),
    ("a UNet in the diffusers layout", r"^(down_blocks|up_blocks|mid_block)\."),
    ("an autoencoder (VAE) in the diffusers layout", r"^(encoder\.down_blocks|decoder\.up_blocks)\."),
    ("an autoencoder (VAE) alone", r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up)\b"),
    ("a text encoder alone", r"^(cond_stage_model\.|text_model\.|embeddings\.|transformer\.resblocks\.)"),
    ("a UNet alone", r"^(diffusion_model\.)?input_blocks\."),
    ("a textual inversion embedding", r"^(emb_params|<.*>|clip_[lg])$"),
)


def family_of(shapes: Shapes) -> Family | None:
    """Return the first family that a file with these shapes by published key fits, or None."""
    found = features(shapes)
    return next((family for family in FAMILIES if family.fits(found, shapes)), None)


def detect_config(shapes: Shapes) -> str | None:
    """Return the public config for a file, such as `configs/stable-diffusion/v1-inference.yaml`.

    None if there is none; `config_for` says why.
    """
    family = family_of(shapes)
    return family.configs[0] if family and family.loads else None


def _part_of(shapes: Shapes) -> str | None:
    return next((name for name, pattern in PARTS if any(re.search(pattern, key) for key in shapes)), None)


def describe(shapes: Shapes) -> str:
    """Describe a file for a message: "Stable Diffusion v2 (configs/...)", "a LoRA", ..."""
    family = family_of(shapes)
    return str(family) if family else _part_of(shapes) or "an unknown model"


def config_for(checkpoint: Checkpoint, *, complete: bool = True) -> str:
    """Return the public config for a checkpoint.

    Args:
        checkpoint: from `read_checkpoint`.
        complete: whether the file must hold a model to sample from, or an autoencoder alone is enough.

    Raises:
        CheckpointError: there is no such config; the message says what the file is.
    """
    family = family_of(checkpoint.shapes)
    if family is None or (complete and not family.complete):
        raise CheckpointError(not_a_model(checkpoint))
    if family is UNKNOWN:
        raise CheckpointError(f"{checkpoint.path} holds {family}: name its config with --config")
    if not family.loads:
        raise CheckpointError(f"{checkpoint.path} looks like {family}, a family that this version does not load")
    return family.configs[0]


def not_a_model(checkpoint: Checkpoint) -> str:
    """Return a message about a file without a known UNet."""
    part = _part_of(checkpoint.shapes)
    if part:
        use = ", or use scripts/reconstruct.py for this one" if "autoencoder (VAE) alone" in part else ""
        return f"{checkpoint.path} is {part}, not a complete model: name a checkpoint with the model itself{use}"
    first = ", ".join(list(checkpoint.shapes)[:3])
    return f"{checkpoint.path} holds no known model (its first weights: {first})"
