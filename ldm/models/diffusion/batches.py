"""What diffusion models read from a batch, and how conditions are dropped from it in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.distributed_rng import DistributedRNG
from ldm.models.diffusion.guidance import Condition

TEXT_KEYS = ("txt", "caption")
PLAIN_KEYS = (*TEXT_KEYS, "coordinates_bbox")  # conditions that are encoded as they are, not as images
CLASS_KEYS = ("class_label", "cls")  # conditions whose encoder takes the complete batch
CONTEXT = "context"  # encoded conditions that were computed beforehand


def entry_of(batch: Mapping[str, Any], key: str) -> Any:
    """`batch[key]`; a ValueError without it lists the keys of the batch."""
    if key not in batch:
        raise ValueError(
            f"batches have no {key!r}, only {', '.join(sorted(batch))}: "
            "give the data some (docs/own-pictures.md says how), or name another key in the model's params"
        )
    return batch[key]


def images_of(batch: Mapping[str, Any], key: str, device: torch.device) -> Tensor:
    """Images (B, H, W, C) or (B, H, W) of a batch as (B, C, H, W) float32 on `device`."""
    x = entry_of(batch, key)
    x = x[..., None] if x.ndim == 3 else x
    return x.movedim(-1, 1).to(device, memory_format=torch.contiguous_format).float()


def first_rows(cond: Condition, count: int | None) -> Condition:
    """The first `count` rows of a condition; all of them if None."""
    if isinstance(cond, Mapping):
        return {name: first_rows(entry, count) for name, entry in cond.items()}
    if isinstance(cond, (list, tuple)):
        return [first_rows(entry, count) for entry in cond]
    return None if cond is None else cond[:count]


def image_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a config's `image_size`, which is one number or two; ValueError for anything else."""
    sides = list(size) if hasattr(size, "__iter__") else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"image_size must be one number of latent pixels or two, height and width, not {size!r}")
    return sides[0], sides[1]


class ConditionDropout:
    """Random replacement of conditions in training, for classifier-free guidance (Ho and Salimans 2021).

    `{caption: {p: 0.1, val: ""}}` replaces one caption in ten.

    Args:
        settings: the public `ucg_training`.

    Raises:
        ValueError: `settings` is not such a mapping.
    """

    def __init__(self, settings: Mapping[str, Mapping[str, Any]] | None) -> None:
        self.rules: dict[str, tuple[float, Any]] = {}
        for key, rule in (settings or {}).items():
            if not isinstance(rule, Mapping) or "p" not in rule or not rule.keys() <= {"p", "val"}:
                raise ValueError(f"ucg_training.{key} must be like {{p: 0.1, val: ''}}, not {rule!r}")
            if not 0.0 <= rule["p"] <= 1.0:
                raise ValueError(f"ucg_training.{key}.p must be from 0 to 1, not {rule['p']}")
            value = rule.get("val")
            self.rules[key] = (float(rule["p"]), "" if value is None else value)

    def value_of(self, key: str) -> Any:
        """The replacement of the entry `key`; None if the entry is never replaced."""
        return self.rules[key][1] if key in self.rules else None

    def __call__(
        self,
        batch: Mapping[str, Any],
        rng: DistributedRNG,
        cond_key: str | None = None,
        encode: Callable[[Any], Tensor] | None = None,
    ) -> dict[str, Any]:
        """A copy of the batch with rows replaced.

        Args:
            batch: its entries are lists or tensors of B rows.
            rng: decides which rows.
            cond_key: the entry that a cached `context` (B, L, D) is the encoding of.
            encode: encodes a replacement (1, L, D) for such a context.
        """
        batch = dict(batch)
        for key, (p, value) in self.rules.items():
            cached = key == cond_key and CONTEXT in batch
            if key not in batch and not cached:
                raise ValueError(f"ucg_training drops {key!r}, but batches hold {', '.join(sorted(batch))}")
            dropped = rng.bernoulli(len(batch[CONTEXT if cached else key]), p)
            if key in batch:
                batch[key] = _replace(key, batch[key], dropped, value)
            if cached and encode is not None:
                context = batch[CONTEXT]
                rows = dropped.to(context.device)[:, None, None]
                batch[CONTEXT] = torch.where(rows, encode(value).to(context), context)
        return batch


def _replace(key: str, entry: Any, dropped: Tensor, value: Any) -> Any:
    if not isinstance(entry, Tensor):
        return [value if drop else item for item, drop in zip(entry, dropped.tolist())]
    if not isinstance(value, (int, float)):
        raise ValueError(f"ucg_training.{key}.val must be a number, as the batch's {key!r} is, not {value!r}")
    return entry.masked_fill(dropped.to(entry.device).reshape(-1, *(1,) * (entry.ndim - 1)), value)
