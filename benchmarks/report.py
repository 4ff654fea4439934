"""A benchmark on disk and on screen: a folder of its own with the numbers, a table and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.machine import in_words
from ldm.files import atomic_write, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.rows import Row

Record = Mapping[str, Any]  # of a row
HEADS = (
    *("what", "who", "precision", "batch", "size", "median", "spread", "first", "rate", "of peak", "memory", "time"),
    *("PSNR", "note"),
)


class Report:
    """What was found so far, in `folder`/results.json and results.md after every row."""

    def __init__(self, folder: Path, machine: Record, options: Record) -> None:
        self.folder = folder
        self.results: dict[str, Any] = {"machine": machine, "options": options, "peaks": {}, "rows": [], "profiles": []}
        self.results["finished"] = False

    def add(self, row: Row) -> None:
        """A row more."""
        self.results["rows"].append(row.record())
        self.write()

    def finish(self) -> None:
        """All rows are there."""
        self.results["finished"] = True
        self.write()

    def write(self) -> None:
        """Put what there is on disk; a file is whole at any time."""
        for name, text in (("results.json", json.dumps(self.results, indent=1)), ("results.md", table(self.results))):
            write_text(self.folder / name, text + "\n")


def table(results: Record) -> str:
    """All rows as a table, with the machine in words."""
    lines = [cells(row) for row in results["rows"]]
    used = [i for i, head in enumerate(HEADS) if head in ("what", "who") or any(line[i] for line in lines)]
    rows = [[line[i] for i in used] for line in [HEADS, *lines]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    text.insert(1, "| " + " | ".join("-" * max(width, 3) for width in widths) + " |")
    return "\n".join([*text, "", in_words(results["machine"])])


def line(row: Record) -> str:
    """A row in a line, for those who wait."""
    return ", ".join(cell for cell in cells(row) if cell)


def cells(row: Record) -> list[str]:
    """A row's cells, in the order of HEADS; empty ones for what it has not."""

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
        shown(row["share"], lambda share: f"{100 * share:.0f} %"),
        shown(row["memory"], amount),
        ", ".join(f"{ratio:.3f} of {who}" for who, ratio in row["ratios"].items()),
        shown(row["psnr"], lambda psnr: f"{psnr:.1f} dB"),
        row["error"] or row["note"],
    ]


def duration(seconds: float) -> str:
    """In a unit that suits."""
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.4g} s"


def amount(size: float) -> str:
    """Bytes in a unit that suits."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# ---- the plot ----


def plot(rows: Sequence[Record], path: Path) -> None:
    """Time and memory against resolution and batch, a line for everything that was done by somebody."""
    from matplotlib import color_sequences
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    for panel in axes.flat:
        panel.set_prop_cycle(color=color_sequences["tab20"])
    for across, column, other in ((0, "size", "batch"), (1, "batch", "size")):
        for down, value, unit, scale in ((0, "median", "seconds", 1), (1, "memory", "memory (GB)", 1e9)):
            _panel(axes[down][across], rows, column, other, value, scale)
            axes[down][across].set(xlabel={"size": "pixels a side", "batch": "pictures at once"}[column], ylabel=unit)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, fontsize="small", loc="outside right upper")
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _panel(axes: Axes, rows: Sequence[Record], column: str, other: str, value: str, scale: float) -> None:
    """One panel: `value` against `column`, at the least `other` that a line has."""
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
    if any(np.size(line.get_xdata()) for line in axes.lines):  # nothing has no logarithm
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
