"""The key of a set of weights: what a cache remembers of the model that made it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn


def fingerprint(module: nn.Module, ignore: Sequence[str] = ()) -> str:
    """sha256, in hexadecimal, over the names, shapes, dtypes and values of a module's state dict.

    Keys that start with one of `ignore` do not count. The device and the order of registration do not matter.
    Raises ValueError for a module on the meta device, which has no values yet.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(tuple(ignore)):
            continue
        if tensor.is_meta:
            raise ValueError(
                f"a model without weights has no fingerprint ({name} is on the meta device): fill it first"
            )
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
