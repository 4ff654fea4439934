"""scripts/inpaint.py on small models of the three kinds, from files to files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import cli
from ldm.inference import inpainting as library
from scripts import inpaint
from tests.inference.test_inpainting import filling_config, photo
from tests.models.test_depth import depth_config
from tests.models.test_finetuning import inpainting
from tests.tiny import tiny_config, write_model


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory):
    configs = {"loop": tiny_config(), "text": inpainting(), "textless": filling_config(), "depth": depth_config()}
    return {name: write_model(tmp_path_factory.mktemp(name), config) for name, config in configs.items()}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with `in`: a.png and b.jpg of odd sizes, and their masks."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for name, size in (("a.png", (75, 41)), ("b.jpg", (33, 64))):
        photo(*size).save(Path("in", name))
        mask = Image.new("L", size)
        mask.paste(255, (8, 8, 24, 24))
        mask.save(f"in/{name[0]}_mask.png")
    return tmp_path


def run(*argv, code: int = 0) -> None:
    assert cli.run(inpaint.main, ["--device", "cpu", "--steps", "2", *map(str, argv)]) == code


def one(*argv, code: int = 0) -> None:
    run("--init-img", "in/a.png", "--mask", "in/a_mask.png", "--outdir", "out", *argv, code=code)


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def outside(name: str) -> np.ndarray:
    return pixels(f"in/{name}_mask.png")[..., 0] < 128


def names(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def test_the_public_command(ckpts, folder, monkeypatch, capsys):
    """--indir, --outdir, --steps, and the model at its public place; output under the pictures' names and sizes."""
    place = folder / inpaint.PUBLIC_CKPT
    place.parent.mkdir(parents=True)
    for source in (ckpts["textless"], ckpts["textless"].with_name("config.yaml")):
        (place.parent / source.name.replace("model.ckpt", place.name)).write_bytes(source.read_bytes())
    run("--indir", "in", "--outdir", "out")
    assert "Found 2 inputs.\n" in capsys.readouterr().out
    assert names("out") == ["a.png", "b.png"]
    for name, picture in (("a", "in/a.png"), ("b", "in/b.jpg")):
        drawn, original = pixels(f"out/{name}.png"), pixels(picture)
        assert np.array_equal(drawn[outside(name)], original[outside(name)])  # their shapes, too
        assert np.abs(drawn - original)[~outside(name)].mean() > 10
    text = Image.open("out/a.png").text
    assert (
        "Steps: 2, Sampler: DDIM, CFG scale: 1, Eta: 0, Seed: 42, Size: 75x41, Model: inpainting_big"
        in (text["parameters"])
    )
    assert json.loads(text["ldm"])["keep_unmasked"] is True


def test_nothing_is_overwritten_and_a_picture_depends_on_no_other(ckpts, folder):
    for _ in range(2):
        run("--indir", "in", "--outdir", "out", "--ckpt", ckpts["textless"])
    assert names("out") == ["a-1.png", "a.png", "b-1.png", "b.png"]
    assert np.array_equal(pixels("out/a-1.png"), pixels("out/a.png"))
    Path("in/a.png").unlink()
    Path("in/a_mask.png").unlink()
    run("--indir", "in", "--outdir", "other", "--ckpt", ckpts["textless"], "--seed", 42)
    assert np.array_equal(pixels("other/b.png"), pixels("out/b.png"))
    run("--indir", "in", "--outdir", "seeds", "--ckpt", ckpts["textless"], "--seed", 7, "--dpm", "--no_metadata")
    assert not np.array_equal(pixels("seeds/b.png"), pixels("out/b.png")) and not Image.open("seeds/b.png").text


def test_folders_may_be_filled_as_a_text_says(ckpts, folder):
    run("--indir", "in", "--outdir", "out", "--ckpt", ckpts["text"], "--prompt", "a red circle", "--n_samples", 2)
    assert names("out") == ["a-1.png", "a.png", "b-1.png", "b.png"] and pixels("out/a.png").shape == (32, 64, 3)


@pytest.mark.parametrize("kind", ["loop", "text"])
def test_one_picture_and_a_text(ckpts, folder, kind, capsys):
    photo().save("in/a.png")
    Image.open("in/a_mask.png").resize((64, 32)).save("in/a_mask.png")
    one("--ckpt", ckpts[kind], "--prompt", "a red circle", "--n_samples", 2, "--n_iter", 2, "--negative_prompt", "blue")
    assert names("out") == ["grid-0000.png", "samples"] and len(names("out/samples")) == 4
    for name in names("out/samples"):
        drawn = pixels(f"out/samples/{name}")
        assert np.array_equal(drawn[outside("a")], pixels("in/a.png")[outside("a")])
        assert np.abs(drawn - pixels("in/a.png"))[~outside("a")].mean() > 10
    text = Image.open("out/samples/00003.png").text
    assert text["parameters"].startswith("a red circle\nNegative prompt: blue\nSteps: 2, Sampler: DDIM, CFG scale: 7.5")
    assert json.loads(text["ldm"]) | {"init_image": "a.png", "mask": "a_mask.png"} == json.loads(text["ldm"])
    assert capsys.readouterr().out.endswith("here: \nout \n \nEnjoy.\n")


