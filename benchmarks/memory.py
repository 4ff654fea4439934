"""Peaks of memory: on a GPU what torch allocated, on a CPU the process's anonymous pages, looked at all the time.

Mapped files do not count: the system takes their pages back when it needs them. Nor does what a parent process once
had, which is in the peak that the system itself keeps for a child (ru_maxrss).
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

import torch

STATUS = Path("/proc/self/status")
EVERY = 0.002  # seconds between two looks


def anonymous() -> int | None:
    """Bytes of memory that this process has for itself alone; None where the system does not tell."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


class Peak:
    """`with Peak(device) as peak:` afterwards, `peak.total` are the most bytes there were, `peak.extra` those that came
    on top of `peak.before`; None where that cannot be told."""

    before: int | None = None
    total: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def extra(self) -> int | None:
        """What came on top."""
        return None if self.total is None or self.before is None else self.total - self.before

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            self.before = self.total = anonymous()
            self._end = threading.Event()
            self._watch = threading.Thread(target=self._look, daemon=True)
            self._watch.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.total = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu":
            self._end.set()
            self._watch.join()

    def _look(self) -> None:
        while True:
            now = anonymous()
            if now is None:
                return
            self.total = max(self.total or 0, now)
            if self._end.wait(EVERY):
                return
