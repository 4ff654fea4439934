"""The weights of DPT-Hybrid as transformers saves them (`Intel/dpt-hybrid-midas`), under the names of MiDaS."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_BACKBONE = "pretrained.model.patch_embed.backbone."
_BLOCK = r"pretrained.model.blocks.\1."

# What a name begins with there, and here.
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
    """The state dict of a DPTForDepthEstimation (hybrid) under MiDaS' names; unknown names stay as they are."""
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
