"""Where metrics go: always to `metrics/metrics.csv`, and to TensorBoard where that is installed."""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment

from ldm.files import atomic_write
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

CSV_NAME = "metrics.csv"


class _Writer(ExperimentWriter):
    """Lightning's writer, but what is in the folder stays, and a disk that is full costs metrics, not the run."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._warned = False
        path = Path(self.metrics_file_path)
        if path.is_file():
            _end_lines(path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _check_log_dir_exists(self) -> None:
        """Lightning would delete what an earlier start of the run wrote."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Lightning would write over the file, and a kill would cost all of it."""
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        _write(path, fieldnames, rows)

    def save(self) -> None:
        """Lightning's hook: write what was logged since; a failure is said once."""
        try:
            super().save()
        except OSError as error:
            if not self._warned:
                logger.warning("Metrics cannot be written to %s (%s): training goes on", self.log_dir, error.strerror)
            self._warned = True


class Metrics(CSVLogger):
    """Metrics as lines of `<folder>/metrics/metrics.csv`; a run that goes on adds to it."""

    def __init__(self, folder: str | os.PathLike) -> None:
        super().__init__(os.fspath(folder), name="", version="metrics", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made when it is first needed."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir)
        return self._experiment


def forget_after(folder: Path, step: int, now: str) -> None:
    """Take lines of the metrics that come after `step` out, for a run that goes on there; a copy of all is kept."""
    path = folder / "metrics" / CSV_NAME
    if not path.is_file():
        return
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        names, rows = reader.fieldnames or [], list(reader)
    kept = [row for row in rows if float(row.get("step") or 0) < step]
    if len(kept) == len(rows):
        return
    with atomic_write(path.with_name(f"metrics-until-{now}.csv")) as partial:
        shutil.copyfile(path, partial)
    _write(path, names, kept)


def _write(path: Path, names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_write(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _end_lines(path: Path) -> None:
    """Take away the last line of a file if it was cut short, as a process leaves it that is killed; or the file."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        path.unlink()
    elif len(whole) < len(data):
        with atomic_write(path) as partial:
            partial.write_bytes(whole)


def build_loggers(config: Mapping[str, Any] | None, folder: Path) -> list[Logger]:
    """CSV, TensorBoard if installed, and what `lightning.logger` asks for."""
    loggers: list[Logger] = [Metrics(folder)]
    target = (config or {}).get("target", "")
    if "TestTube" in target or (config and not target):
        logger.info("The TestTube logger is no longer part of Lightning: metrics are written as CSV")
    elif target and not target.endswith(("CSVLogger", "TensorBoardLogger")):
        loggers.append(instantiate_from_config({"target": target, "params": _placed(config or {}, folder)}))
    if target.endswith("TensorBoardLogger") or importlib.util.find_spec("tensorboard") is not None:
        from pytorch_lightning.loggers import TensorBoardLogger

        params = _placed(config or {}, folder) if target.endswith("TensorBoardLogger") else {"save_dir": str(folder)}
        loggers.append(TensorBoardLogger(**{"name": "", "version": "tensorboard"} | params))
    return loggers


def _placed(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {"save_dir": str(folder)} | dict(config.get("params") or {})
