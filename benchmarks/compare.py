"""Compare contenders for the same work, interleaved in one process."""

from __future__ import annotations

import functools
import gc
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import PeakMemory, in_turns, measure_peak_flops, profile_call, ratio, synchronized_clock, timed
from benchmarks.networks import Unavailable
from benchmarks.settings import DTYPES, Row, Settings

logger = logging.getLogger(__name__)


class Contender(NamedTuple):
    """A row to fill, and a function that prepares everything and returns the call to measure."""

    row: Row
    build: Callable[[], Callable[[], Tensor]]


class Bench:
    """State of a benchmark: settings, peak operations per second by precision, profiles."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.peaks: dict[str, float] = {}
        self.profiles: list[dict[str, Any]] = []

    def peak(self, precision: str) -> float:
        """Return the peak operations per second, measured at the first call unless set."""
        if precision not in self.peaks:
            device, dtype = self.settings.device, DTYPES[precision]
            self.peaks[precision] = self.settings.peak or measure_peak_flops(device, dtype)
        return self.peaks[precision]

    @torch.no_grad()
    def compare(self, contenders: Sequence[Contender]) -> Iterator[Row]:
        """Measure contenders interleaved and yield their rows.

        Results are compared with those of the first contender that works. One that fails has the error in its row,
        one that is `Unavailable` has no row.

        Raises:
            ValueError: If results have different shapes.
        """
        settings, rows, calls = self.settings, {}, {}
        reference: Tensor | None = None
        for row, build in contenders:
            try:
                call = build()
                result = _warm_up(settings, row, call)
            except Unavailable as error:
                logger.warning("%s, %s: left out, since %s", row.what, row.who, error)
                continue
            except (RuntimeError, MemoryError) as error:
                row.error = explain(error)
                logger.warning("%s, %s: %s", row.what, row.who, row.error)
                yield row
                continue
            if reference is None:
                reference = result
            elif result.shape != reference.shape:
                raise ValueError(f"{row.what}: {row.who} gives {tuple(result.shape)}, not {tuple(reference.shape)}")
            else:
                row.psnr = psnr(result, reference)
                row.note = row.note or ("" if row.psnr else "equal")
            calls[row.who], rows[row.who] = call, row
        clock = synchronized_clock(settings.device)
        turns = {who: functools.partial(timed, call, clock) for who, call in calls.items()}
        yield from finish(rows, in_turns(turns, settings.repeats))
        if settings.profile and rows:
            who, row = next(iter(rows.items()))
            names = ("suite", "what", "who", "precision", "batch", "size")
            operations = profile_call(calls[who], settings.device)
            self.profiles.append({name: getattr(row, name) for name in names} | {"operations": operations})
        calls.clear()
        turns.clear()
        release(settings)


def finish(rows: Mapping[str, Row], seconds: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    """Fill rows with their times and the ratios to each other."""
    for name, row in rows.items():
        row.seconds = seconds[name]
        row.ratios = {other: ratio(seconds[name], seconds[other]) for other in rows if other != name}
        yield row


def _warm_up(settings: Settings, row: Row, call: Callable[[], Tensor]) -> Tensor:
    """Make the calls that do not count, the last of them measuring memory; returns the first result."""
    result: list[Tensor] = []
    for number in range(settings.warm_up):
        result.clear()
        with PeakMemory(settings.device) as peak:
            seconds = timed(lambda: result.append(call().clone()), synchronized_clock(settings.device))
        if number == 0:
            row.first = seconds
    row.memory = peak.extra
    return result[0]


def release(settings: Settings) -> None:
    """Free memory and compiled code: the next contenders have other shapes, for which they would not be reused."""
    gc.collect()
    torch.compiler.reset()
    if settings.on_gpu:
        torch.cuda.empty_cache()


def psnr(result: Tensor, reference: Tensor) -> float | None:
    """Compute the PSNR in dB with the range of `reference` as peak; None if equal."""
    result, reference = result.float(), reference.float()
    error = (result - reference).square().mean().item()
    peak = (reference.max() - reference.min()).item()
    return 10 * math.log10(peak**2 / error) if error and peak else None


def explain(error: BaseException) -> str:
    """Describe an error in a sentence; when out of memory, with the size and what to try."""
    text = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    if not (isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text, re.IGNORECASE)):
        return text[:300]
    size = re.search(r"tried to allocate ([\d.]+ ?\w*)", text, re.IGNORECASE)
    needed = f" (needs another {size[1]})" if size else ""
    return f"out of memory{needed}: try a smaller --batch or --size, fewer --ways, or on a GPU --precision fp16"
