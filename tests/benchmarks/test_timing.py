"""Turns, times and ratios, with clocks that say what they are told."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.measure import in_turns, ratio, timed
from benchmarks.settings import Row


def test_contenders_are_interleaved():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    assert in_turns(calls, 2) == {"a": [1, 4], "b": [2, 5], "c": [3, 6]}
    assert "".join(order) == "abcabc"


def test_timed_uses_the_clock():
    clock = itertools.accumulate([5.0, 2.5]).__next__
    assert timed(lambda: None, clock) == 2.5


def test_a_ratio_is_the_median_of_the_turns():
    # of the medians it would be 3 / 2; the machine was slow in the third turn, for both
    assert ratio([1, 3, 40], [2, 2, 40]) == 1.0
    with pytest.raises(ValueError):
        ratio([1, 2], [1])


def test_rows_derive_median_spread_and_rates():
    row = Row("unet", "call", "ours", "cpu", seconds=[4.0, 1.0, 2.0], items=8, unit="images", flops=100, peak=200)
    assert (row.median, row.spread) == (2.0, (1.0, 4.0))
    assert (row.rate, row.utilization) == (4.0, 0.25)
    nothing = Row("unet", "call", "ours", "cpu", error="not enough memory")
    assert (nothing.median, nothing.rate, nothing.utilization) == (None, None, None)
    assert nothing.record()["spread"] is None
