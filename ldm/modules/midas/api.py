"""MiDaS depth estimation, with the weights of a depth-to-image checkpoint or of a file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import Checkpoint, fill_model, read_checkpoint
from ldm.modules.encoders.base import disabled_train as disabled_train
from ldm.modules.midas.dpt import DPTHybrid
from ldm.util import public_path

SIDE, MULTIPLE = 384, 32  # training size of the published weights
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as transformers saves them
IN_CHECKPOINTS = "depth_model.model."
CLASSES = "pretrained.model.head."  # ImageNet head, in the published files and not used
OWN_PLACE = "midas_models/dpt_hybrid-midas-501f0c75.pt"  # as in the public code


class MiDaSInference(nn.Module):
    """Relative inverse depth by MiDaS 3 (DPT-Hybrid); larger is nearer.

    Args:
        model_type: "dpt_hybrid".
        path: Weights: a file of MiDaS (dpt_hybrid-midas-501f0c75.pt), a depth-to-image checkpoint, or transformers'
            folder of `Intel/dpt-hybrid-midas`. By default they come with the model's checkpoint.
        config: Sizes other than the published ones, see `DPTHybrid`.

    Raises:
        ValueError: For another model_type.
        FileNotFoundError: If `path` does not exist.
        CheckpointError: If it holds other weights.
    """

    def __init__(
        self,
        model_type: str = "dpt_hybrid",
        path: str | os.PathLike[str] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_model_type(model_type)
        self.model = DPTHybrid(**(config or {})).eval().requires_grad_(False)
        self.path = path
        if path is not None:
            with torch.device("cpu"):  # also while the model is built on meta
                fill_model(self.model, read_midas(path))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Estimate depth (B, 1, H, W) float32 of x (B, 3, H, W) in [-1, 1] with sides that are multiples of 32."""
        return self.model(x.to(next(self.parameters()).dtype)).float()


def load_midas_transform(model_type: str = "dpt_hybrid") -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return MiDaS' preprocessing: {"image": (H, W, 3) in [0, 1]} to {"image": (3, h, w) float32 in [-1, 1]}."""
    _check_model_type(model_type)

    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        image = torch.from_numpy(np.ascontiguousarray(sample["image"], np.float32)).movedim(-1, 0)[None]
        return {**sample, "image": fit(2.0 * image - 1.0)[0].numpy()}

    return transform


def load_model(
    model_type: str = "dpt_hybrid", path: str | os.PathLike[str] | None = None
) -> tuple[nn.Module, Callable[[dict[str, Any]], dict[str, Any]]]:
    """Load DPT-Hybrid from `path`, by default midas_models/dpt_hybrid-midas-501f0c75.pt, and its preprocessing.

    Raises:
        FileNotFoundError: If the file is missing: nothing is downloaded.
    """
    path = path or public_path(OWN_PLACE)
    if path is None:
        raise FileNotFoundError(f"MiDaS' weights are not at {OWN_PLACE}: download that file, or pass its path")
    return MiDaSInference(model_type, path).model, load_midas_transform(model_type)


def _check_model_type(model_type: str) -> None:
    if model_type != "dpt_hybrid":
        raise ValueError(
            f"model_type must be 'dpt_hybrid', got {model_type!r}: the other MiDaS models are not supported"
        )


