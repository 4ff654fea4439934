"""Save checkpoints that other tools load: published names, plain tensors, written atomically."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint.checksums import PLACEHOLDER, SHA256, write_data_checksum
from ldm.checkpoint.families import ema_name
from ldm.checkpoint.load_weights import AVERAGES, EMA_COUNTERS, SCHEDULE_BUFFERS
from ldm.files import atomic_write


def save_checkpoint(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    *,
    global_step: int = 0,
    epoch: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a state dict as `.safetensors`, or as `.ckpt` in Lightning's layout (`state_dict` beside the counters).

    Values are stored bit for bit with a checksum, which `read_checkpoint(verify=True)` compares. The file appears
    under its name when it is complete; a failure leaves what was there before.

    Returns:
        The path, expanded.

    Raises:
        FileExistsError: the file exists and `overwrite` is off.
        ValueError: the suffix is neither of the two, or there are no weights.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".ckpt", ".safetensors"):
        raise ValueError(f"cannot tell the format of {path}: name it .ckpt or .safetensors")
    if not state:
        raise ValueError(f"there are no weights to save to {path}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already: choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = _storable(state)
    with atomic_write(path, exclusive=not overwrite) as partial:
        if path.suffix == ".safetensors":
            metadata = {"format": "pt", "global_step": str(global_step), "epoch": str(epoch), SHA256: PLACEHOLDER}
            save_file(tensors, partial, metadata)
            write_data_checksum(partial)
        else:
            torch.save({"state_dict": tensors, "global_step": global_step, "epoch": epoch}, partial)
    return path


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors without shared memory: a view would save everything that it is a view of."""
    seen: set[int] = set()
    tensors = {}
    for key, value in state.items():
        tensor = value.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def prune(state: Mapping[str, Tensor], *, use_ema: bool = True, half: bool = False) -> dict[str, Tensor]:
    """Return what sampling needs of a training checkpoint: no averages, no losses.

    Args:
        state: the state dict of a `Checkpoint`.
        use_ema: replace weights by their averages, if there are any.
        half: convert weights to float16; noise schedules and the scale of the latents stay.

    Raises:
        ValueError: the averages are incomplete.
    """
    averaged = {key for key in state if not key.startswith(tuple(AVERAGES)) and ema_name(key) in state}
    copies = [key for key in state if key.startswith(tuple(AVERAGES)) and key not in EMA_COUNTERS]
    if len(averaged) != len(copies):
        raise ValueError(f"{len(copies)} EMA weights do not match {len(averaged)} weights of the same names")
    exact = SCHEDULE_BUFFERS | {"scale_factor"}
    pruned = {}
    for key, value in state.items():
        if key.startswith((*AVERAGES, "loss.", "first_stage_model.loss.", "first_stage_model.model_ema.")):
            continue
        value = state[ema_name(key)] if use_ema and key in averaged else value
        shrinks = half and value.dtype in (torch.float32, torch.float64) and key.rpartition(".")[2] not in exact
        pruned[key] = value.half() if shrinks else value
    return pruned
