"""Ways of sampling compared: what they cost is counted, and what comes out is a table and a plot."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ldm.evaluation import comparison
from ldm.evaluation.comparison import WAYS, Way, counted
from ldm.inference import load_model, txt2img


@pytest.fixture(scope="module")
def bundled():
    return load_model(ckpt="models/ldm/shapes64/model.ckpt")


@pytest.mark.parametrize("way", [way for make in WAYS.values() for way in make()], ids=lambda way: way.name)
def test_every_way_costs_what_it_says(bundled, way):
    """Two-stage rules save one evaluation of both branches at the last step, where it leads to the data itself."""
    with counted(bundled) as counter:
        txt2img(bundled, ["a red circle"], steps=4, seed=0, progress=False, **way.options)
    most = 4 * way.cost
    assert most - way.cost / 2 <= counter.rows <= most or "interval" in way.name or "plms" in way.name
    if "plms" in way.name:  # its first step asks twice
        assert counter.rows == most + way.cost
    if "interval" in way.name:
        assert 4 < counter.rows < most


def test_counting_ends_with_the_block(bundled):
    with counted(bundled) as counter:
        pass
    bundled.apply_model(torch.zeros(1, 8, 8, 8), torch.tensor([5]), bundled.get_learned_conditioning(["a"]))
    assert counter.rows == 0


def test_rows_tables_and_plots(bundled, tmp_path):
    ways = [Way("good", 2, {"sampler": "dpmpp_2m"}), Way("costly", 30, {"sampler": "heun"})]
    rows = list(comparison.compare(bundled, ways, [16, 24], "single-full", 4, 2, seed=0))
    assert (
        [row["evaluations"] for row in rows] == [row["budget"] for row in rows] == [16, 24]
    )  # the other has no step within these budgets
    assert all(0 <= row["share"] <= 1 for row in rows)
    comparison.write(tmp_path, {"seed": 0}, rows)
    table = (tmp_path / "samplers.md").read_text()
    assert table.startswith("| | 16 | 24 |\n") and "| good | " in table
    assert Image.open(tmp_path / "samplers.png").size[0] > 500
