"""scripts/upscale.py on small models from their own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from scripts.upscale import main
from tests.tiny import super_resolution_config, upscaler_config, write_model, write_tiny

CONFIGS = {"upscaler": upscaler_config, "super-resolution": super_resolution_config}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    written = {name: write_model(tmp_path_factory.mktemp(name), config()) for name, config in CONFIGS.items()}
    return written | {"text": write_tiny(tmp_path_factory.mktemp("text"))}


@pytest.fixture(autouse=True)
def photo(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((21, 13), 60).convert("RGB").save("photo.png")


def run(*argv: object) -> int:
    return cli.run(main, ["--init-img", "photo.png", "--device", "cpu", "--steps", "2", *map(str, argv)])


def settings_of(path: Path) -> dict:
    return json.loads(Image.open(path).text["ldm"])


def test_upscaler(files, capsys):
    options = ("--prompt", "a red circle", "--negative_prompt", "blue", "--noise_level", 30, "--scale", 3, "--tile", 16)
    assert run("--ckpt", files["upscaler"], *options, "--n_samples", 2, "--seed", 5) == 0
    outdir = Path("outputs/upscale-samples")
    paths = sorted((outdir / "samples").iterdir())
    assert [path.name for path in paths] == ["00000.png", "00001.png"] and (outdir / "grid-0000.png").exists()
    assert {Image.open(path).size for path in paths} == {(84, 52)}
    assert paths[0].read_bytes() != paths[1].read_bytes()
    expected = {"prompt": "a red circle", "negative_prompt": "blue", "noise_level": 30, "scale": 3.0, "tile": 16}
    expected |= {"init_image": "photo.png", "seed": 5, "size": "84x52", "steps": 2, "sampler": "ddim"}
    assert settings_of(paths[0]) | expected == settings_of(paths[0])
    assert capsys.readouterr().out.endswith(f"here: \n{outdir} \n \nEnjoy.\n")


def test_defaults_are_public(files):
    assert run("--ckpt", files["upscaler"], "--outdir", "out") == 0
    (path,) = Path("out/samples").iterdir()
    expected = {"prompt": "", "noise_level": 20, "scale": 9.0, "eta": 0.0, "seed": 42}
    assert settings_of(path) | expected == settings_of(path)
    assert not Path("out/grid-0000.png").exists()  # of one picture


@pytest.mark.parametrize("flags", [[], ["--plms"], ["--dpm"], ["--ddim_eta", "1"]])
def test_super_resolution(files, flags):
    for out in ("one", "two"):
        assert run("--ckpt", files["super-resolution"], "--outdir", out, *flags) == 0
    (path,) = Path("one/samples").iterdir()
    assert Image.open(path).size == (84, 52)
    assert Image.open(path).tobytes() == Image.open("two/samples/00000.png").tobytes()
    assert settings_of(path)["scale"] is None and "CFG" not in Image.open(path).text["parameters"]


@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision(files, name):
    assert run("--ckpt", files[name], "--bf16", "--tile", "16", "--outdir", "out") == 0
    assert Image.open("out/samples/00000.png").size == (84, 52)


REFUSED = [
    ("super-resolution", ["--prompt", "a circle"], "small image alone: leave out prompt"),
    ("super-resolution", ["--negative_prompt", "red"], "leave out negative_prompt"),
    ("super-resolution", ["--scale", "2", "--noise_level", "3"], "leave out noise_level, scale"),
    ("upscaler", ["--noise_level", "91"], "noise levels are 0 to 90, not 91"),
    ("upscaler", ["--tile", "12"], "tiles of 12 are too small: they need at least 16 a side"),
    ("text", [], "is conditioned on text, not on a small image and text or a small image: use scripts/txt2img.py"),
]


@pytest.mark.parametrize("name, flags, message", REFUSED)
def test_mistakes_are_named(files, capsys, name, flags, message):
    assert run("--ckpt", files[name], *flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_what_is_missing_is_said_before_loading(capsys, monkeypatch):
    assert run("--init-img", "none.png", "--ckpt", "none.ckpt") == 2
    assert "there is no image none.png" in capsys.readouterr().err
    monkeypatch.setattr("scripts.upscale.PUBLIC_CKPT", "nowhere/model.ckpt")
    assert run() == 2
    assert capsys.readouterr().err == "error: there is no nowhere/model.ckpt: name an upscaler with --ckpt\n"
