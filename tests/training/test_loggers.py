"""Metrics survive kills: no line is half read, and none is lost while the file is written anew."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from ldm.training import loggers
from ldm.training.loggers import Metrics, forget_after


def lines(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics/metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log(folder: Path, *entries: tuple[int, dict[str, float]]) -> None:
    metrics = Metrics(folder)
    for step, values in entries:
        metrics.log_metrics(values, step)
        metrics.save()


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_line_that_was_cut_short_is_taken_away(tmp_path, cut):
    log(tmp_path, (1, {"loss": 0.5}), (2, {"loss": 0.25}))
    path = tmp_path / "metrics/metrics.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[: max(len(whole) - cut, 0)])
    left = whole[: max(len(whole) - cut, 0)].count(b"\n")
    log(tmp_path, (3, {"loss": 0.125}))
    found = lines(tmp_path)
    assert [row["step"] for row in found] == ["1", "2"][: max(left - 1, 0)] + ["3"]
    assert all(float(row["loss"]) == 2 ** -int(row["step"]) for row in found)


class Killed(BaseException):
    """What ends a process in the middle."""


def test_a_kill_while_columns_are_added_costs_nothing(tmp_path, monkeypatch):
    log(tmp_path, (1, {"loss": 0.5}), (2, {"loss": 0.25}))

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("ldm.files.sync", die)
        with pytest.raises(Killed):
            log(tmp_path, (3, {"other": 1.0}))
    assert [row["step"] for row in lines(tmp_path)] == ["1", "2"]
    log(tmp_path, (3, {"other": 1.0}))
    assert [(row["step"], row["loss"], row["other"]) for row in lines(tmp_path)] == [
        ("1", "0.5", ""),
        ("2", "0.25", ""),
        ("3", "", "1.0"),
    ]


def test_a_kill_while_lines_are_forgotten_costs_nothing(tmp_path, monkeypatch):
    log(tmp_path, *((step, {"loss": 2.0**-step}) for step in range(5)))

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loggers, "_write", die)
        with pytest.raises(Killed):
            forget_after(tmp_path, 3, "now")
    assert len(lines(tmp_path)) == 5
    forget_after(tmp_path, 3, "now")
    assert [row["step"] for row in lines(tmp_path)] == ["0", "1", "2"]
    with (tmp_path / "metrics/metrics-until-now.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 5
