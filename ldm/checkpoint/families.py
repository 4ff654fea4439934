"""What a checkpoint is, told from its keys and shapes: the public config it needs, or why it cannot serve.

A further family is one more row of `FAMILIES`; set `loads` once its config is in the repository.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm.checkpoint.reading import Checkpoint, CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

UNET = "model.diffusion_model."
FIRST_CONV = UNET + "input_blocks.0.0.weight"

# Where each kind of conditioning keeps its table of tokens or classes.
TEXT_TOWERS = {
    "clip": "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "openclip": "cond_stage_model.model.token_embedding.weight",
    "bert": "cond_stage_model.transformer.token_emb.weight",
    "class": "cond_stage_model.embedding.weight",
}


def ema_name(key: str) -> str:
    """The name under which `LitEma` keeps its copy of a weight: no dots, and no `model.` before a UNet's.

    Copies of a condition's encoder, which only models with `ema_cond_stage` have, stand apart from the UNet's.
    """
    if key.startswith("cond_stage_model."):
        return "cond_stage_ema." + key.removeprefix("cond_stage_model.").replace(".", "")
    return "model_ema." + key.removeprefix("model.").replace(".", "")


@dataclass(frozen=True)
class Features:
    """The few sizes that tell families apart; None where a file has no such part."""

    unet: bool  # any weight of a UNet, plain or EMA
    in_channels: int | None  # of the UNet: latent 4, inpainting 9, ...
    width: int | None  # the UNet's model_channels
    context: int | None  # width of cross-attention's context
    text: str | None  # one of TEXT_TOWERS
    vocabulary: int | None
    labelled: bool  # a class or vector conditioning enters with the timestep


def features(shapes: Shapes) -> Features:
    """The `Features` of a file whose tensors have these shapes, under published names."""
    conv = shapes.get(FIRST_CONV) or shapes.get(ema_name(FIRST_CONV)) or (None, None)
    contexts = (shape[-1] for key, shape in shapes.items() if re.search(r"attn2\.?to_k\.?weight$", key) and shape)
    text = next((name for name, key in TEXT_TOWERS.items() if key in shapes), None)
    return Features(
        unet=any(key.startswith((UNET, ema_name(UNET))) for key in shapes),
        in_channels=conv[1] if len(conv) > 1 else None,
        width=conv[0],
        context=next(contexts, None),
        text=text,
        vocabulary=shapes[TEXT_TOWERS[text]][0] if text else None,
        labelled=any(key.startswith(UNET + "label_emb.") for key in shapes),
    )


@dataclass(frozen=True)
class Family:
    """A kind of model, the public configs that fit its files (several if shapes cannot tell) and its features."""

    name: str
    configs: tuple[str, ...]
    wants: Mapping[str, Any] = field(default_factory=dict)  # features that a file of this family has
    part: str | None = None  # a beginning of keys that a file of this family has
    loads: bool = False

    def fits(self, found: Features, shapes: Shapes) -> bool:
        if self.part is not None and not any(key.startswith(self.part) for key in shapes):
            return False
        return all(getattr(found, name) == value for name, value in self.wants.items())

    def __str__(self) -> str:
        return f"{self.name} ({' or '.join(self.configs)})" if self.configs else self.name


_SD = "configs/stable-diffusion/"
_V1 = {"width": 320, "context": 768}
_V2 = {"width": 320, "context": 1024}

UNKNOWN = Family("a latent diffusion model of a kind that is not known here", (), {"unet": True})

# The first row that fits counts.
FAMILIES = (
    Family("SDXL", (), part="conditioner.embedders."),
    Family("Stable Diffusion 3", (), part=UNET + "joint_blocks."),
    Family("Flux", (), part=UNET + "double_blocks."),
    Family("Flux", (), part="double_blocks."),
    Family("Stable Diffusion v1", (_SD + "v1-inference.yaml",), {**_V1, "in_channels": 4}, loads=True),
    Family(
        "Stable Diffusion v1 inpainting",
        (_SD + "v1-inpainting-inference.yaml",),
        {**_V1, "in_channels": 9},
        loads=True,
    ),
    Family("InstructPix2Pix on Stable Diffusion v1", (), {**_V1, "in_channels": 8}),
    Family(
        "Stable Diffusion v2 unCLIP",
        (_SD + "v2-1-stable-unclip-h-inference.yaml", _SD + "v2-1-stable-unclip-l-inference.yaml"),
        {**_V2, "in_channels": 4, "labelled": True},
    ),
    Family(
        "Stable Diffusion v2",
        (_SD + "v2-inference.yaml", _SD + "v2-inference-v.yaml"),
        {**_V2, "in_channels": 4},
    ),
    Family("Stable Diffusion v2 inpainting", (_SD + "v2-inpainting-inference.yaml",), {**_V2, "in_channels": 9}),
    Family("Stable Diffusion v2 depth2img", (_SD + "v2-midas-inference.yaml",), {**_V2, "in_channels": 5}),
    Family(
        "the Stable Diffusion x4 upscaler",
        (_SD + "x4-upscaling.yaml",),
        {"width": 256, "context": 1024, "in_channels": 7},
    ),
    Family(
        "the latent diffusion text-to-image model (txt2img-f8-large)",
        ("configs/latent-diffusion/txt2img-1p4B-eval.yaml",),
        {"text": "bert", "width": 320, "context": 1280},
    ),
    Family(
        "latent diffusion text2img256",
        ("models/ldm/text2img256/config.yaml",),
        {"text": "bert", "width": 192, "context": 640},
    ),
    Family(
        "class-conditional latent diffusion on ImageNet",
        ("configs/latent-diffusion/cin256-v2.yaml",),
        {"text": "class", "width": 192, "context": 512},
    ),
    Family(
        "retrieval-augmented diffusion",
        ("configs/retrieval-augmented-diffusion/768x768.yaml",),
        {"width": 448, "in_channels": 16, "context": 768},
    ),
    Family(
        "the bundled model of shapes",
        ("models/ldm/shapes64/config.yaml",),
        {"text": "clip", "vocabulary": 35, "context": 128},
        loads=True,
    ),
    UNKNOWN,
)

# Files that hold no whole model: what they are, and keys that only they have.
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
    """The first family that `shapes` (published name -> shape) fits; None if they hold no known UNet."""
    found = features(shapes)
    return next((family for family in FAMILIES if family.fits(found, shapes)), None)


def detect_config(shapes: Shapes) -> str | None:
    """The public config for a checkpoint with these shapes: "configs/stable-diffusion/v1-inference.yaml", ...

    None if it is of no family that this code can load; `config_for` says in words why.
    """
    family = family_of(shapes)
    return family.configs[0] if family and family.loads else None


def _part_of(shapes: Shapes) -> str | None:
    """What a file that is not a whole model is, None if its keys say nothing."""
    for name, pattern in PARTS:
        if any(re.search(pattern, key) for key in shapes):
            return name
    return None


def describe(shapes: Shapes) -> str:
    """What a file with these shapes looks like, in words: "Stable Diffusion v2 (configs/...)", "a LoRA", ..."""
    family = family_of(shapes)
    return str(family) if family else _part_of(shapes) or "no model that is known here"


def config_for(checkpoint: Checkpoint) -> str:
    """`detect_config` for a file that was read; CheckpointError, saying what it is, where there is none."""
    family = family_of(checkpoint.shapes)
    if family is None:
        raise CheckpointError(not_a_model(checkpoint))
    if family is UNKNOWN:
        raise CheckpointError(f"{checkpoint.path} holds {family}: name its config with --config")
    if not family.loads:
        raise CheckpointError(f"{checkpoint.path} looks like {family}, a family that this version does not load")
    return family.configs[0]


def not_a_model(checkpoint: Checkpoint) -> str:
    """One sentence on a file without any UNet that is known here."""
    part = _part_of(checkpoint.shapes)
    if part:
        return f"{checkpoint.path} is {part}, not a whole model: name a checkpoint that holds the model itself"
    first = ", ".join(list(checkpoint.shapes)[:3])
    return f"{checkpoint.path} holds no model that is known here (its first weights: {first})"
