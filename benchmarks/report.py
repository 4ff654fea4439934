"""Files of a benchmark: numbers, a table, a plot, and what machine it ran on."""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ldm import __version__
from ldm.files import atomic_write, write_text
from ldm.util import REPOSITORY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.settings import Row

Record = Mapping[str, Any]
HEADS = (
    *("what", "who", "precision", "batch", "size", "median", "spread", "first", "rate", "of peak", "memory", "time"),
    *("PSNR", "note"),
)


def new_folder(wanted: Path) -> Path:
    """Create the folder `wanted`, or, if it exists, `wanted-2`, `wanted-3`, ...; returns the path."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir()
            break
        except FileExistsError:
            continue
    return folder


class Report:
    """Results so far, written to `folder`/results.json and results.md after every row."""

    def __init__(self, folder: Path, machine: Record, options: Record) -> None:
        self.folder = folder
        self.results: dict[str, Any] = {"machine": machine, "options": options, "peaks": {}, "rows": [], "profiles": []}
        self.results["finished"] = False

    def add(self, row: Row) -> None:
        """Add a row and write."""
        self.results["rows"].append(row.record())
        self.write()

    def finish(self) -> None:
        """Mark the results as complete and write."""
        self.results["finished"] = True
        self.write()

    def write(self) -> None:
        """Write both files, each atomically."""
        for name, text in (("results.json", json.dumps(self.results, indent=1)), ("results.md", table(self.results))):
            write_text(self.folder / name, text + "\n")


def table(results: Record) -> str:
    """Format all rows as a table, with the machine."""
    lines = [cells(row) for row in results["rows"]]
    used = [i for i, head in enumerate(HEADS) if head in ("what", "who") or any(line[i] for line in lines)]
    rows = [[line[i] for i in used] for line in [HEADS, *lines]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    text.insert(1, "| " + " | ".join("-" * max(width, 3) for width in widths) + " |")
    return "\n".join([*text, "", machine_line(results["machine"])])


def line(row: Record) -> str:
    """Format a row as a line."""
    return ", ".join(cell for cell in cells(row) if cell)


def cells(row: Record) -> list[str]:
    """Format a row's cells in the order of HEADS."""

    def shown(value: Any, form: Callable[[Any], str]) -> str:
        return "" if value is None else form(value)

    return [
        f"{row['suite']}: {row['what']}",
        row["who"],
        row["precision"],
        shown(row["batch"], str),
        shown(row["size"], str),
        shown(row["median"], duration),
        shown(row["spread"], lambda both: " to ".join(map(duration, both))),
        shown(row["first"], duration),
        shown(row["rate"], lambda rate: f"{rate:.3g} {row['unit']}/s"),
        shown(row["utilization"], lambda value: f"{100 * value:.0f} %"),
        shown(row["memory"], amount),
        ", ".join(f"{ratio:.3f} of {who}" for who, ratio in row["ratios"].items()),
        shown(row["psnr"], lambda psnr: f"{psnr:.1f} dB"),
        row["error"] or row["note"],
    ]


def duration(seconds: float) -> str:
    """Format seconds."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.4g} s"


def amount(size: float) -> str:
    """Format bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# ---- plot ----


def plot(rows: Sequence[Record], path: Path) -> None:
    """Plot time and memory against resolution and batch size, one line per task and contender."""
    from matplotlib import color_sequences
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    for panel in axes.flat:
        panel.set_prop_cycle(color=color_sequences["tab20"])
    for across, column, other in ((0, "size", "batch"), (1, "batch", "size")):
        for down, value, unit, scale in ((0, "median", "seconds", 1), (1, "memory", "memory (GB)", 1e9)):
            _panel(axes[down][across], rows, column, other, value, scale)
            axes[down][across].set(xlabel={"size": "pixels per side", "batch": "batch size"}[column], ylabel=unit)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, fontsize="small", loc="outside right upper")
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _panel(axes: Axes, rows: Sequence[Record], column: str, other: str, value: str, scale: float) -> None:
    """Plot `value` against `column`, at each line's least `other`."""
    lines: dict[str, list[Record]] = {}
    for row in rows:
        if row["size"] is not None and row["batch"] is not None and row["median"] is not None:
            lines.setdefault(f"{row['suite']}: {row['what']}, {row['who']}, {row['precision']}", []).append(row)
    for name, line in lines.items():
        least = min(row[other] for row in line)
        points = sorted((row[column], row[value]) for row in line if row[other] == least and row[value])
        axes.plot([x for x, _ in points], [y / scale for _, y in points], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row[column] for line in lines.values() for row in line}))
    axes.xaxis.set_major_formatter("{x:g}")
    if any(np.size(line.get_xdata()) for line in axes.lines):  # an empty axis has no logarithm
        axes.set_yscale("log")
    axes.grid(alpha=0.3)


def profile_table(profile: Record) -> str:
    """Format a profile."""
    title = "{suite}: {what}, {who}, {precision}, batch {batch}, {size}".format(**profile)
    lines = [
        f"{100 * entry['fraction']:6.1f} % {1000 * entry['seconds']:10.1f} ms {entry['calls']:6} x {entry['name']}"
        for entry in profile["operations"]
    ]
    return "\n".join([f"Profile, {title}", *lines])


# ---- machine ----

LIBRARIES = ("torch", "diffusers", "transformers", "pytorch-lightning", "numpy", "triton")
# variables that change how a process computes or allocates
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "LD_PRELOAD", "MALLOC_ARENA_MAX", "PYTORCH_CUDA_ALLOC_CONF")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return processor, memory, GPU, versions, date and commit."""
    found = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": memory_size(),
        "system": platform.platform(),
        "device": str(device),
        "python": platform.python_version(),
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "version": __version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {"gpu": card.name, "gpu_memory": card.total_memory, "cuda": torch.version.cuda}
    return found


def machine_line(machine: Record) -> str:
    """Format `describe_machine` as a line."""
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{where}; torch {machine['libraries']['torch']}; {machine['date']}; commit {machine['commit']}"


def cpu_model() -> str:
    """Return the processor's name, if known."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_size() -> int | None:
    """Return the machine's memory in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def library_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit(root: Path = REPOSITORY) -> str | None:
    """Return the commit of a clone, with a + if files differ from it; None without a repository."""
    git = ["git", "-C", str(root)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changes.stdout.strip() else "")
