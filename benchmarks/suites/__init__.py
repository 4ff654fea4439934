"""Suites of the benchmark: functions that take a `Bench` and yield rows."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.compare import Bench
    from benchmarks.settings import Row

_MODULES = {
    "unet": "networks",
    "vae": "networks",
    "text": "networks",
    "load": "processes",
    "e2e": "processes",
    "train": "training",
    "memory": "processes",
}
SUITES = tuple(_MODULES)


def rows(suite: str, bench: Bench) -> Iterator[Row]:
    """Run a suite and yield its rows."""
    return getattr(import_module(f"{__name__}.{_MODULES[suite]}"), suite)(bench)
