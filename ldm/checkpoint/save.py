"""Checkpoints that other tools load: published names, plain tensors, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.checkpoint.checksums import PLACEHOLDER, SHA256, note_data_sum
from ldm.files import atomic_write


def save_checkpoint(
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor],
    *,
    global_step: int = 0,
    epoch: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write `state` to `path`: `.safetensors`, or `.ckpt` in Lightning's layout (`state_dict` beside the counters).

    Values are stored bit for bit, with a checksum that reading with `verify` compares: a zip file's own, or `sha256` in
    the metadata of safetensors, over all bytes after the header. The file appears under its name only when it is
    complete; a failure leaves what was there before. Returns the path.

    Raises FileExistsError if the file exists and `overwrite` is off, ValueError for an unknown suffix or an empty
    state.
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
            note_data_sum(partial)
        else:
            torch.save({"state_dict": tensors, "global_step": global_step, "epoch": epoch}, partial)
    return path


def _storable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each alone in its memory: a view would drag along all that it is a view of."""
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
