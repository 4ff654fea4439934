"""What the conditioning encoders share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Self

from torch import Tensor, nn

from ldm.modules.encoders.tokenizer import CLIPTokenizer, Tokenizer
from ldm.util import instantiate_from_config


class AbstractEncoder(nn.Module):
    """Base of the conditioning encoders: `encode` is the name by which latent diffusion models call them."""

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        """The conditioning of one batch: the same as calling the encoder."""
        return self(*args, **kwargs)

    def freeze(self) -> None:
        """Eval mode, and no gradients for the weights."""
        self.eval().requires_grad_(False)


class TowerConfig:
    """Base of the dataclasses that give a transformer's size."""

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build from a config section; names left out keep their defaults. ValueError for an unknown name."""
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]  # subclasses are dataclasses
        if unknown := sorted(set(values) - known):
            raise ValueError(f"a {cls.__name__} has no option {unknown}; the options are {sorted(known)}")
        return cls(**{str(key): value for key, value in values.items()})


def check_heads(width: int, heads: int, width_name: str, heads_name: str) -> None:
    """ValueError, naming both, unless `width` divides into `heads`."""
    if width % heads:
        raise ValueError(f"{width_name} {width} is no multiple of {heads_name} {heads}")


def resolve_tokenizer(
    tokenizer: Tokenizer | Mapping[str, Any] | None, default: type[Tokenizer] = CLIPTokenizer
) -> Tokenizer:
    """A tokenizer as encoders take it: None for the `default`, a `{target, params}` config, or a `Tokenizer`."""
    if tokenizer is None:
        return default()
    return tokenizer if isinstance(tokenizer, Tokenizer) else instantiate_from_config(tokenizer)


def check_length(max_length: int, limit: int) -> None:
    """ValueError unless a tower that reads `limit` tokens takes prompts of `max_length`."""
    if not 2 <= max_length <= limit:
        raise ValueError(f"this tower takes max_length 2 to {limit}, got {max_length}")


def check_clip_skip(clip_skip: int, layers: int) -> None:
    """ValueError unless a tower of which `layers` are in use can give the one that is `clip_skip`-th from the end."""
    if not 1 <= clip_skip <= max(layers, 1):
        raise ValueError(f"clip_skip must be from 1, the last layer, to {layers}, the first; got {clip_skip}")


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """ValueError unless a tower of `vocab_size` ids knows all of the tokenizer's."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids, the text tower only {vocab_size}")
