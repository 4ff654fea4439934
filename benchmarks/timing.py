"""Turns, medians and spread. The machine is never quite the same twice, so what is compared takes turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def in_turns(calls: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What each of `calls` gives, `repeats` times over: the first of all, the second of all, ..., the first again."""
    results: dict[str, list[T]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            results[name].append(call())
    return results


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that looks when `device` has done what it was told."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    return now


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of a call by `clock`; see `clock_of`."""
    start = clock()
    call()
    return clock() - start


def spread(seconds: Sequence[float]) -> tuple[float, float]:
    """The least and the most."""
    return min(seconds), max(seconds)


def ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """The median of `seconds` by what the others took in the same turn: below 1 is faster."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))
