"""Measurements: interleaved timing, peak memory, operation counts, profiles, and jobs in fresh processes.

python -m benchmarks.measure MODULE:FUNCTION '{"argument": ...}' runs one job, see `run_in_process`.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile
from torch.utils.flop_counter import FlopCounterMode

from ldm.util import REPOSITORY

T = TypeVar("T")

# ---- time ----


def in_turns(calls: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Run all of `calls` once per repeat, so that changes of the machine's speed affect all alike."""
    results: dict[str, list[T]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            results[name].append(call())
    return results


def synchronized_clock(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds that waits for the device first."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    return now


def timed(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Measure the seconds of a call by `clock`."""
    start = clock()
    call()
    return clock() - start


def ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Compute the median over turns of `seconds` / `others`; below 1 is faster."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


# ---- memory ----

STATUS = Path("/proc/self/status")
INTERVAL = 0.002  # seconds between samples


def anonymous_memory() -> int | None:
    """Return this process's anonymous memory in bytes; None if unknown.

    Mapped files do not count, as the system reclaims their pages, nor does a parent's peak, as in ru_maxrss.
    """
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text())
    except OSError:
        return None
    return 1024 * int(found[1]) if found else None


class PeakMemory:
    """Context manager for peak memory: torch's allocations on a GPU, sampled anonymous memory on a CPU.

    Attributes:
        before: Bytes at the start.
        total: Peak in bytes; None if unknown.
    """

    before: int | None = None
    total: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def extra(self) -> int | None:
        """Peak minus the memory at the start."""
        return None if self.total is None or self.before is None else self.total - self.before

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == "cpu":
            self.before = self.total = anonymous_memory()
            self._end = threading.Event()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.total = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu":
            self._end.set()
            self._thread.join()

    def _sample(self) -> None:
        while (now := anonymous_memory()) is not None:
            self.total = max(self.total or 0, now)
            if self._end.wait(INTERVAL):
                return


# ---- operations ----


@torch.no_grad()
def count_flops(call: Callable[[], object]) -> int:
    """Count floating-point operations of products, convolutions and attention; a multiply-add counts as two.

    With networks and inputs on the meta device this takes neither time nor memory.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@torch.no_grad()
def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure operations per second: the faster of a large matrix product and a large 3x3 convolution."""
    large = device.type != "cpu"
    side, (batch, channels, pixels) = (8192, (8, 1280, 64)) if large else (2048, (2, 320, 64))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    x = torch.randn(batch, channels, pixels, pixels, device=device).to(dtype, memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    calls = (lambda: a @ b, lambda: F.conv2d(x, kernel, padding=1))
    work = (2 * side**3, 2 * batch * pixels**2 * 9 * channels**2)

    def fastest(call: Callable[[], object]) -> float:
        return min([timed(call, synchronized_clock(device)) for _ in range(6)][2:])

    return max(operations / fastest(call) for operations, call in zip(work, calls))


# ---- profiles ----

LONGEST = 12  # operations in a profile


def profile_call(call: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Return the operations of a call with the most time of their own: {"name", "seconds", "fraction", "calls"}."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch_profile(activities=activities) as found:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    spent = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [(getattr(event, spent) / 1e6, event.key, event.count) for event in found.key_averages()]
    total = sum(seconds for seconds, _, _ in events) or 1.0
    longest = sorted(events, reverse=True)[:LONGEST]
    return [{"name": k, "seconds": s, "fraction": s / total, "calls": n} for s, k, n in longest]


# ---- jobs in processes of their own ----


def run_in_process(function: str, root: Path = REPOSITORY, **arguments: Any) -> Any:
    """Run `function` of this package, such as "suites.processes:load_ours", in a fresh process, through JSON.

    Args:
        function: MODULE:FUNCTION.
        root: The checkout to run in, see `--against`.
        **arguments: Its arguments.

    Raises:
        RuntimeError: With the last line of the process's error output, if it fails.
        MemoryError: If the system killed it.
    """
    command = [sys.executable, "-m", "benchmarks.measure", function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode == -9:
        raise MemoryError("the process was killed, probably out of memory")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_job(function: str, arguments: str) -> None:
    """Run a job and print its result as the last line."""
    module, _, name = function.partition(":")
    print(json.dumps(getattr(import_module(f"benchmarks.{module}"), name)(**json.loads(arguments))))


if __name__ == "__main__":
    try:
        run_job(*sys.argv[1:])
    except Exception:
        traceback.print_exc()  # not sys.excepthook: torchmetrics 1.4.0 replaces it with one that breaks the last line
        sys.exit(1)
