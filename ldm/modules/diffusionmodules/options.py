"""Options of a public `unet_config`: how they are read, and which exclude each other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def check_context(use_spatial_transformer: bool, context_dim: int | Sequence[int] | None) -> None:
    """Raise ValueError for transformers without the width of a context, or the other way round."""
    if use_spatial_transformer and context_dim is None:
        raise ValueError("use_spatial_transformer needs context_dim, the width of the context to attend on")
    if context_dim is not None and not use_spatial_transformer:
        raise ValueError(f"context_dim={context_dim} has no effect without use_spatial_transformer: true")


def check_heads(num_heads: int, num_head_channels: int) -> None:
    """Raise ValueError if neither is given (-1)."""
    if num_heads == -1 and num_head_channels == -1:
        raise ValueError("give num_heads or num_head_channels")


def make_label_embedding(num_classes: int | str, time_dim: int, adm_in_channels: int | None) -> nn.Module:
    """Build the module that embeds a label, to be added to the timestep embedding."""
    if isinstance(num_classes, int):
        return nn.Embedding(num_classes, time_dim)
    if num_classes == "continuous":
        return nn.Linear(1, time_dim)
    if num_classes == "sequential":
        if adm_in_channels is None:
            raise ValueError('num_classes="sequential" needs adm_in_channels, the width of the vectors')
        layers = nn.Sequential(nn.Linear(adm_in_channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        return nn.Sequential(layers)  # published nested: label_emb.0.0.weight
    raise ValueError(f'num_classes must be an int, "continuous" or "sequential", not {num_classes!r}')


def per_level(value: int | bool | Sequence[int], levels: int, name: str) -> list[int]:
    """Repeat a single value for every level, or check the length of a list."""
    if isinstance(value, int):
        return [value] * levels
    if len(value) != levels:
        raise ValueError(f"{name} has {len(value)} entries for the {levels} levels of channel_mult")
    return list(value)


def split_heads(channels: int, num_heads: int, num_head_channels: int) -> tuple[int, int]:
    """Return (heads, width of a head) for attention over `channels`; one of the two is given, the other -1."""
    if num_head_channels == -1:
        return num_heads, divide(channels, num_heads, "channels", "num_heads")
    return divide(channels, num_head_channels, "channels", "num_head_channels"), num_head_channels


def divide(number: int, by: int, name: str, by_name: str) -> int:
    """Return `number // by`; ValueError unless it divides."""
    if by < 1 or number % by:
        raise ValueError(f"{name}={number} is not divisible by {by_name}={by}")
    return number // by
