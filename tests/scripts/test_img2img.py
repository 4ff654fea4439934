"""scripts/img2img.py: flags to calls, images to files. Sampling itself is a stand-in (see conftest.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def photo(inference) -> Image.Image:
    image = Image.effect_noise((40, 24), 60).convert("RGB")
    image.save("photo.png")
    return image


def test_defaults_are_those_of_the_public_script(script, inference, photo, capsys):
    assert script("--init-img", "photo.png") == 0
    assert [name for name, _ in inference.calls] == ["load_model", "encode_image", "img2img"]
    (encoded,) = inference.named("encode_image")
    assert encoded.pop("image").tobytes() == photo.tobytes()
    assert encoded == {"batch": 2, "height": None, "width": None}  # as large as the picture
    (call,) = inference.named("img2img")
    assert call.pop("init").shape == (2, 4, 3, 5)
    assert call == {
        "prompts": ["a painting of a virus monster playing guitar"] * 2,
        "negative_prompt": "",
        "strength": 0.75,
        "depth": None,
        "steps": 50,
        "sampler": "ddim",
        "eta": 0.0,
        "scale": 5.0,
    }
    outdir = Path("outputs/img2img-samples")
    assert sorted(path.name for path in outdir.rglob("*.png")) == ["00000.png", "00001.png", "grid-0000.png"]
    assert capsys.readouterr().out.endswith("here: \noutputs/img2img-samples \n \nEnjoy.\n")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--plms"], {"sampler": "plms"}),
        (["--dpm_solver"], {"sampler": "dpm_solver"}),
        (["--strength", "0"], {"strength": 0.0}),
        (["--strength", "1"], {"strength": 1.0}),
        (
            ["--negative-prompt", "dog", "--steps", "3", "--scale", "1"],
            {"negative_prompt": "dog", "steps": 3, "scale": 1},
        ),
        (["--fixed_code", "--C", "4", "--f", "8"], {}),
    ],
)
def test_flags_arrive(script, inference, flags, expected):
    assert script("--init_img", "photo.png", *flags) == 0
    (call,) = inference.named("img2img")
    assert call | expected == call


def test_size_flags(script, inference):
    assert script("--init-img", "photo.png", "--H", 64, "--W", 128) == 0
    (encoded,) = inference.named("encode_image")
    assert (encoded["height"], encoded["width"]) == (64, 128)
    assert Image.open("outputs/img2img-samples/samples/00000.png").size == (128, 64)


def test_ragged_file_starts_from_one_encoding(script, inference):
    Path("p.txt").write_text("a\nb\nc\n")
    assert script("--init-img", "photo.png", "--from-file", "p.txt", "--n_iter", 2) == 0
    calls = inference.named("img2img")
    assert [call["prompts"] for call in calls] == [["a", "b"], ["c"]] * 2
    assert [call["init"][:, 0, 0, 0].tolist() for call in calls] == [[0, 1], [0]] * 2
    assert len(inference.named("encode_image")) == 1


def test_metadata(script):
    assert script("--init-img", "photo.png", "--strength", "0.5", "--prompt", "cat") == 0
    text = Image.open("outputs/img2img-samples/samples/00000.png").text
    assert "Size: 40x24, Model: shapes64, Denoising strength: 0.5," in text["parameters"]
    assert json.loads(text["ldm"])["init_image"] == "photo.png"


def test_missing_picture_fails_before_the_model_loads(script, inference, capsys):
    assert script("--init-img", "nothing.png") == 2
    assert capsys.readouterr().err == "error: there is no image nothing.png\n"
    assert inference.calls == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --init-img"),
        (["--init-img", "photo.png", "--strength", "1.1"], "must be a finite number from 0 to 1, not '1.1'"),
        (["--init-img", "photo.png", "--strength", "nan"], "must be a finite number from 0 to 1, not 'nan'"),
    ],
)
def test_refused_options(script, capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        script(*flags)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_depth_map_of_another_shape_fails_before_the_model_loads(script, inference, capsys):
    Image.new("L", (10, 90)).save("depth.png")
    assert script("--init-img", "photo.png", "--depth", "depth.png") == 2
    assert "the depth map depth.png is 10x90 pixels, but photo.png is" in capsys.readouterr().err
    assert not inference.calls


def test_a_depth_map_for_a_model_of_text_is_refused(script, inference, photo, capsys):
    Image.new("L", Image.open("photo.png").size).save("depth.png")
    assert script("--init-img", "photo.png", "--depth", "depth.png", "--ckpt", "sd.ckpt") == 2
    assert capsys.readouterr().err == "error: sd.ckpt is conditioned on text alone: leave --depth out\n"
    assert not inference.named("encode_image") and not Path("outputs").exists()
