"""The scripts as a new user runs them: as processes, from another folder, with the bundled model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.shapes.evaluator import detect_scene, evaluate
from ldm.data.shapes import HELD_OUT, Item, Scene, render
from ldm.inference import load_model, txt2img

ROOT = Path(__file__).resolve().parent.parent.parent


def run(script: str, *flags: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / script), *flags, "--device", "cpu"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def samples(folder: Path) -> list[Path]:
    return sorted((folder / "samples").iterdir())


@pytest.mark.subprocess
def test_a_file_of_seven_prompts_in_batches_of_three(tmp_path):
    prompts = [f"a large {colour} circle" for colour in ("red", "green", "blue", "yellow", "cyan", "white", "black")]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    flags = ["--from-file", "prompts.txt", "--n_samples", "3", "--n_iter", "1"]
    done = run("txt2img.py", *flags, "--outdir", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bundled model" in done.stdout and "Enjoy." in done.stdout
    paths = samples(tmp_path / "out")
    assert [path.name for path in paths] == [f"{i:05}.png" for i in range(7)]
    assert Image.open(tmp_path / "out/grid-0000.png").size == (3 * 66 + 2, 3 * 66 + 2)
    right = [evaluate(np.asarray(Image.open(path)), prompt).objects for path, prompt in zip(paths, prompts)]
    assert sum(right) >= 5
    assert prompts[0] in Image.open(paths[0]).text["parameters"]


@pytest.mark.subprocess
def test_image_to_image_at_three_strengths(tmp_path):
    scene = Scene("white", (Item("square", "red", "large", 32.0, 32.0, 14.0),))
    Image.fromarray(render(scene)).resize((256, 256)).save(tmp_path / "init.png")
    change = []
    for strength in ("0", "0.5", "1"):
        flags = ["--init-img", "init.png", "--strength", strength, "--plms", "--steps", "20", "--n_samples", "1"]
        done = run("img2img.py", *flags, "--prompt", "a large blue square", "--outdir", strength, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        picture = np.asarray(Image.open(samples(tmp_path / strength)[0]))
        assert picture.shape == (64, 64, 3)  # the model's own scale
        if strength == "0":
            (item,) = detect_scene(picture).items
            assert (item.shape, item.colour) == ("square", "red")
        change.append(np.abs(picture.astype(float) - render(scene)).mean())
    assert change[0] < change[1] < change[2]


@pytest.fixture(scope="module")
def model():
    return load_model(ckpt=ROOT / "models/ldm/shapes64/model.ckpt", device="cpu")


@pytest.mark.parametrize("sampler, steps", [("ddim", 50), ("plms", 30), ("dpm_solver", 20)])
def test_pictures_show_what_the_prompts_say(model, sampler, steps):
    """The model's score is higher (see the README); this catches a broken model or sampler, not a mediocre day."""
    pairs = [("circle", "red"), ("square", "blue"), ("triangle", "green"), ("star", "yellow"), ("heart", "magenta")]
    pairs += [("cross", "white"), ("ring", "cyan"), ("diamond", "black"), ("circle", "yellow"), ("square", "white")]
    prompts = [f"a {colour} {shape}" for shape, colour in pairs if (shape, colour) not in HELD_OUT]
    images = txt2img(model, prompts, sampler=sampler, steps=steps, seed=0, progress=False)
    right = [evaluate(np.asarray(image), prompt).objects for image, prompt in zip(images, prompts)]
    assert np.mean(right) >= 0.7


def test_odd_sizes_and_an_empty_prompt(model):
    images = txt2img(model, [""], height=72, width=40, steps=4, seed=0, progress=False)
    assert images[0].size == (40, 72)
