"""scripts/knn2img.py on a small model and a small CLIP: from a prompt or a picture, with neighbours or without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import cli
from scripts import knn2img
from tests.tiny import RETRIEVAL, write_clip, write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("knn2img")
    write_tiny(folder, **RETRIEVAL)
    write_clip(folder / "clip", width=24)
    Image.new("RGB", (70, 96), (200, 30, 60)).save(folder / "photo.png")
    (folder / "prompts.txt").write_text("a red circle\na blue square\na circle\n")
    data = np.random.default_rng(0).standard_normal((50, 24)).astype(np.float16)
    np.savez(folder / "mine.npz", embeddings=data, paths=np.array([f"{i}.png" for i in range(50)]))
    np.savez(folder / "wide.npz", embeddings=np.ones((50, 768), np.float16))
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Runs the script in an empty folder, with the small model and CLIP but for what is given: gives its exit code."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: object, ckpt: Path | None = folder / "model.ckpt", clip: Path | None = folder / "clip") -> int:
        given = (["--ckpt", ckpt] if ckpt else []) + (["--clip", clip] if clip else [])
        common = ["--device", "cpu", "--steps", "2", "--outdir", "out"]
        return cli.run(knn2img.main, [str(arg) for arg in (*common, *given, *argv)])

    return call


def pictures(folder: str = "out") -> list[Image.Image]:
    return [Image.open(path) for path in sorted(Path(folder, "samples").iterdir())]


def settings(image: Image.Image) -> dict:
    return json.loads(image.text["ldm"])


def test_the_public_defaults():
    args = cli.parse(knn2img.parser(), [])
    public = {"prompt": "a painting of a virus monster playing guitar", "outdir": "outputs/txt2img-samples"}
    public |= {
        "skip_grid": False,
        "n_repeat": 1,
        "plms": False,
        "ddim_eta": 0.0,
        "n_iter": 1,
        "n_samples": 3,
        "n_rows": 0,
    }
    public |= {"public_scale": 5.0, "public_steps": 50, "from_file": None, "use_neighbors": False, "knn": 10}
    public |= {"clip": "ViT-L/14", "database": "artbench-surrealism"}
    assert {name: vars(args)[name] for name in public} == public
    flags = "--ddim_steps 7 --clip_type ViT-L/14 --H 768 --W 768 --config c.yaml --ckpt m.ckpt --use_neighbors --knn 3"
    args = cli.parse(knn2img.parser(), flags.split())
    assert (args.ddim_steps, args.H, args.config, args.knn, args.clip) == (7, 768, "c.yaml", 3, "ViT-L/14")


def test_from_a_prompt(run, capsys):
    assert run("--prompt", "a red circle", "--n_iter", 2, "--H", 24, "--W", 40) == 0
    images = pictures()
    assert len(images) == 6 and {image.size for image in images} == {(40, 24)}
    assert settings(images[0])["prompt"] == "a red circle" and settings(images[0])["scale"] == 5.0
    assert "database" not in settings(images[0]) and Path("out/grid-0000.png").exists()
    assert "waiting for you here" in capsys.readouterr().out


def test_neighbours_change_the_pictures_and_are_named(run, folder, capsys):
    assert run("--n_samples", 1) == 0
    flags = ["--use_neighbors", "--database", folder / "mine.npz", "--knn", 4]
    assert run("--n_samples", 1, *flags) == 0
    alone, beside = pictures()
    assert alone.tobytes() != beside.tobytes()
    assert settings(beside)["database"] == "mine.npz" and settings(beside)["knn"] == 4
    assert ".png, ..." in capsys.readouterr().out
    assert run("--n_samples", 1, *flags, "--n_repeat", 3) == 0
    assert run("--n_samples", 1, *flags) == 0
    _, _, repeated, again = pictures()
    assert again.tobytes() == beside.tobytes() != repeated.tobytes()


def test_each_line_of_a_file_has_its_own_context(run, folder):
    assert run("--from-file", folder / "prompts.txt", "--n_samples", 2, "--plms") == 0
    images = pictures()
    assert [settings(image)["prompt"] for image in images] == ["a red circle", "a blue square", "a circle"]
    assert run("--prompt", "a red circle", "--n_samples", 2, "--plms") == 0
    assert pictures()[3].tobytes() == images[0].tobytes()
    assert pictures()[4].tobytes() != images[1].tobytes()


def test_from_a_picture(run, folder):
    assert run("--image", folder / "photo.png", "--n_samples", 2) == 0
    assert run("--n_samples", 2, "--seed", 42) == 0
    seen, _, read, _ = pictures()
    assert settings(seen)["image"] == "photo.png" and settings(seen)["prompt"] == ""
    assert seen.tobytes() != read.tobytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--use_neighbors"], "there is no database artbench-surrealism, nor data/rdm/retrieval_databases/artbench-"),
        (["--use_neighbors", "--database", "{}/mine.npz", "--knn", "51"], "ask for 1 to 50 neighbours, not 51"),
        (["--use_neighbors", "--database", "{}/wide.npz"], "both must come from the same CLIP"),
        (["--use_neighbors", "--database", "{}/prompts.txt"], "prompts.txt is no file of embeddings"),
        (["--image", "no.png"], "there is no image no.png"),
        (["--image", "{}/photo.png", "--prompt", "a cat"], "leave out --image, or --prompt and --from-file"),
        (["--H", "25"], "height 25 is not a multiple of 2"),
        (["--knn", "0"], "must be an integer of at least 1, not '0'"),
    ],
)
def test_mistakes_are_said_in_one_line(run, folder, capsys, argv, message):
    try:
        code = run(*(text.format(folder) for text in argv))
    except SystemExit as exit:  # argparse's own
        code = exit.code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and message in error
    assert not Path("out/samples").exists()


def test_missing_files_are_asked_for(run, folder, tmp_path, monkeypatch, capsys):
    assert run(ckpt=None) == 2
    assert "there is no checkpoint at models/rdm/rdm768x768/model.ckpt" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert run(clip=None) == 2
    assert "config.json and model.safetensors of openai/clip-vit-large-patch14" in capsys.readouterr().err
    assert run(clip=folder / "no") == 2
    assert "with --clip FOLDER" in capsys.readouterr().err


def test_another_clip_is_refused(run, tmp_path, capsys):
    assert run(clip=write_clip(tmp_path / "clip", width=16)) == 2
    assert "this model takes embeddings (B, n, 24), not (3, 1, 16)" in capsys.readouterr().err


def test_another_familys_model_is_refused_before_clip_is_looked_for(run, tmp_path, capsys):
    assert run(ckpt=write_tiny(tmp_path), clip=None) == 2
    wanted = "is conditioned on text, not on embeddings of text and neighbors: use scripts/txt2img.py"
    assert wanted in capsys.readouterr().err


def test_a_database_without_neighbours_has_no_effect(run, folder, capsys):
    assert run("--database", folder / "mine.npz", "--n_samples", 1) == 0
    assert "has no effect without --use_neighbors" in capsys.readouterr().err
