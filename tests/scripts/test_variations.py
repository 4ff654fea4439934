"""scripts/variations.py on a small unCLIP model from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from scripts import variations
from tests.inference.test_variations import picture, unclip_config
from tests.tiny import write_model, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("variations")
    write_model(folder, unclip_config())
    for name in "ab":
        picture(ord(name), (50, 40)).save(folder / f"{name}.png")
    (folder / "prompts.txt").write_text("a red circle\n\na circle\n")
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Runs the script in an empty folder on the pictures `a` and `b`: gives its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object, init: str = "a", ckpt: Path = folder / "model.ckpt") -> int:
        images = [folder / f"{name}.png" for name in init]
        common = ["--ckpt", ckpt, "--device", "cpu", "--steps", "2", "--outdir", "out", "--init-img", *images]
        return cli.run(variations.main, [str(arg) for arg in (*common, *argv)])

    return call


def pictures() -> list[Image.Image]:
    return [Image.open(path) for path in sorted(Path("out/samples").iterdir())]


def settings(image: Image.Image) -> dict:
    return json.loads(image.text["ldm"])


def test_a_picture_varied(run, capsys):
    assert run("--n_samples", 2, "--n_iter", 2, "--H", 24, "--W", 40, "--noise_level", 100) == 0
    images = pictures()
    assert len(images) == 4 and {image.size for image in images} == {(40, 24)}
    assert len({image.tobytes() for image in images}) == 4
    known = {"prompt": "", "init_image": "a.png", "noise_level": 100, "scale": 10.0, "seed": 42}
    assert settings(images[0]).items() >= known.items()
    assert Path("out/grid-0000.png").exists() and "waiting for you here" in capsys.readouterr().out


def test_several_mixed(run):
    for init, flags in (("a", []), ("ab", []), ("ab", ["--weights", 1, 0]), ("ab", ["--weights", 0.5, 0.5])):
        assert run(*flags, "--n_samples", 1, "--skip_grid", init=init) == 0
    one, mixed, first, halves = (image.tobytes() for image in pictures())
    assert one == first != mixed == halves
    assert settings(pictures()[2])["init_image"] == "a.png, b.png" and settings(pictures()[2])["weights"] == [1.0, 0.0]


def test_prompts_of_a_file(run, folder):
    assert run("--from-file", folder / "prompts.txt", "--n_samples", 2, "--negative_prompt", "blue") == 0
    assert [settings(image)["prompt"] for image in pictures()] == ["a red circle", "", "a circle"]
    assert settings(pictures()[0])["negative_prompt"] == "blue"


@pytest.mark.parametrize(
    ("argv", "init", "message"),
    [
        ([], "c", "there is no image"),
        (["--weights", "1"], "ab", "2 images need 2 weights of at least 0, not all 0; they are 1"),
        (["--noise_level", "1000"], "a", "must be an integer from 0 to 999, not '1000'"),
        (["--W", "25"], "a", "width 25 is not a multiple of 2"),
    ],
)
def test_mistakes_are_said_in_one_line(run, capsys, argv, init, message):
    try:
        code = run(*argv, init=init)
    except SystemExit as exit:  # argparse's own
        code = exit.code
    assert code == 2 and not Path("out").exists()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_another_familys_model_is_refused(run, tmp_path, capsys):
    assert run(ckpt=write_tiny(tmp_path)) == 2
    assert "is conditioned on text, not on an image to vary: use scripts/txt2img.py" in capsys.readouterr().err
