"""The CSV of metrics: append only, complete lines after kills, runs of earlier releases continue."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from ldm.training import metrics
from ldm.training.metrics import CSVMetrics, discard_after, read_metrics


def lines(folder: Path, name: str = "metrics.csv") -> list[tuple[float, str, float]]:
    """(step, name, value) of every line."""
    return [(step, key, value) for step, _, key, value in metrics._read_rows(folder / "metrics" / name)]


def log(folder: Path, *entries: tuple[int, dict[str, float]]) -> None:
    board = CSVMetrics(folder)
    for step, values in entries:
        board.log_metrics(values | {"epoch": 0}, step)


def test_a_line_for_each_value(tmp_path):
    log(tmp_path, (0, {"train/loss": 0.5, "lr": 1e-4}), (1, {"val/loss": 0.25}))
    text = (tmp_path / "metrics/metrics.csv").read_text()
    assert text == "step,epoch,name,value\n0,0,train/loss,0.5\n0,0,lr,0.0001\n1,0,val/loss,0.25\n"
    assert not list(tmp_path.glob("metrics/.*"))


@pytest.mark.parametrize("cut", range(1, 60, 3))
def test_an_incomplete_last_line_is_removed(tmp_path, cut):
    log(tmp_path, (1, {"loss": 0.5}), (2, {"loss": 0.25}))
    path = tmp_path / "metrics/metrics.csv"
    complete = path.read_bytes()
    path.write_bytes(complete[: max(len(complete) - cut, 0)])
    left = complete[: max(len(complete) - cut, 0)].count(b"\n")
    if left > 1:
        assert read_metrics(path)["loss"][0].tolist() == [1, 2][: left - 1]
    log(tmp_path, (3, {"loss": 0.125}))
    assert [step for step, _, _ in lines(tmp_path)] == [1, 2][: max(left - 1, 0)] + [3]
    assert all(value == 2**-step for step, _, value in lines(tmp_path))


class Killed(BaseException):
    """Ends a process in the middle."""


WIDE = "epoch,step,train/loss,val/loss\n0,1,0.5,\n0,2,0.25,nan\n1,3,,0.125\n1,4,0.0"
LONG = [(1, "train/loss", 0.5), (2, "train/loss", 0.25), (2, "val/loss", math.nan), (3, "val/loss", 0.125)]


def test_a_file_of_an_earlier_release_is_continued(tmp_path, monkeypatch):
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/metrics.csv").write_text(WIDE)

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("ldm.files.sync", die)
        with pytest.raises(Killed):
            log(tmp_path, (4, {"other": 1.0}))
    log(tmp_path, (4, {"other": 1.0}))
    assert str(lines(tmp_path)) == str([(float(step), name, value) for step, name, value in [*LONG, (4, "other", 1.0)]])


def test_a_kill_while_lines_are_discarded_costs_nothing(tmp_path, monkeypatch):
    log(tmp_path, *((step, {"loss": 2.0**-step}) for step in range(5)))

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(metrics, "_write_rows", die)
        with pytest.raises(Killed):
            discard_after(tmp_path, 3, "now")
    assert len(lines(tmp_path)) == 5
    discard_after(tmp_path, 3, "now")
    assert [step for step, _, _ in lines(tmp_path)] == [0, 1, 2]
    assert len(lines(tmp_path, "metrics-until-now.csv")) == 5


def test_a_full_disk_costs_metrics_only(tmp_path, monkeypatch, caplog):
    board = CSVMetrics(tmp_path)
    board.log_metrics({"loss": 1.0}, 0)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="ldm"):
        patch.setattr(Path, "open", full)
        for step in (1, 2):
            board.log_metrics({"loss": 1.0}, step)
    assert [record.message for record in caplog.records] == [
        f"Cannot write metrics to {tmp_path / 'metrics'} (No space left on device): training continues"
    ]
    board.log_metrics({"loss": 1.0}, 3)
    assert [step for step, _, _ in lines(tmp_path)] == [0, 3]
