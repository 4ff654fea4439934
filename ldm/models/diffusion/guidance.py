"""Guidance: how predictions under several conditions become one. Its only home; samplers do not know it exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Condition = Any  # a tensor, a list of tensors, or a dict of lists: c_concat, c_crossattn, and c_adm as a tensor
Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> what the network predicts


def join_conditions(first: Condition, second: Condition) -> Condition:
    """One batch of two conditions of the same structure: `first` on top of `second`.

    Tensors (or what they hold: lists and dicts of them, to any depth) are concatenated along the batch axis.
    """
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if first.keys() != second.keys():
            raise ValueError(f"conditions differ in their entries: {sorted(first)} and {sorted(second)}")
        return {name: join_conditions(first[name], second[name]) for name in first}
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        if len(first) != len(second):
            raise ValueError(f"conditions differ in length: {len(first)} and {len(second)}")
        return [join_conditions(a, b) for a, b in zip(first, second)]
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first.shape[1:] != second.shape[1:]:
            raise ValueError(f"conditions differ in shape: {tuple(first.shape)} and {tuple(second.shape)}")
        return torch.cat([first, second])
    raise ValueError(f"cannot join conditions of types {type(first).__name__} and {type(second).__name__}")


def condition_batch_size(cond: Condition) -> int | None:
    """The batch size of a condition, or None where it holds no tensor."""
    if isinstance(cond, Tensor):
        return cond.shape[0]
    entries: Sequence[Any] = list(cond.values()) if isinstance(cond, Mapping) else cond or ()
    sizes = [condition_batch_size(entry) for entry in entries if not isinstance(entry, str)]
    return next((size for size in sizes if size is not None), None)


def classifier_free(
    apply_model: Callable[[Tensor, Tensor, Condition], Tensor],
    cond: Condition,
    uncond: Condition = None,
    scale: float = 1.0,
) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2021): uncond + scale * (cond - uncond), both in one batch.

    Without `uncond`, or at scale 1, the conditional prediction alone.
    """
    if uncond is None or scale == 1.0:
        return lambda x, t: apply_model(x, t, cond)
    both = join_conditions(uncond, cond)  # [unconditional, conditional], as published

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        without, with_ = apply_model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return without + scale * (with_ - without)

    return denoise
