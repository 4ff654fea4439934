"""The text transformer of the first latent diffusion models, trained from scratch (Vaswani et al. 2017, pre-norm)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.modules.attending import attend
from ldm.modules.attention import FeedForward


class Attention(nn.Module):
    """Multi-head self-attention of every token on all, padding included, as published."""

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
        return self.to_out(attend(q, k, v).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """`depth` times attention and feed-forward, each after a layer norm, each residual."""

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
    """A learnt vector for every position."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(max_seq_len, dim)
        nn.init.normal_(self.emb.weight, std=0.02)

    def forward(self, length: int) -> Tensor:  # -> (length, dim)
        return self.emb.weight[:length]


class Logits(nn.Module):
    """The head that published checkpoints hold and nothing reads: buffers, for which no optimiser or process waits."""

    def __init__(self, dim: int, num_tokens: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_tokens, dim))
        self.register_buffer("bias", torch.zeros(num_tokens))


class TransformerWrapper(nn.Module):
    """Token ids to features: embeddings, an encoder, a last norm.

    num_tokens: size of the vocabulary. max_seq_len: how many positions there are. emb_dropout: of the embeddings.
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

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (B, L) to features (B, L, dim). ValueError for more tokens than there are positions."""
        length = tokens.shape[1]
        if length > self.max_seq_len:
            raise ValueError(f"{length} tokens are more than this transformer's max_seq_len of {self.max_seq_len}")
        x = self.token_emb(tokens) + self.pos_emb(length)
        return self.norm(self.attn_layers(self.emb_dropout(x)))
