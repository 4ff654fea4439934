"""What is measured. A suite is a module with `rows(bench)`, which yields its rows one by one."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.comparing import Bench
    from benchmarks.rows import Row

SUITES = ("unet", "vae", "text", "load", "e2e", "train", "memory")


def rows(suite: str, bench: Bench) -> Iterator[Row]:
    """Those of a suite of this name."""
    return import_module(f"{__name__}.{suite}").rows(bench)
