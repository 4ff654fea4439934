"""Pre-norm transformer encoder (Vaswani et al. 2017) of the first latent diffusion models' text conditioning."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.modules.attention import FeedForward
from ldm.modules.sdpa import scaled_dot_product_attention


class Attention(nn.Module):
    """Multi-head self-attention without a mask: padding is attended to, as published."""

    def __init__(self, dim: int, heads: int = 8, dim_head: int = 64) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_k = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_v = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, dim) -> same
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, dim_head)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Stack of `depth` pre-norm attention and feed-forward layers."""

    def __init__(self, dim: int, depth: int, heads: int = 8) -> None:
        super().__init__()
        blocks = (block for _ in range(depth) for block in (Attention(dim, heads), FeedForward(dim)))
        self.layers = nn.ModuleList(nn.ModuleList([nn.LayerNorm(dim), block]) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, dim) -> same
        for layer in self.layers:
            norm, block = layer.children()
            x = x + block(norm(x))
        return x


class AbsolutePositionalEmbedding(nn.Module):
    """Learned positional embedding."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, length: int) -> Tensor:  # -> (length, dim)
        return self.emb.weight[:length]


class Logits(nn.Module):
    """Published output head; buffers rather than parameters, as conditioning does not train it."""

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_tokens, dim))
        self.register_buffer("bias", torch.zeros(num_tokens))

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:  # (B, L, dim) -> (B, L, num_tokens)
        return F.linear(x, self.weight, self.bias)


class TransformerWrapper(nn.Module):
    """Token embeddings, transformer encoder, final norm and output head.

    Args:
        num_tokens: Size of the vocabulary.
        max_seq_len: Number of positions.
        dim: Width.
        depth: Number of layers.
        emb_dropout: Dropout of the embeddings.
    """

    def __init__(self, num_tokens: int, max_seq_len: int, dim: int, depth: int, emb_dropout: float = 0.0) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.token_emb = nn.Embedding(num_tokens, dim)
        nn.init.normal_(self.token_emb.weight, std=0.02)
        self.pos_emb = AbsolutePositionalEmbedding(dim, max_seq_len)
        self.emb_dropout = nn.Dropout(emb_dropout)
        self.attn_layers = Encoder(dim, depth)
        self.norm = nn.LayerNorm(dim)
        self.to_logits = Logits(dim, num_tokens)

    def forward(self, x: Tensor, return_embeddings: bool = False) -> Tensor:
        """Encode ids (B, L) to features (B, L, dim), or without `return_embeddings` to logits (B, L, num_tokens).

        Raises:
            ValueError: If L exceeds `max_seq_len`.
        """
        length = x.shape[1]
        if length > self.max_seq_len:
            raise ValueError(f"{length} tokens are more than this transformer's max_seq_len of {self.max_seq_len}")
        z = self.token_emb(x) + self.pos_emb(length)
        z = self.norm(self.attn_layers(self.emb_dropout(z)))
        return z if return_embeddings else self.to_logits(z)
