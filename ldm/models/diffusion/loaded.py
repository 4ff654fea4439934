"""What is noted on a model that was loaded to draw with."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn


class Shortcuts(Protocol):
    """What `ldm.inference.Shortcuts` is to a model."""

    def taken(self, network: nn.Module) -> AbstractContextManager[None]:
        """Within it `network` takes them."""


class Loaded:
    """Set by `ldm.inference.loading`; the last three are there where they were asked for."""

    checkpoint_path: str
    global_step_of_file: int | None
    family: str
    autocast_dtype: torch.dtype | None
    one_scale: bool
    sampling: dict[str, Any]
    lodging: AbstractContextManager[object]
    one_by_one: bool
    shortcuts: Shortcuts
