"""Reading prompts in other ways than the published one: weighted words, prompts of any length, an earlier layer.

All three are conventions of AUTOMATIC1111's web UI, which users know; none is part of a published model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.modules.encoders.tokenizer import Tokenizer, Tokens, check_texts

ROUND, SQUARE = 1.1, 1 / 1.1  # what (word) and [word] weigh

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_MARK = re.compile(rf"\\[()\[\]\\]|[()\[\]]|:\s*({_NUMBER})\s*\)")


@dataclass(frozen=True)
class Reading:
    """How to read prompts; the default is as published.

    emphasis: `(word:1.2)`, `(word)` and `[word]` weigh words (see `parse_emphasis`). long_prompt: what exceeds the
    encoder's length is read in further chunks instead of being cut off. clip_skip: which layer of a CLIP to take,
    counted from the end; 1 is the last, or in OpenCLIP's towers the one that the model was published with.
    """

    emphasis: bool = False
    long_prompt: bool = False
    clip_skip: int = 1


class TokenEncoder(Protocol):
    """What an encoder offers to be read with: `encode_tokens` gives (B, L, D) for ids (B, L), L = max_length."""

    tokenizer: Tokenizer
    max_length: int

    def encode_tokens(self, tokens: Tensor, clip_skip: int = 1) -> Tensor:
        """Ids (B, L) to what the network attends to (B, L, D)."""
        ...


class Chunk(NamedTuple):
    """Tokens that an encoder reads at once, and the weight of each."""

    tokens: Tokens
    weights: list[float]


def encode_prompts(encoder: TokenEncoder, groups: Sequence[Sequence[str]], reading: Reading) -> list[Tensor]:
    """The context (B, n L, D) of each group of B prompts, n being the chunks of the longest prompt of all.

    Shorter prompts are filled up with chunks of the empty prompt. Where nothing is weighted and all prompts fit, the
    contexts are those of `encoder(group)`, bit for bit.

    Raises ValueError for an encoder that does not read tokens, or cannot do what `reading` asks for.
    """
    if not hasattr(encoder, "encode_tokens") or encoder.tokenizer is None:
        kind = type(encoder).__name__
        raise ValueError(f"emphasis, long_prompt and clip_skip need an encoder that reads text; {kind} reads none")
    room = encoder.max_length - 2
    read = [[_chunks(encoder.tokenizer, text, room, reading) for text in check_texts(group)] for group in groups]
    most = max(len(chunks) for group in read for chunks in group)
    empty = Chunk(Tokens("", [], []), [])
    filled = [[chunk for chunks in group for chunk in chunks + [empty] * (most - len(chunks))] for group in read]
    return [_encode(encoder, chunks, reading.clip_skip).unflatten(0, (-1, most)).flatten(1, 2) for chunks in filled]


def _encode(encoder: TokenEncoder, chunks: Sequence[Chunk], clip_skip: int) -> Tensor:
    """N chunks to (N, L, D), weighted."""
    tokens = encoder.tokenizer.rows([chunk.tokens for chunk in chunks], encoder.max_length)  # (N, L)
    z = encoder.encode_tokens(tokens, clip_skip)
    if z.shape[:2] != tokens.shape:
        raise ValueError(
            "emphasis and long_prompt need an encoder that describes every token; this one gives "
            f"{z.shape[1]} for {tokens.shape[1]} of them"
        )
    weights = torch.ones(tokens.shape, device="cpu")
    for row, chunk in zip(weights, chunks, strict=True):
        inner = chunk.weights[: len(row) - 2]
        row[1 : 1 + len(inner)] = torch.tensor(inner)
    return weigh(z, weights.to(z.device))


def weigh(z: Tensor, weights: Tensor) -> Tensor:
    """Token features (B, L, D) times weights (B, L), each item then scaled to the mean that it had.

    A mean that would vanish or change its sign says nothing of the features' size: there the product stays as it is.
    """
    product = z.float() * weights[..., None]
    ratio = z.float().mean((1, 2), keepdim=True) / product.mean((1, 2), keepdim=True)
    return (product * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)).to(z.dtype)


# ---- text to weighted tokens ----


def parse_emphasis(text: str) -> list[tuple[str, float]]:
    """`text` as parts with a weight each, without the brackets that weigh them; neighbours differ in weight.

    `(a)` multiplies the weight of what is inside by 1.1, `(a:1.2)` by the number, `[a]` divides it by 1.1, and all of
    them nest. A backslash before a bracket or a backslash makes it literal; so is a bracket that has no partner.
    """
    parts: list[tuple[str, float]] = []
    opened: list[int] = []  # which parts are brackets that may still find a partner
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


def _chunks(tokenizer: Tokenizer, text: str, room: int, reading: Reading) -> list[Chunk]:
    """A prompt as chunks of at most `room` tokens, of which there is at least one; not long: as one, of any length."""
    whole = _weighted(tokenizer, parse_emphasis(text) if reading.emphasis else [(text, 1.0)])
    if not reading.long_prompt:
        return [whole]
    if room < 1:
        raise ValueError("this encoder's max_length leaves no room for text")
    chunks = []
    while len(whole.weights) > room:
        end = _end_of_chunk(whole.tokens, room)
        chunks.append(_part(whole, slice(0, end)))
        whole = _part(whole, slice(end, None))
    return [*chunks, whole]


def _end_of_chunk(tokens: Tokens, room: int) -> int:
    """How many tokens to take: up to the last comma, if that is among the last 20 of 75; all that fit otherwise."""
    for last in reversed(range(room - room * 20 // 75, room)):
        if tokens.text[tokens.starts[last]] == ",":
            return last + 1
    return room


def _part(chunk: Chunk, part: slice) -> Chunk:
    text, ids, starts = chunk.tokens
    return Chunk(Tokens(text, ids[part], starts[part]), chunk.weights[part])


def _weighted(tokenizer: Tokenizer, parts: Sequence[tuple[str, float]]) -> Chunk:
    """Every part tokenised by itself, one after the other: a word that is weighted in part falls into words."""
    text, ids, starts, weights = "", [], [], []
    for inner, weight in parts:
        read = tokenizer.tokenize(inner.strip(" "))
        text += " " if text else ""
        starts += [len(text) + start for start in read.starts]
        ids += read.ids
        weights += [weight] * len(read.ids)
        text += read.text
    return Chunk(Tokens(text, ids, starts), weights)