def fit(images: Tensor) -> Tensor:
    """Resize images (B, 3, H, W) in [-1, 1] to MiDaS' input size.

    Of the two scales that make one side 384 it uses the one closer to 1, and rounds both sides to multiples of 32.
    """
    height, width = images.shape[2:]
    scale = min(SIDE / height, SIDE / width, key=lambda scale: abs(1 - scale))
    size = tuple(max(round(scale * side / MULTIPLE), 1) * MULTIPLE for side in (height, width))
    images = F.interpolate(images.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
    return images.clamp(-1.0, 1.0)  # cubic interpolation overshoots at edges


def read_midas(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the weights of DPT-Hybrid from a file or a folder of transformers, under MiDaS' names."""
    place = Path(path).expanduser()
    if place.is_dir():
        files = [place / name for name in WEIGHTS if (place / name).is_file()]
        if not files:
            raise FileNotFoundError(f"the folder {place} has no weights of MiDaS: it needs {' or '.join(WEIGHTS)}")
        place = files[0]
    state = read_checkpoint(place).state
    inside = {key.removeprefix(IN_CHECKPOINTS): v for key, v in state.items() if key.startswith(IN_CHECKPOINTS)}
    state = from_transformers(inside or state)
    return Checkpoint(place, {key: value for key, value in state.items() if not key.startswith(CLASSES)})


# ---- weights of transformers ----

_BACKBONE = "pretrained.model.patch_embed.backbone."
_BLOCK = r"pretrained.model.blocks.\1."

# prefixes of transformers' names and of MiDaS'
RULES: tuple[tuple[str, str], ...] = (
    (r"dpt\.embeddings\.cls_token", "pretrained.model.cls_token"),
    (r"dpt\.embeddings\.position_embeddings", "pretrained.model.pos_embed"),
    (r"dpt\.embeddings\.projection\.", "pretrained.model.patch_embed.proj."),
    (r"dpt\.embeddings\.backbone\.bit\.embedder\.convolution\.", _BACKBONE + "stem.conv."),
    (r"dpt\.embeddings\.backbone\.bit\.embedder\.norm\.", _BACKBONE + "stem.norm."),
    (r"dpt\.embeddings\.backbone\.bit\.encoder\.stages\.(\d+)\.layers\.", _BACKBONE + r"stages.\1.blocks."),
    (r"dpt\.encoder\.layer\.(\d+)\.layernorm_before\.", _BLOCK + "norm1."),
    (r"dpt\.encoder\.layer\.(\d+)\.layernorm_after\.", _BLOCK + "norm2."),
    (r"dpt\.encoder\.layer\.(\d+)\.attention\.output\.dense\.", _BLOCK + "attn.proj."),
    (r"dpt\.encoder\.layer\.(\d+)\.intermediate\.dense\.", _BLOCK + "mlp.fc1."),
    (r"dpt\.encoder\.layer\.(\d+)\.output\.dense\.", _BLOCK + "mlp.fc2."),
    (r"dpt\.layernorm\.", "pretrained.model.norm."),
    (r"neck\.reassemble_stage\.readout_projects\.2\.0\.", "pretrained.act_postprocess3.0.project.0."),
    (r"neck\.reassemble_stage\.readout_projects\.3\.0\.", "pretrained.act_postprocess4.0.project.0."),
    (r"neck\.reassemble_stage\.layers\.2\.projection\.", "pretrained.act_postprocess3.3."),
    (r"neck\.reassemble_stage\.layers\.3\.projection\.", "pretrained.act_postprocess4.3."),
    (r"neck\.reassemble_stage\.layers\.3\.resize\.", "pretrained.act_postprocess4.4."),
    *((rf"neck\.convs\.{i}\.", f"scratch.layer{i + 1}_rn.") for i in range(4)),
    *((rf"neck\.fusion_stage\.layers\.{i}\.projection\.", f"scratch.refinenet{4 - i}.out_conv.") for i in range(4)),
    *(
        (
            rf"neck\.fusion_stage\.layers\.{i}\.residual_layer(\d)\.convolution(\d)\.",
            rf"scratch.refinenet{4 - i}.resConfUnit\1.conv\2.",
        )
        for i in range(4)
    ),
    (r"head\.head\.", "scratch.output_conv."),
)
_QUERY = re.compile(r"dpt\.encoder\.layer\.(\d+)\.attention\.attention\.query\.")


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a DPTForDepthEstimation (hybrid) to MiDaS' names; unknown names stay."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        if _QUERY.match(key):  # one matrix in MiDaS
            parts = [state[key.replace(".query.", f".{name}.")] for name in ("query", "key", "value")]
            named[_QUERY.sub(_BLOCK + "attn.qkv.", key)] = torch.cat(parts)
        elif ".attention.attention." not in key:
            named[_renamed(key)] = value
    return named


def _renamed(key: str) -> str:
    for pattern, name in RULES:
        if re.match(pattern, key):
            return re.sub("^" + pattern, name, key)
    return key