def test_flags_arrive(ckpts, folder, monkeypatch):
    calls = []
    monkeypatch.setattr("ldm.inference.inpaint", lambda *args, **options: calls.append((args, options)) or [photo()])
    flags = ["--strength", 0.5, "--feather", 4, "--H", 40, "--W", 48, "--scale", 3, "--plms"]
    one("--ckpt", ckpts["loop"], *flags)
    ((_, image, mask, prompts), options) = calls[0]
    assert image.size == (75, 41) and mask.shape == (1, 1, 41, 75) and prompts == [""]
    assert options | {"strength": 0.5, "feather": 4, "keep_unmasked": True} == options
    expected = {"height": 40, "width": 48, "negative_prompt": "", "steps": 2, "sampler": "plms", "eta": 0.0}
    found = vars(options["options"])
    assert found | expected | {"scale": 3.0, "seed": 42} == found and options["noise"].seed == 42
    one("--ckpt", ckpts["loop"], "--no_keep_unmasked")
    assert calls[1][1]["keep_unmasked"] is False


def test_one_picture_without_text(ckpts, folder):
    one("--ckpt", ckpts["textless"], "--feather", 5)
    assert pixels("out/samples/00000.png").shape == (41, 75, 3)


MISTAKES = [
    ([], "name either a folder with --indir, or an image with --init-img"),
    (["--indir", "in", "--mask", "in/a_mask.png"], "name either a folder with --indir"),
    (["--init-img", "in/a.png"], "--init-img and --mask go together: name both"),
    (["--indir", "nowhere"], "there is no folder nowhere"),
    (["--indir", "."], "has no masks: the mask of X.png is X_mask.png"),
    (["--init-img", "in/c.png", "--mask", "in/a_mask.png"], "there is no image in/c.png"),
    (
        ["--init-img", "in/a.png", "--mask", "in/b_mask.png"],
        "mask in/b_mask.png is 33x64 pixels, but in/a.png is 75x41",
    ),
    (
        ["--indir", "in", "--feather", "2", "--no-keep_unmasked"],
        "--no-keep_unmasked gives up: leave one of the two out",
    ),
    (["--indir", "in", "--skip_save"], "--indir writes single images and no grid: leave --skip_save out"),
    (["--indir", "in"], "there is no models/ldm/inpainting_big/last.ckpt: put it there, or name another"),
]


@pytest.mark.parametrize("flags, message", MISTAKES)
def test_mistakes_are_said_before_a_model_loads(folder, capsys, flags, message):
    run(*flags, code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error and not Path("outputs").exists()


@pytest.mark.parametrize("name", ["c_mask.png", "c.png"])
def test_a_missing_half_of_a_pair_is_named(ckpts, folder, capsys, name):
    Image.new("L", (8, 8)).save(f"in/{name}")
    run("--indir", "in", "--outdir", "out", "--ckpt", ckpts["textless"], code=2 if "mask" in name else 0)
    assert f"no {'image' if 'mask' in name else 'mask'} for {name}" in capsys.readouterr().err


def test_models_of_another_kind(ckpts, folder, capsys):
    one("--ckpt", ckpts["depth"], code=2)
    error = capsys.readouterr().err
    assert "on text and a depth map, not on text, an image with a mask or text and an image with a mask" in error
    assert "use scripts/img2img.py for it" in error and not Path("out").exists()
    one("--ckpt", ckpts["textless"], "--prompt", "a red circle", code=2)
    assert "without a text or guidance: leave prompts and scale out" in capsys.readouterr().err
    one("--ckpt", ckpts["textless"], "--scale", 3, code=2)


def test_what_was_finished_before_ctrl_c_is_kept(ckpts, folder, monkeypatch, capsys):
    real = library.inpaint

    def interrupted(model, image, *args, **options):
        if image.size == (33, 64):
            raise KeyboardInterrupt
        return real(model, image, *args, **options)

    monkeypatch.setattr("ldm.inference.inpaint", interrupted)
    run("--indir", "in", "--outdir", "out", "--ckpt", ckpts["textless"], code=130)
    assert names("out") == ["a.png"] and "interrupted; 1 images written to out" in capsys.readouterr().err
