"""Metrics of a run: its loggers, and the plot of `curves.png`: `python -m ldm.training.metrics RUN`.

`metrics/metrics.csv` has a line for each value, `step,epoch,name,value`, so that it is only ever appended to. Runs of
earlier releases have a column for each metric instead; `read_metrics` reads both.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from ldm.files import atomic_write
from ldm.util import instantiate_from_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

CSV_NAME = "metrics.csv"
COLUMNS = ("step", "epoch", "name", "value")

# ------------------------------------------------------------------------------------------------------------ loggers


class CSVMetrics(Logger):
    """Appends metrics to `<folder>/metrics/metrics.csv`. A full disk costs metrics, not the run."""

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics" / CSV_NAME
        self._opened = self._warned = False

    @property
    def name(self) -> str:
        """Name of the experiment: none."""
        return ""

    @property
    def version(self) -> str:
        """Version of the experiment: the folder's name."""
        return "metrics"

    @property
    def save_dir(self) -> str:
        """Folder of the run."""
        return os.fspath(self.folder)

    @property
    def log_dir(self) -> str:
        """Folder of the file."""
        return os.fspath(self.path.parent)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing: the run's configs are in its folder."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a line for each of `metrics`."""
        epoch = metrics.get("epoch", "")
        epoch = int(epoch) if epoch != "" else ""
        rows = [(step, epoch, name, float(value)) for name, value in metrics.items() if name != "epoch"]
        try:
            if not self._opened:
                self._open()
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
        except OSError as error:
            if not self._warned:
                logger.warning("Cannot write metrics to %s (%s): training continues", self.log_dir, error.strerror)
            self._warned = True

    def _open(self) -> None:
        """Start the file, or continue one of an earlier start of the run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            with self.path.open("rb+") as file:  # a killed process may leave an incomplete last line
                file.truncate(file.read().rfind(b"\n") + 1)
        if not self.path.is_file() or self.path.stat().st_size == 0:
            self.path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        elif not self.path.read_text(encoding="utf-8").startswith(",".join(COLUMNS) + "\n"):
            _write_rows(self.path, _read_rows(self.path))  # of an earlier release
        self._opened = True


def discard_after(folder: Path, step: int, now: str) -> None:
    """Remove the metrics from `step` on, for a run that resumes there; `metrics-until-<now>.csv` is a complete copy."""
    path = folder / "metrics" / CSV_NAME
    if not path.is_file():
        return
    rows = _read_rows(path)
    earlier = [row for row in rows if row[0] < step]
    if len(earlier) == len(rows):
        return
    with atomic_write(path.with_name(f"metrics-until-{now}.csv")) as partial:
        shutil.copyfile(path, partial)
    _write_rows(path, earlier)


def build_loggers(config: Mapping[str, Any] | None, folder: Path) -> list[Logger]:
    """CSV, TensorBoard where it is installed, and the logger of `lightning.logger`."""
    loggers: list[Logger] = [CSVMetrics(folder)]
    target = (config or {}).get("target", "")
    params: dict[str, Any] = {"save_dir": str(folder)} | dict((config or {}).get("params") or {})
    if "TestTube" in target or (config and not target):
        logger.info("The TestTube logger is no longer part of Lightning: metrics are written as CSV")
    elif target and not target.endswith(("CSVLogger", "TensorBoardLogger")):
        loggers.append(instantiate_from_config({"target": target, "params": params}))
    if target.endswith("TensorBoardLogger") or importlib.util.find_spec("tensorboard") is not None:
        from pytorch_lightning.loggers import TensorBoardLogger

        given: dict[str, Any] = params if target.endswith("TensorBoardLogger") else {"save_dir": str(folder)}
        loggers.append(TensorBoardLogger(**{"name": "", "version": "tensorboard"} | given))
    return loggers


# ------------------------------------------------------------------------------------------------------------ reading

Row = tuple[float, str, str, float]  # step, epoch, name, value
Series = tuple[np.ndarray, np.ndarray]  # steps, values
Metrics = Mapping[str, Series]


def read_metrics(path: Path) -> dict[str, Series]:
    """Read a CSV file: metric -> (steps, values), in the order of steps. Damaged lines are skipped.

    Raises FileNotFoundError if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no metrics {path}: give the folder of a run that has trained")
    points: dict[str, list[tuple[float, float]]] = {}
    for step, _, name, value in _read_rows(path):
        if math.isfinite(value):
            points.setdefault(name, []).append((step, value))
    series = {name: np.array(sorted(pairs, key=lambda pair: pair[0])) for name, pairs in points.items()}
    return {name: (pairs[:, 0], pairs[:, 1]) for name, pairs in series.items()}


