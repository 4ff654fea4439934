"""scripts/embed_images.py: a folder of pictures to a database that scripts/knn2img.py draws with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm import cli
from ldm.inference import load_database
from scripts import embed_images
from tests.tiny import write_clip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script on the folder `pictures`, with a small CLIP: gives its exit code."""
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip", width=24)
    Path("pictures/sub").mkdir(parents=True)
    for name, colour in {"a.png": "red", "sub/b.jpg": "blue", "c.webp": "green"}.items():
        Image.new("RGB", (50, 40), colour).save(Path("pictures") / name)

    def call(*argv: str) -> int:
        return cli.run(embed_images.main, ["--clip", "clip", "--device", "cpu", *argv])

    return call


def test_a_folder_becomes_a_database(run, capsys):
    Path("pictures/broken.png").write_bytes(b"no picture")
    assert run("pictures", "mine.npz", "--batch_size", "2") == 0
    said = capsys.readouterr()
    assert "mine.npz: 3 images." in said.out and "broken.png" in said.err
    with np.load("mine.npz") as file:
        assert file["embeddings"].dtype == np.float16 and file["paths"].tolist() == ["a.png", "c.webp", "sub/b.jpg"]
    database = load_database("mine.npz")
    cosines, indices = database.nearest(database.embeddings([0, 1, 2]), 1)
    assert indices.flatten().tolist() == [0, 1, 2]
    np.testing.assert_allclose(cosines, 1, atol=1e-3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pictures", "mine.npy"], "name it mine.npz"),
        (["pictures", "no/mine.npz"], "cannot write mine.npz: there is no folder no"),
        (["nowhere", "mine.npz"], "there is no folder nowhere"),
        (["clip", "mine.npz"], "no images in clip"),
        (["pictures", "mine.npz", "--clip", "no"], "CLIP's weights are not at no"),
    ],
)
def test_mistakes_are_said_in_one_line(run, capsys, argv, message):
    assert run(*argv) == 2
    assert message in capsys.readouterr().err
    assert not Path("mine.npz").exists()


def test_a_file_is_never_replaced(run, capsys):
    Path("mine.npz").write_bytes(b"dear")
    assert run("pictures", "mine.npz") == 2
    assert "mine.npz exists already" in capsys.readouterr().err
    assert Path("mine.npz").read_bytes() == b"dear"
