"""What is noted on a model that was loaded to draw with."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import nn

from ldm.models.model_info import ModelInfo


class Shortcuts(Protocol):
    """What `ldm.inference.Shortcuts` is to a model."""

    def taken(self, network: nn.Module) -> AbstractContextManager[None]:
        """Within it `network` takes them."""


class Loaded:
    """Set by `ldm.inference.loading`; all but the first are there where they were asked for."""

    info: ModelInfo | None = None
    lodging: AbstractContextManager[object]
    one_by_one: bool
    shortcuts: Shortcuts
