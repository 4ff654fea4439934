"""Sampling settings compared: network evaluations, tables and plots."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from benchmarks.shapes import comparison
from benchmarks.shapes.comparison import SETTINGS, Setting, counted
from ldm.inference import load_model, txt2img


@pytest.fixture(scope="module")
def bundled():
    return load_model(ckpt="models/ldm/shapes64/model.ckpt")


@pytest.mark.parametrize(
    "setting", [setting for make in SETTINGS.values() for setting in make()], ids=lambda setting: setting.name
)
def test_every_setting_has_its_stated_cost(bundled, setting):
    """Two-stage rules save one evaluation of both branches at the last step, where it leads to the data itself."""
    with counted(bundled) as counter:
        txt2img(bundled, ["a red circle"], steps=4, seed=0, progress=False, **setting.options)
    most = 4 * setting.cost
    assert most - setting.cost / 2 <= counter.rows <= most or "interval" in setting.name or "plms" in setting.name
    if "plms" in setting.name:  # its first step asks twice
        assert counter.rows == most + setting.cost
    if "interval" in setting.name:
        assert 4 < counter.rows < most


def test_counting_ends_with_the_block(bundled):
    with counted(bundled) as counter:
        pass
    bundled.apply_model(torch.zeros(1, 8, 8, 8), torch.tensor([5]), bundled.get_learned_conditioning(["a"]))
    assert counter.rows == 0


def test_rows_tables_and_plots(bundled, tmp_path):
    settings = [Setting("good", 2, {"sampler": "dpmpp_2m"}), Setting("costly", 30, {"sampler": "heun"})]
    rows = list(comparison.compare(bundled, settings, [16, 24], "single-full", 4, 2, seed=0))
    assert (
        [row["evaluations"] for row in rows] == [row["budget"] for row in rows] == [16, 24]
    )  # the other has no step within these budgets
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    comparison.write(tmp_path, {"seed": 0}, rows)
    table = (tmp_path / "samplers.md").read_text()
    assert table.startswith("| | 16 | 24 |\n") and "| good | " in table
    assert Image.open(tmp_path / "samplers.png").size[0] > 500
