"""What is said when a memory-mapped file is cut short under a run: one sentence, and an exit code.

Touching a page that is gone raises SIGBUS in the very instruction that touches it. Python cannot handle that: its
handlers run after the instruction, to which the system returns first, for ever. So the system is given a function that
never returns. Elsewhere, taking Python's lock in a signal handler would be asking for trouble. Here the signal comes
out of numerical kernels and copies only, which hold no lock that Python needs, and of which torch calls none before it
gives up Python's own.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
from typing import Any

CODE = 1  # it failed while running
_told: list[int] = []
_kept: list[Any] = []  # the system has nothing but the function's address


def end_in_words() -> None:
    """Have SIGBUS end this process with a sentence, where there is such a signal and nobody debugs it."""
    if not hasattr(signal, "SIGBUS") or faulthandler.is_enabled():
        return
    try:
        install: Any = ctypes.CDLL(None).signal
    except (OSError, AttributeError):
        return
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    try:
        handler = kind(_end)
    except MemoryError:  # a system that lets no program write functions
        return
    _kept.append(handler)
    install.argtypes, install.restype = (ctypes.c_int, kind), ctypes.c_void_p
    install(signal.SIGBUS, handler)


def _end(number: int) -> None:
    if _told:  # several threads come here at once
        time.sleep(60)
    _told.append(number)
    try:
        os.write(2, f"\nerror: {_sentence()}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(CODE)


def _sentence() -> str:
    storages = sys.modules.get("ldm.checkpoint.formats.storages")  # without it nothing was mapped by us
    shrunk = storages.shrunk() if storages else []
    if shrunk:
        return (
            f"{shrunk[0]} was cut short while it was in use: put new files in place by renaming them, not by writing "
            "over others, and run again"
        )
    return "a file that was mapped into memory could not be read: its disk failed, or shared memory (/dev/shm) is full"
