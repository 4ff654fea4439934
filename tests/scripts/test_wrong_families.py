"""Every kind of model given to every script for another: one sentence that names both, and nothing written."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from tests.inference.test_inpainting import filling_config
from tests.inference.test_variations import unclip_config
from tests.models.test_depth import depth_config
from tests.models.test_finetuning import inpainting
from tests.scripts.test_reconstruct import autoencoder
from tests.tiny import RETRIEVAL, super_resolution_config, tiny_config, upscaler_config, write_model
from tests.unprompted import toy_config

# A config, what the model is conditioned on, the scripts that take it; the first is the one to name.
MODELS = {
    "text": (tiny_config(), "text", ["txt2img", "img2img", "inpaint"]),
    "depth": (depth_config(), "text and a depth map", ["img2img"]),
    "inpainting": (inpainting(), "text and an image with a mask", ["inpaint"]),
    "filling": (filling_config(), "an image with a mask", ["inpaint"]),
    "upscaler": (upscaler_config(), "a small image and text", ["upscale"]),
    "super-resolution": (super_resolution_config(), "a small image", ["upscale"]),
    "unclip": (unclip_config(), "an image to vary", ["variations"]),
    "retrieval": (tiny_config(**RETRIEVAL), "embeddings of text and neighbors", ["knn2img"]),
    "nothing": (toy_config("nothing"), "nothing but noise", ["sample_diffusion"]),
    "segmentation": (toy_config("segmentation"), "a segmentation map", ["sample_diffusion"]),
}
MASKED = ["--init-img", "photo.png", "--mask", "mask.png"]
SCRIPTS = {
    "txt2img": ([], "text"),
    "img2img": (["--init-img", "photo.png"], "text or text and a depth map"),
    "inpaint": (MASKED, "text, an image with a mask or text and an image with a mask"),
    "upscale": (["--init-img", "photo.png"], "a small image and text or a small image"),
    "variations": (["--init-img", "photo.png"], "an image to vary"),
    "knn2img": ([], "embeddings of text and neighbors"),
    "sample_diffusion": ([], "nothing but noise, class labels, a layout of boxes or a segmentation map"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for name, (config, *_) in MODELS.items():
        (folder / name).mkdir()
        write_model(folder / name, config)
    Image.new("RGB", (32, 32), "red").save(folder / "photo.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(folder / "mask.png")
    return folder


def run(script: str, ckpt: Path, *flags: str) -> int:
    output = "--logdir" if script == "sample_diffusion" else "--outdir"
    argv = ["--ckpt", str(ckpt), "--device", "cpu", output, "new/out", *flags]
    return cli.run(importlib.import_module(f"scripts.{script}").main, argv)


@pytest.mark.parametrize("script", SCRIPTS)
def test_both_are_named_and_the_way_out(folder, monkeypatch, capsys, script):
    monkeypatch.chdir(folder)
    flags, wanted = SCRIPTS[script]
    for name, (_, draws_from, takers) in MODELS.items():
        if script in takers:
            continue
        ckpt = folder / name / "model.ckpt"
        assert run(script, ckpt, *flags) == 2
        said = capsys.readouterr().err
        sentence = f"which is conditioned on {draws_from}, not on {wanted}: use scripts/{takers[0]}.py for it"
        assert said.startswith(f"error: {ckpt} is ") and said.endswith(f"{sentence}\n") and said.count("\n") == 1
        assert not Path("new").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_autoencoder_alone(tmp_path, folder, monkeypatch, capsys, script):
    monkeypatch.chdir(folder)
    ckpt = write_model(tmp_path, autoencoder())
    assert run(script, ckpt, *SCRIPTS[script][0]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        f"error: {ckpt} is an autoencoder alone, not a complete model: use scripts/reconstruct.py\n", said
    )
