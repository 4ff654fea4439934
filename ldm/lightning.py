"""PyTorch Lightning, imported without what a model that only draws has no use for.

Models are LightningModules, and `import pytorch_lightning` takes twice as long as `import torch`. Most of that is other
packages, which it and torchmetrics import for a few names: the compiler, to ask whether a model is compiled,
transformers for scores of text, matplotlib to plot them. Here these wait until they are used, in training too. What
drawing imports takes `pl` from here; where Lightning is there already, it is left as it is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch

DEFERRED = ("torch._dynamo", "transformers", "torchmetrics.utilities.plot")


class _Later(type):
    """The type of stand-ins for what a module has: to use one imports the module, to ask what is of it does not."""

    def __instancecheck__(cls, instance: object) -> bool:
        module = sys.modules.get(cls.__module__)  # nothing is of a class that was never imported
        return module is not None and isinstance(instance, getattr(module, cls.__name__))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _real(cls)(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # which `typing` asks of every class
            raise AttributeError(name)
        return getattr(_real(cls), name)

    def __setattr__(cls, name: str, value: Any) -> None:
        setattr(_real(cls), name, value)


def _real(standin: _Later) -> Any:
    if isinstance(sys.modules.get(standin.__module__), _Standins):
        del sys.modules[standin.__module__]
    return getattr(importlib.import_module(standin.__module__), standin.__name__)


class _Standins(ModuleType):
    """In the place of a module: stand-ins for all that it has."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if (self.__name__, name) == ("torch._dynamo", "disable"):
            return _disable
        return _Later(name, (), {"__module__": self.__name__})


def _disable(function: Callable[..., Any], recursive: bool = True, reason: str | None = None) -> Callable[..., Any]:
    """For `@torch.compiler.disable`, which Lightning says while it is imported: torch's own way, at the first call."""
    return torch._disable_dynamo(function, recursive)


@contextmanager
def _deferred() -> Iterator[None]:
    """Within it stand-ins are where modules would be imported; afterwards `import` knows nothing of them."""
    sys.modules.update({name: _Standins(name) for name in DEFERRED if name not in sys.modules})
    try:
        yield
    finally:
        for name in DEFERRED:
            if isinstance(sys.modules.get(name), _Standins):
                del sys.modules[name]


if "pytorch_lightning" not in sys.modules:
    with suppress(Exception), _deferred():  # a release that wants more than names is imported as ever, below
        importlib.import_module("pytorch_lightning")

import pytorch_lightning as pl  # noqa: E402

__all__ = ["pl"]
