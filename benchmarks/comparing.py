"""Contenders for the same work, measured in turns in one process."""

from __future__ import annotations

import functools
import gc
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import profiling
from benchmarks.memory import Peak
from benchmarks.networks import Unavailable
from benchmarks.roofline import measured_peak
from benchmarks.rows import Row
from benchmarks.settings import DTYPES, Settings
from benchmarks.timing import clock_of, in_turns, ratio, timed

logger = logging.getLogger(__name__)


class Contender(NamedTuple):
    """row: where it goes. build: makes everything ready, and gives the call to measure, whose result is compared."""

    row: Row
    build: Callable[[], Callable[[], Tensor]]


class Bench:
    """What suites measure with: the settings, the machine's peaks by precision, and the profiles so far."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.peaks: dict[str, float] = {}
        self.profiles: list[profiling.Profile] = []

    def peak(self, precision: str) -> float:
        """Operations a second at best, measured when it is first asked for, unless the settings say it."""
        if precision not in self.peaks:
            device, dtype = self.settings.device, DTYPES[precision]
            self.peaks[precision] = self.settings.peak or measured_peak(device, dtype)
        return self.peaks[precision]

    @torch.no_grad()
    def compare(self, contenders: Sequence[Contender]) -> Iterator[Row]:
        """The rows of contenders, measured in turns; results are compared with those of the first that works.

        A contender that fails says why in its row, and leaves the field to the others; one that is `Unavailable` has
        none. Raises ValueError if their results have different shapes.
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
        turns = {who: functools.partial(timed, call, clock_of(settings.device)) for who, call in calls.items()}
        yield from finished(rows, in_turns(turns, settings.repeats))
        if settings.profile and rows:
            first = next(iter(rows))
            self.profiles.append(profiling.profile(calls[first], rows[first], settings.device))
        calls.clear()
        turns.clear()
        release(settings)


def finished(rows: Mapping[str, Row], seconds: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    """Rows by name with what their turns took, by itself and by what the others took."""
    for name, row in rows.items():
        row.seconds = seconds[name]
        row.ratios = {other: ratio(seconds[name], seconds[other]) for other in rows if other != name}
        yield row


def _warm_up(settings: Settings, row: Row, call: Callable[[], Tensor]) -> Tensor:
    """The result of the calls that do not count, the last of them with an eye on memory."""
    result: list[Tensor] = []
    for number in range(settings.warm_up):
        result.clear()
        with Peak(settings.device) as peak:
            seconds = timed(lambda: result.append(call().clone()), clock_of(settings.device))
        if number == 0:
            row.first = seconds
    row.memory = peak.extra
    return result[0]


def release(settings: Settings) -> None:
    """Give back what contenders had, compiled code too: the next ones have other shapes, which would not be compiled
    for as they are."""
    gc.collect()
    torch.compiler.reset()
    if settings.on_gpu:
        torch.cuda.empty_cache()


def psnr(result: Tensor, reference: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB, the range of `reference` being the peak; None if both are equal."""
    result, reference = result.float(), reference.float()
    error = (result - reference).square().mean().item()
    peak = (reference.max() - reference.min()).item()
    return 10 * math.log10(peak**2 / error) if error and peak else None


def explain(error: BaseException) -> str:
    """A sentence: how much memory was asked for, if that was it, and what to try."""
    text = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    if not (isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", text, re.IGNORECASE)):
        return text[:300]
    size = re.search(r"tried to allocate ([\d.]+ ?\w*)", text, re.IGNORECASE)
    asked = f" (it takes another {size[1]})" if size else ""
    return f"not enough memory{asked}: try a smaller --batch or --size, fewer --ways, or on a GPU --precision fp16"
