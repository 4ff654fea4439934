"""Checkpoints in the layout of Lightning 1.x, with the pickled extras that the public v1 files carry.

Neither Lightning nor an old numpy is needed: while the file is written, stand-ins sit in `sys.modules` under the names
that it is to ask for.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

CALLBACK_MODULE = "pytorch_lightning.callbacks.model_checkpoint"
NUMPY_MODULES = {"old": "numpy.core.multiarray", "new": "numpy._core.multiarray"}


def _named(module: str, name: str, made: Any) -> Any:
    made.__module__, made.__name__, made.__qualname__ = module, name, name
    return made


class _Scalar:
    """Pickles as a numpy float64 does, under a chosen module name."""

    def __init__(self, value: float, function: Any) -> None:
        self.value, self.function = value, function

    def __reduce__(self) -> tuple:
        return self.function, (np.dtype("float64"), np.float64(self.value).tobytes())


@contextmanager
def _pretend(objects: Mapping[str, Any]) -> Iterator[None]:
    """`objects` by dotted name, importable under it while the context lasts."""
    modules = {}
    for path, thing in objects.items():
        module, _, name = path.rpartition(".")
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            modules.setdefault(
                ".".join(parts[:i]), sys.modules.get(".".join(parts[:i]), types.ModuleType(parts[i - 1]))
            )
        modules[module] = types.ModuleType(module)
        setattr(modules[module], name, thing)
    with mock.patch.dict(sys.modules, modules):
        yield


def save_lightning1(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    numpy: str = "old",
    zipped: bool = True,
    global_step: int = 470000,
    epoch: int = 3,
) -> Path:
    """Write `state` as Lightning 1.4 did: a callback class as dictionary key, numpy scalars, bytes, counters."""
    callback = _named(CALLBACK_MODULE, "ModelCheckpoint", type("ModelCheckpoint", (), {}))
    scalar = _named(NUMPY_MODULES[numpy], "scalar", lambda dtype, data: None)
    content = {
        "epoch": epoch,
        "global_step": global_step,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": dict(state),
        "callbacks": {
            callback: {"monitor": "val/loss", "best_model_score": _Scalar(0.125, scalar), "best_model_path": "x"}
        },
        "optimizer_states": [],
        "lr_schedulers": [{"base_lrs": [1e-4], "_last_lr": [_Scalar(1e-4, scalar)], "raw": b"\x00\xff"}],
    }
    names = {f"{CALLBACK_MODULE}.ModelCheckpoint": callback, f"{NUMPY_MODULES[numpy]}.scalar": scalar}
    with _pretend(names):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path
