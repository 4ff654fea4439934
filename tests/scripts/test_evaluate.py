"""scripts/evaluate.py on the bundled model: a handful of prompts, and the distance of what it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.shapes.comparison import SETTINGS
from benchmarks.shapes.scoring import PROMPT_SETS
from ldm import cli
from scripts import evaluate
from tests.tiny import write_tiny


def run(*argv: object) -> int:
    return cli.run(evaluate.main, [str(word) for word in argv])


def test_choices_match_the_evaluation() -> None:
    assert tuple(PROMPT_SETS) == evaluate.PROMPT_SETS and tuple(SETTINGS) == evaluate.SETTINGS


def test_options_before_and_behind_the_command() -> None:
    args = evaluate.parser().parse_args(["--ckpt", "a", "--batch", "7", "distance", "x", "y", "--batch", "8"])
    assert (args.ckpt, args.batch, args.device) == ("a", 8, "auto")


def test_the_same_command_gives_the_same_table_in_a_folder_of_its_own(tmp_path: Path, capsys) -> None:
    command = ("--prompts", 3, "--kinds", "held-out-relation,single", "--steps", 2, "--batch", 2, "--device", "cpu")
    for _ in range(2):
        assert run(*command, "--out", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "First stage: " in output and f"Table, numbers and images: {tmp_path / 'out-2'}" in output
    files = ["held-out-relation.png", "reconstructions.png", "results.json", "results.md", "single.png"]
    for folder in (tmp_path / "out", tmp_path / "out-2"):
        assert sorted(path.name for path in folder.iterdir()) == files
    assert (tmp_path / "out/results.json").read_text() == (tmp_path / "out-2/results.json").read_text()
    assert (tmp_path / "out/single.png").read_bytes() == (tmp_path / "out-2/single.png").read_bytes()

    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["prompt sets"]) == ["held-out-relation", "single"]
    assert results["settings"]["steps"] == 2 and results["settings"]["sampler"] == "dpmpp_2m_sde"
    assert results["first stage"]["psnr"] > 25 and results["first stage"]["prompts"] == 3


def test_acceleration_options_are_used_and_reported(tmp_path: Path, capsys) -> None:
    command = ("--prompts", 2, "--kinds", "single", "--steps", 2, "--device", "cpu")
    assert run(*command, "--out", tmp_path / "plain") == 0
    assert "--cache_features" not in capsys.readouterr().out
    assert run(*command, "--cache_features", 2, "--merge_tokens", 0.5, "--out", tmp_path / "quick") == 0
    assert ", --cache_features 2, --merge_tokens 0.5, 2 prompts" in capsys.readouterr().out
    assert (tmp_path / "plain/single.png").read_bytes() != (tmp_path / "quick/single.png").read_bytes()


def test_distance_of_folders(tmp_path: Path, capsys) -> None:
    for name, colours in {"a": ("red", "blue", "tan"), "b": ("green", "blue")}.items():
        (tmp_path / name).mkdir()
        for colour in colours:
            Image.new("RGB", (32, 32), colour).save(tmp_path / name / f"{colour}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "same")
    model = ("--ckpt", write_tiny(tmp_path), "--device", "cpu")
    assert run("distance", tmp_path / "a", tmp_path / "same", *model) == 0
    lines = capsys.readouterr().out.splitlines()
    assert abs(float(lines[-4].removeprefix("Frechet distance "))) < 1e-5
    assert lines[-2].startswith("of 3 and 3 images, by 64 features of the first stage of ")
    assert lines[-1].startswith("Not the published FID or KID")
    assert run("distance", tmp_path / "a", tmp_path / "b", *model) == 0
    assert float(capsys.readouterr().out.splitlines()[-4].removeprefix("Frechet distance ")) > 0.01


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--kinds", "single,triple"], "argument --kinds: 'triple' is not one of single, single-full"),
        (["--prompts", "0"], "must be an integer of at least 1, not '0'"),
        (["distance", "one"], "the following arguments are required: FOLDER"),
        (["distance", "nowhere", "."], "there is no folder nowhere"),
        (["--ckpt", "tiny"], "the evaluator needs scenes of 64x64 pixels, but this model generates 32x32"),
    ],
)
def test_mistakes_are_one_line(argv, message, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [str(write_tiny(tmp_path)) if word == "tiny" else word for word in argv]
    try:
        code = run(*argv)
    except SystemExit as end:  # argparse's way
        code = end.code
    *_, error = capsys.readouterr().err.splitlines()
    assert code == 2 and error.startswith("error: ") and message in error
    assert not Path("outputs").exists()
