"""Base class of the conditioning encoders, and their shared checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldm.modules.encoders.tokenizer import CLIPTokenizer, Tokenizer
from ldm.util import instantiate_from_config


class AbstractEncoder(nn.Module):
    """Base class of conditioning encoders. Latent diffusion models call `encode`."""

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """Encode a batch of conditions by calling the module."""
        return self(*args, **kwargs)

    def freeze(self) -> None:
        """Set eval mode and disable gradients."""
        self.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Device of the weights. Setting it, as published code does, has no effect: use `.to(device)`."""
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @device.setter
    def device(self, device: object) -> None:
        pass


class TowerConfig:
    """Base class of the dataclasses with a transformer's sizes."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from a config section; missing names keep their defaults. ValueError for unknown names."""
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]  # subclasses are dataclasses
        if unknown := sorted(set(values) - known):
            raise ValueError(f"a {cls.__name__} has no option {unknown}; the options are {sorted(known)}")
        return cls(**{str(key): value for key, value in values.items()})


def disabled_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Replacement for `train` that keeps the mode of a frozen module."""
    return self


def check_heads(width: int, heads: int, width_name: str, heads_name: str) -> None:
    """Raise ValueError unless `width` is a multiple of `heads`."""
    if width % heads:
        raise ValueError(f"{width_name} {width} is no multiple of {heads_name} {heads}")


def resolve_tokenizer(
    tokenizer: Tokenizer | Mapping[str, Any] | None, default: type[Tokenizer] = CLIPTokenizer
) -> Tokenizer:
    """Build an encoder's tokenizer from None (the default), a `{target, params}` config, or a tokenizer."""
    if tokenizer is None:
        return default()
    return instantiate_from_config(tokenizer) if isinstance(tokenizer, Mapping) else tokenizer


def token_ids(tokenizer: Any, text: Any, max_length: int) -> Tensor:
    """Tokenize texts to ids (B, max_length), calling the tokenizer as published code calls those of transformers."""
    batch = tokenizer(
        text,
        truncation=True,
        max_length=max_length,
        return_length=True,
        return_overflowing_tokens=False,
        padding="max_length",
        return_tensors="pt",
    )
    return batch["input_ids"]


def check_length(max_length: int, limit: int) -> None:
    """Raise ValueError unless a tower for `limit` tokens takes prompts of `max_length`."""
    if not 2 <= max_length <= limit:
        raise ValueError(f"this tower takes max_length 2 to {limit}, got {max_length}")


def check_clip_skip(clip_skip: int, layers: int) -> None:
    """Raise ValueError unless 1 <= clip_skip <= layers."""
    if not 1 <= clip_skip <= max(layers, 1):
        raise ValueError(f"clip_skip must be from 1, the last layer, to {layers}, the first; got {clip_skip}")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError unless the tower has an embedding for every id of the tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the text tower only {vocab_size}")
