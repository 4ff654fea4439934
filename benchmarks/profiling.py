"""Where the time of a call goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from benchmarks.rows import Row

Profile = dict[str, Any]  # {"suite", "what", ... of the row, "operations": [{"name", "seconds", "share", "calls"}]}
LONGEST = 12  # operations that are listed


def profile(call: Callable[[], object], row: Row, device: torch.device) -> Profile:
    """The operations of one call that take the most time themselves, on the GPU if that is where it computes."""
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
    operations = [{"name": k, "seconds": s, "share": s / total, "calls": n} for s, k, n in longest]
    names = ("suite", "what", "who", "precision", "batch", "size")
    return {name: getattr(row, name) for name in names} | {"operations": operations}


def table(profile: Profile) -> str:
    """A profile in lines."""
    title = "{suite}: {what}, {who}, {precision}, batch {batch}, {size}".format(**profile)
    lines = [
        f"{100 * entry['share']:6.1f} % {1000 * entry['seconds']:10.1f} ms {entry['calls']:6} x {entry['name']}"
        for entry in profile["operations"]
    ]
    return "\n".join([f"Where the time goes, {title}", *lines])
