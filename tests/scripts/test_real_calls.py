"""Both scripts on a tiny model from its own file: what the stand-in of the other tests cannot notice."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from tests.tiny import write_tiny

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    write_tiny(folder)
    Image.new("RGB", (70, 96), (200, 30, 60)).save(folder / "photo.png")
    (folder / "prompts.txt").write_text("a red circle\na blue square\na circle\n")
    return folder


def run(name: str, folder: Path, out: Path, *flags: str) -> list[Path]:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    common = ["--ckpt", str(folder / "model.ckpt"), "--device", "cpu", "--steps", "3", "--outdir", str(out)]
    assert cli.run(script.main, [*common, *flags]) == 0
    return sorted((out / "samples").iterdir())


@pytest.mark.parametrize("flags", [[], ["--ddim_eta", "1"], ["--plms"], ["--dpm"], ["--dpm_solver", "--ddim_eta", "1"]])
def test_txt2img(folder, tmp_path, flags):
    batches = ["--from-file", str(folder / "prompts.txt"), "--n_samples", "2", "--n_iter", "2", "--fixed_code"]
    paths = run("txt2img", folder, tmp_path, "--H", "24", "--W", "40", *batches, *flags)
    assert len(paths) == 6 and {Image.open(path).size for path in paths} == {(40, 24)}
    assert "Model: scripts" in Image.open(paths[0]).text["parameters"].replace(folder.name, "scripts")


@pytest.mark.parametrize("strength", ["0", "0.5", "1"])
@pytest.mark.parametrize("flags", [[], ["--plms"], ["--dpm"]])
def test_img2img(folder, tmp_path, strength, flags):
    paths = run("img2img", folder, tmp_path, "--init-img", str(folder / "photo.png"), "--strength", strength, *flags)
    assert len(paths) == 2 and {Image.open(path).size for path in paths} == {(64, 96)}
    assert f"Denoising strength: {strength}" in Image.open(paths[0]).text["parameters"]


def test_negative_prompt_without_guidance_is_not_claimed(folder, tmp_path, caplog):
    (path,) = run(
        "txt2img", folder, tmp_path, "--n_samples", "1", "--n_iter", "1", "--scale", "1", "--negative_prompt", "blue"
    )
    assert "no effect at scale 1" in caplog.text and "Negative" not in Image.open(path).text["parameters"]


def test_first_stage_in_tiles(folder, tmp_path):
    """24x72 pixels whole, and in tiles of 24: pictures alike, but not the same; the metadata say so."""
    options = ["--H", "24", "--W", "72", "--n_samples", "1", "--n_iter", "1"]
    (whole,) = run("txt2img", folder, tmp_path / "whole", *options)
    (tiles,) = run("txt2img", folder, tmp_path / "tiles", *options, "--tile", "24")
    assert Image.open(tiles).size == (72, 24) and Image.open(tiles).tobytes() != Image.open(whole).tobytes()
    written = [json.loads(Image.open(path).text["ldm"]) for path in (whole, tiles)]
    assert [settings.get("tile") for settings in written] == [None, 24]
    photo = ["--init-img", str(folder / "photo.png"), "--n_samples", "1"]
    assert len(run("img2img", folder, tmp_path / "img2img", *photo, "--tile", "32")) == 1


def test_tiles_and_seamless_pictures_exclude_each_other(folder, tmp_path, capsys):
    with pytest.raises(AssertionError):
        run("txt2img", folder, tmp_path / "out", "--tile", "16", "--tiling")
    assert "--tile cuts images where --tiling joins them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
