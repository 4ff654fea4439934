"""Dropping conditions in training, so that one network learns both halves of guidance (Ho and Salimans 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.distributed_rng import DistributedRNG

CONTEXT = "context"  # the batch's entry that holds encoded conditions, where they were computed beforehand


class ConditionDropout:
    """Replaces entries of a batch, each row by chance: `{caption: {p: 0.1, val: ""}}` is one caption in ten.

    settings: the public `ucg_training`. Raises ValueError for what is no such mapping.
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
        """What the entry `key` is replaced by, None if it is left alone."""
        return self.rules[key][1] if key in self.rules else None

    def __call__(
        self,
        batch: Mapping[str, Any],
        draws: DistributedRNG,
        cond_key: str | None = None,
        encode: Callable[[Any], Tensor] | None = None,
    ) -> dict[str, Any]:
        """The batch with rows replaced; the one given stays as it is.

        A cached context stands for the entry `cond_key`: its rows become `encode(value)` (1, L, D).
        """
        batch = dict(batch)
        for key, (p, value) in self.rules.items():
            cached = key == cond_key and CONTEXT in batch
            if key not in batch and not cached:
                raise ValueError(f"ucg_training drops {key!r}, but batches hold {', '.join(sorted(batch))}")
            rows = draws.bernoulli(len(batch[CONTEXT if cached else key]), p)
            if key in batch:
                batch[key] = _replaced(key, batch[key], rows, value)
            if cached and encode is not None:
                context = batch[CONTEXT]
                batch[CONTEXT] = torch.where(rows.to(context.device)[:, None, None], encode(value).to(context), context)
        return batch


def _replaced(key: str, entry: Any, rows: Tensor, value: Any) -> Any:
    if not isinstance(entry, Tensor):
        return [value if dropped else item for item, dropped in zip(entry, rows.tolist())]
    if not isinstance(value, (int, float)):
        raise ValueError(f"ucg_training.{key}.val must be a number, as the batch's {key!r} is, not {value!r}")
    return entry.masked_fill(rows.to(entry.device).reshape(-1, *(1,) * (entry.ndim - 1)), value)
