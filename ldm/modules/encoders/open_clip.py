"""CLIP (Radford et al. 2021, arXiv:2103.00020) under the weight names of OpenAI and OpenCLIP.

`clip_text` has the text tower under the names of transformers, in which Stable Diffusion v1 was published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.encoders.base import (
    AbstractEncoder,
    TowerConfig,
    check_clip_skip,
    check_heads,
    check_length,
    check_vocabulary,
    resolve_tokenizer,
    token_ids,
)
from ldm.modules.encoders.clip_text import quick_gelu
from ldm.modules.encoders.tokenizer import OpenCLIPTokenizer, Tokenizer
from ldm.modules.sdpa import scaled_dot_product_attention

VIT_H_14 = "ViT-H-14"


@dataclass(frozen=True)
class TextTowerConfig(TowerConfig):
    """Sizes of a text tower under the names of OpenCLIP. The defaults are those of ViT-H-14."""

    width: int = 1024
    heads: int = 16
    layers: int = 24
    vocab_size: int = 49408
    context_length: int = 77
    embed_dim: int = 1024
    quick_gelu: bool = False

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads, "width", "heads")


@dataclass(frozen=True)
class VisionTowerConfig(TowerConfig):
    """Sizes of a vision tower under the names of OpenCLIP. The defaults are those of ViT-H-14."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1280
    heads: int = 16
    layers: int = 32
    embed_dim: int = 1024
    quick_gelu: bool = False

    def __post_init__(self) -> None:
        check_heads(self.width, self.heads, "width", "heads")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")


class MultiheadAttention(nn.Module):
    """Self-attention with one weight for queries, keys and values. Tokens come first: (L, B, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # (L, B, D), (L, L) -> (L, B, D)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 1, 3, 0, 4)  # each (B, heads, L, D / heads)
        mask = attn_mask if attn_mask is None else attn_mask.to(q.dtype)
        return self.out_proj(scaled_dot_product_attention(q, k, v, mask).permute(2, 0, 1, 3).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU, or its quick approximation, between them."""

    def __init__(self, width: int, inner: int, quick: bool) -> None:
        super().__init__()
        self.activation = quick_gelu if quick else F.gelu
        self.c_fc = nn.Linear(width, inner)
        self.c_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:  # (L, B, D) -> same
        return self.c_proj(self.activation(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, quick: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = MultiheadAttention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width, quick)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # (L, B, D) -> same
        x = x + self.attn(self.ln_1(x), attn_mask=attn_mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Sequence of blocks, initialised as CLIP's: residual branches are scaled down with depth."""

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

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:  # (L, B, D) -> same
        for block in self.resblocks:
            x = block(x, attn_mask=attn_mask)
        return x


class TextTower(nn.Module):
    """Weights of the causal text transformer; `FrozenOpenCLIPEmbedder` has its forward pass.

    text_projection and logit_scale, which compare texts with images, are published with it and not used.
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

    @property
    def attn_mask(self) -> Tensor:
        """Causal mask (context_length, context_length): -inf above the diagonal, else 0."""
        length, like = self.config.context_length, self.positional_embedding
        return torch.full((length, length), -math.inf, device=like.device, dtype=like.dtype).triu(1)


class VisionTransformer(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021); the class token's features become the embedding."""

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__()
        width, size = config.width, config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(size**2 + 1, width) * width**-0.5)
        self.proj = nn.Parameter(torch.randn(width, config.embed_dim) * width**-0.5)
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, config.quick_gelu)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Encode normalised images (B, 3, image_size, image_size) to embeddings (B, embed_dim)."""
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, width)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.transformer(self.ln_pre(x).transpose(0, 1))
        return self.ln_post(x[0]) @ self.proj


class CLIP(TextTower):
    """Both towers; the text tower's weights have no prefix, the vision tower's `visual.`."""

    def __init__(self, text: TextTowerConfig, vision: VisionTowerConfig) -> None:
        super().__init__(text)
        self.image_size = vision.image_size
        self.visual = VisionTransformer(vision)

    def encode_image(self, image: Tensor) -> Tensor:
        """Encode images (B, 3, image_size, image_size), normalised, to embeddings (B, embed_dim)."""
        return self.visual(image.to(self.visual.proj.dtype))


class FrozenOpenCLIPEmbedder(AbstractEncoder):
    """OpenCLIP text encoder of Stable Diffusion v2 (ViT-H-14, 77 tokens of width 1024).

    Nothing is downloaded: weights come with the model's checkpoint.

    Args:
        arch: Name of the tower. Only ViT-H-14 is known; `config` overrides it.
        version: Ignored: weights come with the checkpoint.
        device: Ignored: the encoder works on the device of its weights.
        max_length: Tokens that prompts are truncated or padded to (with zeros), start and end included.
        freeze: Set eval mode and disable gradients.
        layer: "last", or "penultimate" to leave out the last block. The final norm is applied to both.
        config: `TextTowerConfig` options instead of ViT-H-14's.
        tokenizer: None for OpenCLIP's own, a `{target, params}` config, or a tokenizer.

    Raises:
        ValueError: If options contradict each other or the tower.
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
        self.layer_idx = self.LAYERS.index(layer)  # blocks to leave out
        self.model = TextTower(tower)
        if freeze:
            self.freeze()

    @property
    def spare_weights(self) -> list[str]:
        """Names of published weights that are not used, and that files converted back from diffusers lack."""
        last = f"transformer.resblocks.{self.model.config.layers - 1}."
        unread = ("text_projection", "logit_scale", *([last] if self.layer == "penultimate" else []))
        return [f"model.{name}" for name, _ in self.model.named_parameters() if name.startswith(unread)]

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """Encode B prompts to (B, max_length, D).

        Prompts that are too long are truncated, with a warning. TypeError for anything but strings.
        """
        return self.encode_with_transformer(token_ids(self.tokenizer, text, self.max_length).to(self.device))

    def encode_tokens(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        """Encode token ids (B, L) to (B, L, D).

        Args:
            tokens: Ids (B, L).
            clip_skip: Layer to use, counted from the encoder's own `layer`, which is 1.

        Raises:
            ValueError: If there is no such layer.
        """
        check_clip_skip(clip_skip, self.model.config.layers - self.layer_idx)
        before, self.layer_idx = self.layer_idx, self.layer_idx + clip_skip - 1
        try:
            return self.encode_with_transformer(tokens.to(self.device))
        finally:
            self.layer_idx = before

    def encode_with_transformer(self, text: Tensor) -> Tensor:
        """Encode token ids (B, L) to (B, L, D). ValueError if L exceeds the context length."""
        length, limit = text.shape[1], self.model.config.context_length
        if length > limit:
            raise ValueError(f"{length} tokens, but the text tower reads at most {limit}")
        x = self.model.token_embedding(text) + self.model.positional_embedding[:length]
        x = self.text_transformer_forward(x.transpose(0, 1), attn_mask=self.model.attn_mask[:length, :length])
        return self.model.ln_final(x.transpose(0, 1))

    def text_transformer_forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Apply all blocks but the last `layer_idx` to x (L, B, D)."""
        blocks = self.model.transformer.resblocks
        for block in blocks[: len(blocks) - self.layer_idx]:
            x = block(x, attn_mask=attn_mask)
        return x