def _read_rows(path: Path) -> list[Row]:
    """Read the values of a file in its order. A last line without an end is incomplete and is left out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    is_long = tuple(reader.fieldnames or ()) == COLUMNS
    rows: list[Row] = []
    for record in reader:
        step, epoch = _number(record.pop("step", None)), record.pop("epoch", None) or ""
        values = {record["name"]: record["value"]} if is_long else record
        if math.isfinite(step):
            rows += [(step, epoch, name, _number(value)) for name, value in values.items() if name and value]
    return rows


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Replace a file by one of `rows`, atomically."""
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows((f"{step:.0f}", epoch, name, value) for step, epoch, name, value in rows)


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


# ----------------------------------------------------------------------------------------------------------- plotting

# The loss that is plotted is the first of these that the run has: train/loss, val/loss and val/loss_ema.
LOSSES = ("loss_simple", "rec_loss", "loss")
BUCKET = re.compile(r"val/\w+_(t\d+-\d+)")


class RunPlot(pl.Callback):
    """Plots the curves of a run when it ends, also by an exception. A failure to plot is a warning."""

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Plot at the regular end."""
        if stage == "fit":
            self._plot(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Plot after a failure."""
        self._plot(trainer)

    def _plot(self, trainer: pl.Trainer) -> None:
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            return
        try:
            if (folder / "metrics" / CSV_NAME).is_file():
                logger.info("The curves of this run: %s", plot_run(folder))
        except Exception as error:  # the run's weights are worth more than its curves
            logger.warning("Cannot plot the curves of this run: %s", error)


def smooth(values: np.ndarray) -> np.ndarray:
    """Moving average of `values` (N,) over a window of N / 50, smaller at both ends."""
    window = np.ones(max(1, len(values) // 50))
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / counts


def plot_run(folder: Path) -> Path:
    """Plot the metrics of the run in `folder`; returns the path of its `curves.png`.

    Raises FileNotFoundError without metrics, ValueError if there is nothing to plot, ImportError without matplotlib.
    """
    path = folder / "metrics" / CSV_NAME
    metrics = read_metrics(path)
    panels = [panel for panel in (_plot_loss, _plot_buckets, _plot_rates, _plot_throughput) if panel(metrics, None)]
    if not panels:
        raise ValueError(f"{path} has nothing to plot; its metrics are {sorted(metrics)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install matplotlib") from error
    rows, columns = math.ceil(len(panels) / 2), min(len(panels), 2)
    figure = Figure(figsize=(6.4 * columns, 4 * rows), layout="constrained")
    figure.suptitle(folder.resolve().name)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        panel(metrics, axes)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with atomic_write(folder / "curves.png") as partial:
        figure.savefig(partial, format="png", dpi=110)
    return folder / "curves.png"


# Each panel returns whether the metrics have it and, given axes, plots it.


def _plot_loss(metrics: Metrics, axes: Axes | None) -> bool:
    names = [name.removeprefix("train/").removesuffix("_step") for name in metrics if name.startswith("train/")]
    name = next((loss for loss in LOSSES if loss in names), names[0] if names else None)
    if name is None or axes is None:
        return name is not None
    train = metrics.get(f"train/{name}_step") or metrics[f"train/{name}"]
    axes.plot(*train, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(train[0], smooth(train[1]), color="C0", label="training")
    plotted = [train[1]]
    for suffix, label, colour in (("", "validation", "C1"), ("_ema", "validation, averaged weights", "C2")):
        if f"val/{name}{suffix}" in metrics:
            plotted.append(metrics[f"val/{name}{suffix}"][1])
            axes.plot(*metrics[f"val/{name}{suffix}"], color=colour, marker=".", label=label)
    if min(values.min() for values in plotted) > 0:
        axes.set_yscale("log")
    axes.set_title(name)
    return True


def _plot_buckets(metrics: Metrics, axes: Axes | None) -> bool:
    found = {match[1]: series for name, series in sorted(metrics.items()) if (match := BUCKET.fullmatch(name))}
    if found and axes is not None:
        from matplotlib import colormaps

        for i, (label, series) in enumerate(found.items()):
            axes.plot(*series, color=colormaps["viridis"](i / len(found)), marker=".", label=label)
        axes.set_yscale("log")
        axes.set_title("validation loss by timestep")
    return bool(found)


def _plot_rates(metrics: Metrics, axes: Axes | None) -> bool:
    rate = re.compile(r"lr-(?!.*-(momentum|weight_decay)$).*")
    return _plot_named(metrics, axes, "learning rate", lambda name: rate.fullmatch(name))


def _plot_throughput(metrics: Metrics, axes: Axes | None) -> bool:
    return _plot_named(metrics, axes, "throughput", lambda name: name == "images_per_second")


def _plot_named(metrics: Metrics, axes: Axes | None, title: str, wanted: Callable[[str], Any]) -> bool:
    found = {name: series for name, series in metrics.items() if wanted(name)}
    if axes is not None:
        for name, series in found.items():
            axes.plot(*series, label=name.replace("_", " "))
        axes.set_ylim(bottom=0)
        axes.set_title(title)
    return bool(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Plot the curves of a run."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder, which holds metrics/metrics.csv")
    try:
        print(plot_run(parser.parse_args(argv).run))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
