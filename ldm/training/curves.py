"""The curves of a run, drawn from its `metrics/metrics.csv` into `curves.png`: `python -m ldm.training.curves RUN`."""

from __future__ import annotations

import argparse
import csv
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl

from ldm.files import atomic_write
from ldm.training.loggers import CSV_NAME

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

# The loss to draw, the first of these that the run has; it is logged under train/, val/ and, averaged, val/..._ema.
LOSSES = ("loss_simple", "rec_loss", "loss")
BUCKET = re.compile(r"val/\w+_(t\d+-\d+)")

Series = tuple[np.ndarray, np.ndarray]  # steps, values
Metrics = Mapping[str, Series]


class RunPlot(pl.Callback):
    """DistributedRNG the curves of the run when it ends, however it does. A failure to do so costs a warning."""

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning's hook at a run's regular end."""
        if stage == "fit":
            self._plot(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lightning's hook at any other."""
        self._plot(trainer)

    def _plot(self, trainer: pl.Trainer) -> None:
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]  # Lightning sets it elsewhere
            return
        try:
            for board in trainer.loggers:
                board.save()
            if (folder / "metrics" / CSV_NAME).is_file():
                logger.info("The curves of this run: %s", plot_run(folder))
        except Exception as error:  # the run's weights are worth more than its curves
            logger.warning("The curves of this run cannot be drawn: %s", error)


def read_metrics(path: Path) -> dict[str, Series]:
    """Every metric of a CSV file of Lightning's with its steps, in their order; lines that were cut short are left out.

    Raises FileNotFoundError if there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there are no metrics {path}: give the folder of a run that has trained")
    points: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _number(row.pop("step", None))
            for name, text in row.items():
                value = _number(text)
                if math.isfinite(step) and math.isfinite(value):
                    points.setdefault(name, []).append((step, value))
    series = {name: np.array(sorted(pairs, key=lambda pair: pair[0])) for name, pairs in points.items()}
    return {name: (pairs[:, 0], pairs[:, 1]) for name, pairs in series.items()}


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def smooth(values: np.ndarray) -> np.ndarray:
    """Means over a window of a fiftieth of the values (N,), smaller at both ends."""
    window = np.ones(max(1, len(values) // 50))
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / counts


def plot_run(folder: Path) -> Path:
    """Draw the curves of the run in `folder`; returns the path of `curves.png` there, which is replaced if it exists.

    Raises FileNotFoundError without metrics, ValueError if none of them has a curve, ImportError without matplotlib.
    """
    metrics = read_metrics(folder / "metrics" / CSV_NAME)
    panels = [panel for panel in (_losses, _buckets, _rates, _throughput) if panel(metrics, None)]
    if not panels:
        raise ValueError(f"{folder / 'metrics' / CSV_NAME} holds nothing to draw; its metrics are {sorted(metrics)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(6.4 * min(len(panels), 2), 4 * math.ceil(len(panels) / 2)), layout="constrained")
    figure.suptitle(folder.resolve().name)
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / 2), min(len(panels), 2), i + 1)
        panel(metrics, axes)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path = folder / "curves.png"
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    return path


# Panels: each says whether the metrics have it and, given axes, draws it there.


def _losses(metrics: Metrics, axes: Axes | None) -> bool:
    names = [name.removeprefix("train/").removesuffix("_step") for name in metrics if name.startswith("train/")]
    name = next((loss for loss in LOSSES if loss in names), names[0] if names else None)
    if name is None or axes is None:
        return name is not None
    train = metrics.get(f"train/{name}_step") or metrics[f"train/{name}"]
    axes.plot(*train, color="C0", alpha=0.25, linewidth=0.8)
    axes.plot(train[0], smooth(train[1]), color="C0", label="training")
    drawn = [train[1]]
    for key, label, colour in (("", "validation", "C1"), ("_ema", "validation, averaged weights", "C2")):
        if f"val/{name}{key}" in metrics:
            drawn.append(metrics[f"val/{name}{key}"][1])
            axes.plot(*metrics[f"val/{name}{key}"], color=colour, marker=".", label=label)
    if min(values.min() for values in drawn) > 0:
        axes.set_yscale("log")
    axes.set_title(name)
    return True


def _buckets(metrics: Metrics, axes: Axes | None) -> bool:
    found = {match[1]: series for name, series in sorted(metrics.items()) if (match := BUCKET.fullmatch(name))}
    if found and axes is not None:
        from matplotlib import colormaps

        for i, (label, series) in enumerate(found.items()):
            axes.plot(*series, color=colormaps["viridis"](i / len(found)), marker=".", label=label)
        axes.set_yscale("log")
        axes.set_title("validation loss by timestep")
    return bool(found)


def _rates(metrics: Metrics, axes: Axes | None) -> bool:
    return _named(
        metrics, axes, "learning rate", lambda name: re.fullmatch(r"lr-(?!.*-(momentum|weight_decay)$).*", name)
    )


def _throughput(metrics: Metrics, axes: Axes | None) -> bool:
    return _named(metrics, axes, "throughput", lambda name: name == "images_per_second")


def _named(metrics: Metrics, axes: Axes | None, title: str, wanted: Callable[[str], Any]) -> bool:
    found = {name: series for name, series in metrics.items() if wanted(name)}
    if axes is not None:
        for name, series in found.items():
            axes.plot(*series, label=name.replace("_", " "))
        axes.set_ylim(bottom=0)
        axes.set_title(title)
    return bool(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the curves of the run that the command line names."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run", type=Path, help="run folder, which holds metrics/metrics.csv")
    try:
        print(plot_run(parser.parse_args(argv).run))
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
