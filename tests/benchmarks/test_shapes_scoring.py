"""Prompt sets, accuracy and reports of the shapes evaluation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.report import new_folder
from benchmarks.shapes.report import markdown, sheet, write
from benchmarks.shapes.scoring import PROMPT_SETS, binomial_interval, evaluate_all, plain, prompts_of, summary
from ldm.data.shapes import HELD_OUT, ShapesDataset, describe, parse, render


@pytest.mark.parametrize("prompt_set", PROMPT_SETS)
def test_prompts_fit_their_set(prompt_set: str) -> None:
    prompts = prompts_of(prompt_set, 40)
    assert prompts == prompts_of(prompt_set, 40) and prompts[:20] == prompts_of(prompt_set, 20)
    assert prompts != prompts_of(prompt_set, 40, seed=1)
    for prompt in prompts:
        wanted, relation, background = parse(prompt)
        assert len(wanted) == PROMPT_SETS[prompt_set].objects and (relation is not None) == (len(wanted) == 2)
        assert (background is not None) == PROMPT_SETS[prompt_set].complete
        assert all((item.size is not None) == PROMPT_SETS[prompt_set].complete for item in wanted)
        assert all(((item.shape, item.colour) in HELD_OUT) == PROMPT_SETS[prompt_set].held_out for item in wanted)


def test_plain_prompts() -> None:
    assert re.fullmatch(r"a \w+ \w+", prompts_of("single", 1)[0])
    assert re.fullmatch(r"a \w+ \w+ (above|below|to the (left|right) of) a \w+ \w+", prompts_of("relation-plain", 1)[0])


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (970, 1000, 0.9575, 0.9789)],
)
def test_intervals_are_wilsons(right: int, count: int, low: float, high: float) -> None:
    """81 of 263 is the example of Newcombe (1998), table I; the others are worked by hand."""
    assert binomial_interval(right, count) == pytest.approx((low, high), abs=6e-5)


def test_summary_counts_matches() -> None:
    data = ShapesDataset(12, seed=4, object_weights=(0, 1))
    scenes = [data.scene(i) for i in range(12)]
    prompts = [describe(scene) for scene in scenes]
    images = [Image.fromarray(render(scene)) for scene in scenes]
    found = summary(prompts, evaluate_all(images, prompts))
    assert found["right"] == found["prompts"] == 12 and found["wrong"] == []
    assert found["parts"] == {"objects": 1.0, "sizes": 1.0, "background": 1.0, "relation": 1.0}

    images[3] = images[3].transpose(Image.Transpose.ROTATE_180)  # the relation is turned round
    images[7] = Image.new("RGB", (64, 64), images[7].getpixel((0, 0)))  # no objects, but the right ground
    found = summary(prompts, evaluate_all(images, prompts))
    assert found["right"] == 10 and [entry["index"] for entry in found["wrong"]] == [3, 7]
    assert "relation" in found["wrong"][0]["parts"] and found["parts"]["background"] == 1.0
    assert found["wrong"][1] == {"index": 7, "prompt": prompts[7], "parts": ["objects", "sizes", "relation"]}

    plainly = [plain(scene) for scene in scenes]
    parts = summary(plainly, evaluate_all(images, plainly))["parts"]
    assert parts["sizes"] is parts["background"] is None and parts["relation"] < 1


def test_wrong_images_are_framed_in_red() -> None:
    images = [Image.new("RGB", (64, 64), "blue")] * 5
    grid = sheet(images, wrong=[1, 4], across=3)
    assert grid.size == (3 * 70, 2 * 70)
    corners = [grid.getpixel((70 * (i % 3), 70 * (i // 3))) for i in range(5)]
    assert [red > 200 for red, _, _ in corners] == [False, True, False, False, True]
    assert grid.getpixel((3, 3)) == (0, 0, 255)


def test_reports_never_overwrite_each_other(tmp_path: Path) -> None:
    folders = [new_folder(tmp_path / "deep/run") for _ in range(3)]
    assert [folder.name for folder in folders] == ["run", "run-2", "run-3"]
    prompts = ["a red circle", "a blue circle"]
    images = [Image.new("RGB", (64, 64), "white")] * 2
    scores = summary(prompts, evaluate_all(images, prompts))
    settings = {"model": "m", "prompts": 2, "steps": 3, "sampler": "ddim", "scale": 4.0, "batch": 2, "seed": 0}
    results = {
        "settings": settings | {"device": "cpu"},
        "first stage": scores | {"psnr": 31.234},
        "prompt sets": {"single": scores},
    }
    write(folders[1], results)
    assert json.loads((folders[1] / "results.json").read_text())["prompt sets"]["single"]["right"] == 0
    table = (folders[1] / "results.md").read_text()
    assert table == markdown(results)
    assert '| one object, "a red circle" (`single`) | 0.0 % (0.0 to 65.8) | 0.0 % |  |  |  |' in table
    assert "31.23 dB PSNR over 2 unseen scenes" in table
