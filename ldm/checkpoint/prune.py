"""From a training's checkpoint to the file that is given away: what sampling needs, and no more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.checkpoint.families import ema_name
from ldm.checkpoint.load_weights import AVERAGES, EMA_COUNTERS, SCHEDULE_BUFFERS


def prune(state: Mapping[str, Tensor], *, use_ema: bool = True, half: bool = False) -> dict[str, Tensor]:
    """The weights of `state` under their own names, without averages and losses.

    use_ema: averaged weights, where there are any, take the place of those that training ended with. half: weights in
    float16; noise schedules and the scale of the latents stay as they are.

    Raises ValueError if the state holds averages only in part.
    """
    averaged = {key for key in state if not key.startswith(tuple(AVERAGES)) and ema_name(key) in state}
    copies = [key for key in state if key.startswith(tuple(AVERAGES)) and key not in EMA_COUNTERS]
    if len(averaged) != len(copies):
        raise ValueError(f"{len(copies)} averaged weights stand beside {len(averaged)} weights of the same names")
    exact = SCHEDULE_BUFFERS | {"scale_factor"}
    pruned = {}
    for key, value in state.items():
        if key.startswith((*AVERAGES, "loss.", "first_stage_model.loss.", "first_stage_model.model_ema.")):
            continue
        value = state[ema_name(key)] if use_ema and key in averaged else value
        shrinks = half and value.dtype in (torch.float32, torch.float64) and key.rpartition(".")[2] not in exact
        pruned[key] = value.half() if shrinks else value
    return pruned
