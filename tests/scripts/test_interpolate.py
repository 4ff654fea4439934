"""scripts/interpolate.py, from options to files, with a tiny model."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from ldm import cli
from scripts import interpolate, txt2img
from tests.tiny import write_tiny


@pytest.fixture
def script(tmp_path, monkeypatch):
    ckpt = write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    common = ["--ckpt", ckpt, "--device", "cpu", "--steps", 2, "--outdir", "out"]
    return lambda main, *argv: cli.run(main, [str(arg) for arg in (*common, *argv)])


def test_frames_and_animations(script, tmp_path, capsys):
    flags = ["--prompts", "a red circle", "a blue square", "--seeds", 1, 5, "--frames", 5, "--formats", "gif", "webp"]
    assert script(interpolate.main, *flags, "--n_samples", 2, "--bounce", "--preview", 1) == 0
    bar = capsys.readouterr().err
    assert "6/6" in bar and "step 2/2 of batch 3/3" in bar
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "animation-0000.gif",
        "animation-0000.webp",
        "preview.png",
        "samples",
    ]
    assert sorted(path.name for path in (out / "samples").iterdir()) == [f"0000{i}.png" for i in range(5)]
    for kind in ("gif", "webp"):
        with Image.open(out / f"animation-0000.{kind}") as animated:
            assert animated.n_frames == 8  # 0 1 2 3 4 3 2 1
    settings = [json.loads(Image.open(out / "samples" / f"0000{i}.png").text["ldm"]) for i in range(5)]
    assert "towards" not in settings[0] and settings[0]["seed"] == 1 and settings[0]["seed_mode"] == "image"
    assert settings[2]["towards"] == {"prompt": "a blue square", "seed": 5, "weight": 0.5, "contexts": "linear"}
    # a key says how to draw it alone
    assert script(txt2img.main, "--prompt", "a red circle", "--seed", 1, "--seed_mode", "image", "--n_iter", 1) == 0
    alone = Image.open(out / "samples" / "00005.png")
    assert alone.tobytes() == Image.open(out / "samples" / "00000.png").tobytes()


def test_mistakes_are_one_line(script, tmp_path, capsys):
    assert script(interpolate.main, "--prompts", "a") == 2
    assert "give two prompts or more, or two seeds" in capsys.readouterr().err
    assert script(interpolate.main, "--seeds", 1, 2, 3, "--prompts", "a", "b") == 2
    assert "2 prompts and 3 seeds do not pair" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
