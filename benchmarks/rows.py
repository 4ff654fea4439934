"""One figure of the benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.settings import Scan
from benchmarks.timing import spread


@dataclass
class Row:
    """`what` was done by `who`, and what it took."""

    suite: str
    what: str
    who: str
    device: str
    precision: str = ""
    batch: int | None = None
    size: int | None = None
    seconds: Sequence[float] = ()  # of every repeat
    first: float | None = None  # seconds of the first call, with what is done once: compiling, laying out weights
    items: float = 1  # `unit`s of work in a repeat
    unit: str = "it"
    flops: int | None = None  # counted operations of a repeat
    peak: float | None = None  # operations a second at best
    memory: int | None = None  # bytes at the peak, on top of what was there (of all, where `note` says so)
    ratios: Mapping[str, float] = field(default_factory=dict)  # by whom: time by theirs, median of turns; < 1 is faster
    psnr: float | None = None  # dB between the first contender's result and this one, by the range of the first
    note: str = ""
    error: str | None = None  # why there is no figure

    @property
    def median(self) -> float | None:
        """Seconds of the median repeat."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def share(self) -> float | None:
        """Of what this machine can do at best."""
        return self.flops / self.median / self.peak if self.flops and self.peak and self.median else None

    @property
    def rate(self) -> float | None:
        """`unit`s a second."""
        return self.items / self.median if self.median else None

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        derived = {"median": self.median, "spread": spread(self.seconds) if self.seconds else None}
        return asdict(self) | derived | {"rate": self.rate, "share": self.share}


def row_of(suite: str, what: str, who: str, device: object, scan: Scan, **more: Any) -> Row:
    """A row of one point of a scan."""
    return Row(suite, what, who, str(device), scan.precision, scan.batch, scan.size, **more)
