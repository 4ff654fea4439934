"""Prompt weighting, long prompts and CLIP skip, in the conventions of AUTOMATIC1111's web UI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.modules.encoders.tokenizer import Tokenizer, Tokens, check_texts

ROUND, SQUARE = 1.1, 1 / 1.1  # weights of (word) and [word]

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_MARK = re.compile(rf"\\[()\[\]\\]|[()\[\]]|:\s*({_NUMBER})\s*\)")


@dataclass(frozen=True)
class PromptOptions:
    """Options of prompt encoding; the defaults encode prompts as published.

    Attributes:
        emphasis: Weight words written as `(word:1.2)`, `(word)` or `[word]`, see `parse_emphasis`.
        long_prompt: Encode tokens beyond the encoder's maximum length in further chunks instead of truncating.
        clip_skip: The CLIP layer to use, counted from the end. 1 is the encoder's own `layer`.
    """

    emphasis: bool = False
    long_prompt: bool = False
    clip_skip: int = 1


DEFAULT_PROMPT_OPTIONS = PromptOptions()


class TokenEncoder(Protocol):
    """Interface of the encoders that support `PromptOptions`."""

    tokenizer: Tokenizer
    max_length: int

    def encode_tokens(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        """Encode token ids (B, L) to a context (B, L, D), where L = max_length."""
        ...


class Chunk(NamedTuple):
    """Tokens for one pass through the encoder, and the weight of each."""

    tokens: Tokens
    weights: list[float]


def encode_prompts(encoder: TokenEncoder, groups: Sequence[Sequence[str]], options: PromptOptions) -> list[Tensor]:
    """Encode groups of prompts to contexts of equal length.

    Shorter prompts are padded with chunks of the empty prompt. Where no word is weighted and all prompts fit, the
    contexts equal `encoder(group)` bit for bit.

    Args:
        encoder: A text encoder with `encode_tokens`.
        groups: Batches of prompts, e.g. the prompts and the negative prompts.
        options: Emphasis, long prompts and CLIP skip.

    Returns:
        A context (B, n L, D) for each group of B prompts, n being the number of chunks of the longest prompt.

    Raises:
        ValueError: If the encoder has no text input, or does not support `options`.
    """
    if not hasattr(encoder, "encode_tokens") or encoder.tokenizer is None:
        kind = type(encoder).__name__
        raise ValueError(f"emphasis, long_prompt and clip_skip need a text encoder; {kind} does not encode text")
    length = encoder.max_length - 2
    chunked = [[_chunks(encoder.tokenizer, text, length, options) for text in check_texts(group)] for group in groups]
    most = max(len(chunks) for group in chunked for chunks in group)
    empty = Chunk(Tokens("", [], []), [])
    padded = [[chunk for chunks in group for chunk in chunks + [empty] * (most - len(chunks))] for group in chunked]
    return [_encode(encoder, chunks, options.clip_skip).unflatten(0, (-1, most)).flatten(1, 2) for chunks in padded]


def _encode(encoder: TokenEncoder, chunks: Sequence[Chunk], clip_skip: int) -> Tensor:
    """Encode N chunks to weighted features (N, L, D)."""
    tokens = encoder.tokenizer.rows([chunk.tokens for chunk in chunks], encoder.max_length)  # (N, L)
    z = encoder.encode_tokens(tokens, clip_skip)
    if z.shape[:2] != tokens.shape:
        raise ValueError(
            "emphasis and long_prompt need an encoder with one output per token; this one has "
            f"{z.shape[1]} for {tokens.shape[1]} tokens"
        )
    weights = torch.ones(tokens.shape, device="cpu")
    for row, chunk in zip(weights, chunks, strict=True):
        inner = chunk.weights[: len(row) - 2]
        row[1 : 1 + len(inner)] = torch.tensor(inner)
    return weigh(z, weights.to(z.device))


def weigh(z: Tensor, weights: Tensor) -> Tensor:
    """Multiply token features (B, L, D) by weights (B, L) and restore each item's mean.

    The rescaling is skipped where the mean vanishes or changes its sign.
    """
    product = z.float() * weights[..., None]
    ratio = z.float().mean((1, 2), keepdim=True) / product.mean((1, 2), keepdim=True)
    return (product * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)).to(z.dtype)


# ---- text to weighted tokens ----


def parse_emphasis(text: str) -> list[tuple[str, float]]:
    """Split a prompt into parts of different weight.

    `(a)` multiplies the weight by 1.1, `(a:1.2)` by the number, `[a]` divides it by 1.1; brackets nest. Brackets
    without a partner are literal, and so is a bracket or backslash after a backslash.

    Returns:
        (text, weight) pairs without the brackets; neighbouring parts differ in weight.
    """
    parts: list[tuple[str, float]] = []
    opened: list[int] = []  # indices of the open brackets in parts
    position = 0
    for mark in _MARK.finditer(text):
        found = mark[0]
        parts.append((text[position : mark.start()], 1.0))
        position = mark.end()
        if found in "([":
            opened.append(len(parts))
        elif not found.startswith("\\"):
            partner = "(" if found.endswith(")") else "["
            start = next((i for i in reversed(opened) if parts[i][0] == partner), None)
            if start is not None:
                factor = float(mark[1]) if mark[1] else ROUND if partner == "(" else SQUARE
                parts[start:] = [(inner, weight * factor) for inner, weight in parts[start + 1 :]]
                opened = [i for i in opened if i < start]
                continue
        parts.append((found[1:] if found.startswith("\\") else found, 1.0))
    parts.append((text[position:], 1.0))
    by_weight = groupby((part for part in parts if part[0]), key=lambda part: part[1])
    return [("".join(inner for inner, _ in same), weight) for weight, same in by_weight]


def _chunks(tokenizer: Tokenizer, text: str, length: int, options: PromptOptions) -> list[Chunk]:
    """Tokenize a prompt into one chunk, or with `long_prompt` into chunks of at most `length` tokens."""
    rest = _weighted(tokenizer, parse_emphasis(text) if options.emphasis else [(text, 1.0)])
    if not options.long_prompt:
        return [rest]
    if length < 1:
        raise ValueError("this encoder's max_length leaves no room for text")
    chunks = []
    while len(rest.weights) > length:
        end = _end_of_chunk(rest.tokens, length)
        chunks.append(_part(rest, slice(0, end)))
        rest = _part(rest, slice(end, None))
    return [*chunks, rest]


def _end_of_chunk(tokens: Tokens, length: int) -> int:
    """Find where to split: after the last comma among the last 20 of 75 tokens, otherwise at `length`."""
    for last in reversed(range(length - length * 20 // 75, length)):
        if tokens.text[tokens.starts[last]] == ",":
            return last + 1
    return length


def _part(chunk: Chunk, part: slice) -> Chunk:
    text, ids, starts = chunk.tokens
    return Chunk(Tokens(text, ids[part], starts[part]), chunk.weights[part])


def _weighted(tokenizer: Tokenizer, parts: Sequence[tuple[str, float]]) -> Chunk:
    """Tokenize each weighted part on its own and concatenate them."""
    text, ids, starts, weights = "", [], [], []
    for inner, weight in parts:
        read = tokenizer.tokenize(inner.strip(" "))
        text += " " if text else ""
        starts += [len(text) + start for start in read.starts]
        ids += read.ids
        weights += [weight] * len(read.ids)
        text += read.text
    return Chunk(Tokens(text, ids, starts), weights)
