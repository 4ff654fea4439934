"""Threads that each compute on one core: for many small products, which one core has done before two have met."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


def side_by_side(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> None:
    """`function(*arguments)` for all of `calls`, without gradients, on as many threads as torch uses."""
    # a forked process has no threads, but would inherit the note of them
    for call in [_threads(torch.get_num_threads(), os.getpid()).submit(function, *call) for call in calls]:
        call.result()


@functools.cache
def can_part() -> bool:
    """Whether a thread can be told to compute alone: torch works by OpenMP, and its functions are to be found."""
    return torch.backends.openmp.is_available() and _openmp() is not None


@functools.cache
def _threads(count: int, process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="ldm-worker", initializer=_begin)


def _begin() -> None:
    torch.get_num_threads()  # torch sets each thread's number when it first asks
    openmp = _openmp()
    if openmp is not None:
        openmp.omp_set_num_threads(1)  # counts for this thread only, unlike torch.set_num_threads
    torch.set_grad_enabled(False)  # likewise


def _openmp() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except TypeError:  # Windows
        return None
    return library if hasattr(library, "omp_set_num_threads") else None
