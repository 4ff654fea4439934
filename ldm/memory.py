"""How this process keeps memory."""

from __future__ import annotations

import ctypes
import sys

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
_LARGE = 2**25  # bytes of the largest blocks that are kept; the most that glibc takes
_KEPT = 2**30  # bytes at the end of the heap that are not given back


def keep_freed_memory() -> bool:
    """Have freed blocks stay with this process, for the next ones of their size; whether that could be arranged.

    glibc gives large blocks back at once, and a network's results are such blocks: every layer's would have to be
    cleared by the system, page by page, before it is written. Blocks of more than 32 MB, as a first stage asks for,
    still come and go: kept, the holes between them would be as large. It is for programs to call, before they draw; a
    library leaves its user's allocator alone.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE) and mallopt(_TRIM_THRESHOLD, _KEPT))
