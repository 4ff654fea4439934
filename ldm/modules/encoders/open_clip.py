"""CLIP (Radford et al. 2021, arXiv:2103.00020) under the weight names of OpenAI and OpenCLIP: the text side.

`clip_text` has the same network under the names of transformers, in which Stable Diffusion v1 was published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attending import attend
from ldm.modules.encoders.base import (
    AbstractEncoder,
    TowerConfig,
    check_clip_skip,
    check_heads,
    check_length,
    check_vocabulary,
    resolve_tokenizer,
)
from ldm.modules.encoders.clip_text import quick_gelu
from ldm.modules.encoders.tokenizer import OpenCLIPTokenizer, Tokenizer

VIT_H_14 = "ViT-H-14"


@dataclass(frozen=True)
class TextTowerConfig(TowerConfig):
    """Size of a text tower, in OpenCLIP's names; the defaults are ViT-H-14's. embed_dim: of what is compared."""

    width: int = 1024
    heads: int = 16
    layers: int = 24
    vocab_size: int = 49408
    context_length: int = 77
    embed_dim: int = 1024
    quick_gelu: bool = False

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads, "width", "heads")


class MultiheadAttention(nn.Module):
    """Self-attention whose three projections are one weight."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:  # (B, L, D) -> same
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, L, D / heads)
        return self.out_proj(attend(q, k, v, causal=causal).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU, or its quick approximation, between them."""

    def __init__(self, width: int, inner: int, quick: bool) -> None:
        super().__init__()
        self.activation = quick_gelu if quick else F.gelu
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D) -> same
        return self.c_proj(self.activation(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, quick: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = MultiheadAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width, quick)

    def forward(self, x: Tensor, causal: bool) -> Tensor:  # (B, L, D) -> same
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks in a row, with CLIP's start values: what each adds shrinks with depth, so that the sum keeps its size."""

    def __init__(self, width: int, layers: int, heads: int, quick: bool) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, quick) for _ in range(layers))
        residual = width**-0.5 * (2 * max(layers, 1)) ** -0.5
        for block in self.resblocks:
            assert isinstance(block, ResidualAttentionBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual)
            for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, causal: bool = False, leave_out: int = 0) -> Tensor:
        """x (B, L, D) after all blocks but the last `leave_out`."""
        for block in self.resblocks[: len(self.resblocks) - leave_out]:
            x = block(x, causal)
        return x


class TextTower(nn.Module):
    """The causal transformer over token ids.

    text_projection and logit_scale, which compare texts to pictures, are published with it and have no part here.
    """

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.text_projection = nn.Parameter(torch.empty(width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.transformer = Transformer(width, config.layers, config.heads, config.quick_gelu)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.ln_final = nn.LayerNorm(width)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def text_features(self, tokens: Tensor, leave_out: int = 0) -> Tensor:
        """Ids (B, L) to (B, L, width) after the final norm, the last `leave_out` blocks left out.

        ValueError if L exceeds context_length.
        """
        length, limit = tokens.shape[1], self.config.context_length
        if length > limit:
            raise ValueError(f"{length} tokens, but the text tower reads at most {limit}")
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        return self.ln_final(self.transformer(x, causal=True, leave_out=leave_out))


class FrozenOpenCLIPEmbedder(AbstractEncoder):
    """Prompts to OpenCLIP text features: the conditioning of Stable Diffusion 2 (ViT-H-14, 77 tokens of width 1024).

    Nothing is downloaded: the tower is built from `config` and gets its weights from the model's checkpoint.

    Args:
        arch: the public name of the tower; only ViT-H-14's is known, and `config` overrides it.
        version, device: accepted for public configs and ignored: weights come with the model, and the encoder works
            where they are.
        max_length: tokens a prompt is cut or padded (with zeros) to, start and end included.
        freeze: eval mode and no gradients; False makes the encoder trainable.
        layer: "last", or "penultimate" to leave out the last block; both end with the final norm.
        config: None for ViT-H-14, or a mapping of `TextTowerConfig` options.
        tokenizer: None for OpenCLIP's own, a `{target, params}` config, or a `Tokenizer`.

    Raises ValueError for options that contradict one another or that the tower cannot serve.
    """

    LAYERS = ("last", "penultimate")

    def __init__(
        self,
        arch: str = VIT_H_14,
        version: str = "laion2b_s32b_b79k",
        device: object = None,
        max_length: int = 77,
        freeze: bool = True,
        layer: str = "last",
        config: Mapping[str, Any] | None = None,
        tokenizer: Tokenizer | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if config is None and arch != VIT_H_14:
            raise ValueError(f"unknown text tower {arch!r}: use {VIT_H_14!r}, or give its sizes as `config`")
        if layer not in self.LAYERS:
            raise ValueError(f"layer must be one of {self.LAYERS}, got {layer!r}")
        tower = TextTowerConfig.from_mapping(config or {})
        self.tokenizer = resolve_tokenizer(tokenizer, OpenCLIPTokenizer)
        check_vocabulary(self.tokenizer, tower.vocab_size)
        check_length(max_length, tower.context_length)
        self.max_length = max_length
        self.layer = layer
        self.model = TextTower(tower)
        if freeze:
            self.freeze()

    @property
    def spare_weights(self) -> list[str]:
        """Published weights that nothing here reads, and that files converted back from diffusers lack."""
        last = f"transformer.resblocks.{self.model.config.layers - 1}."
        unread = ("text_projection", "logit_scale", *([last] if self.layer == "penultimate" else []))
        return [f"model.{name}" for name, _ in self.model.named_parameters() if name.startswith(unread)]

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """B prompts to (B, max_length, D), on the device of the weights.

        Raises TypeError for anything but a string or a list of them. Prompts too long are cut, with a warning.
        """
        return self.encode_tokens(self.tokenizer(text, self.max_length))

    def encode_tokens(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        """Ids (B, L) to (B, L, D), on the device of the weights.

        clip_skip: how many layers before the encoder's own `layer` to stop, counted from 1, which is that layer: files
        need not hold more. ValueError for more than there are.
        """
        leave_out = self.LAYERS.index(self.layer)
        check_clip_skip(clip_skip, self.model.config.layers - leave_out)
        tokens = tokens.to(self.model.positional_embedding.device)
        return self.model.text_features(tokens, leave_out=leave_out + clip_skip - 1)

    def encode_with_transformer(self, tokens: Tensor) -> Tensor:
        """`encode_tokens` under its published name."""
        return self.encode_tokens(tokens)
