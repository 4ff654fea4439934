"""--resume: existing images are not generated again, missing ones come out as in an uninterrupted run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from ldm.models.model_info import ModelInfo
from scripts import img2img, txt2img
from tests.tiny import write_tiny

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = "a red circle\na blue square\na circle\na square\na red square\n"
PLAIN = "--n_samples 2 --n_iter 2 --steps 3 --ddim_eta 1 --device cpu"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "p.txt").write_text(PROMPTS)
    write_tiny(folder)
    return folder


def options(place: Path, *more: str) -> list[str]:
    return [*PLAIN.split(), "--from-file", str(place / "p.txt"), "--ckpt", str(place / "model.ckpt"), *more]


def sample(place: Path, outdir: Path, *more: str) -> None:
    assert cli.run(txt2img.main, options(place, "--outdir", str(outdir), *more)) == 0


def contents(outdir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(outdir)): path.read_bytes() for path in outdir.rglob("*.png")}


@pytest.mark.parametrize("mode", ["batch", "image"])
def test_missing_images_are_generated_as_they_were(place, tmp_path, mode):
    sample(place, tmp_path / "whole", "--seed_mode", mode)
    expected = contents(tmp_path / "whole")
    sample(place, tmp_path / "out", "--seed_mode", mode, "--resume")
    assert contents(tmp_path / "out") == expected
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS.splitlines() * 2 and len({line["key"] for line in lines}) == 10

    samples = tmp_path / "out/samples"
    for number in (0, 1, 4, 7):  # a whole batch, one alone, one of two
        (samples / f"{number:05}.png").unlink()
    damaged = bytearray((samples / "00009.png").read_bytes())
    damaged[-20] ^= 1
    (samples / "00009.png").write_bytes(damaged)
    (samples / "00002.png").rename(samples / "mine.png")
    (tmp_path / "out/grid-0000.png").unlink()
    with (tmp_path / "out/manifest.jsonl").open("a") as file:
        file.write('{"key": "cut sho')
    sample(place, tmp_path / "out", "--seed_mode", mode, "--resume")
    found = contents(tmp_path / "out")
    assert found.pop("samples/mine.png") == expected.pop("samples/00002.png")  # another name: it is there
    assert found.pop("samples/00009.png") == damaged  # nobody's, and not overwritten
    assert found.pop("samples/00010.png") == expected.pop("samples/00009.png")
    assert found == expected


@pytest.mark.parametrize("mode", ["batch", "image"])
def test_img2img_too(place, tmp_path, mode):
    def sample(outdir: str, *more: str) -> None:
        argv = [
            "--init-img",
            str(tmp_path / "init.png"),
            "--outdir",
            str(tmp_path / outdir),
            "--seed_mode",
            mode,
            *more,
        ]
        assert cli.run(img2img.main, options(place, *argv)) == 0

    Image.effect_noise((32, 32), 90).save(tmp_path / "init.png")
    sample("whole")
    sample("out", "--resume")
    for number in (0, 1, 4, 7):
        (tmp_path / f"out/samples/{number:05}.png").unlink()
    (tmp_path / "out/grid-0000.png").unlink()
    sample("out", "--resume")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    os.utime(tmp_path / "init.png", (1, 1))  # perhaps another picture
    sample("out", "--resume")
    assert len(contents(tmp_path / "out")) == 2 * 10 + 2


def test_nothing_is_generated_twice(place, tmp_path, monkeypatch, capsys):
    sample(place, tmp_path, "--resume")
    before = contents(tmp_path)

    def refuse(*_, **__):
        raise AssertionError("generated again")

    from ldm import inference

    monkeypatch.setattr(inference.Pipeline, "__call__", refuse)
    sample(place, tmp_path, "--resume")
    assert contents(tmp_path) == before  # and no second grid
    assert "holds 10 of 10 images" in capsys.readouterr().out


OTHERS = [
    ("--seed", "7"), ("--steps", "4"), ("--scale", "2"), ("--negative_prompt", "a circle"), ("--H", "16", "--W", "16"),
    ("--sampler", "euler", "--ddim_eta", "0"), ("--emphasis",), ("--tiling",), ("--seed_mode", "image"),
    ("--n_samples", "3"), ("--guidance", "rescale=0.5"), ("--no_metadata",), ("--fixed_code",),
    ("--noise_device", "cpu"),
]  # fmt: skip


def wanted(place: Path, *more: str) -> list[str]:
    """The keys of a run's images."""
    from types import SimpleNamespace

    from ldm.cli.manifest import descriptions, key_of

    args = cli.parse(txt2img.parser(), options(place, *more))
    model = SimpleNamespace(info=ModelInfo(args.ckpt), device="cpu")
    sampling = cli.sampling_options(args).resolve(default_scale=7.5)
    return [key_of(found) for found in descriptions(args, model, sampling, cli.batches(args))]


@pytest.mark.parametrize("more", OTHERS)
def test_other_options_are_other_images(place, more):
    assert not set(wanted(place)) & set(wanted(place, *more))


@pytest.mark.parametrize("more", [("--skip_grid",), ("--preview", "1"), ("--outdir", "x"), ("--n_rows", "4")])
def test_irrelevant_options_change_nothing(place, more):
    assert wanted(place, *more) == wanted(place)
    assert len(set(wanted(place))) == 10


def test_another_prompt_is_another_image_and_the_others_stay(place, tmp_path):
    def keys(text: str, *more: str) -> list[str]:
        (tmp_path / "p.txt").write_text(text)
        return wanted(place, "--from-file", str(tmp_path / "p.txt"), "--n_iter", "1", *more)

    same = [a == b for a, b in zip(keys(PROMPTS), keys(PROMPTS.replace("a circle", "a cross")))]
    assert same == [True, True, False, True, True]
    more = PROMPTS + "a ring\n"  # the last batch grows: its noise is another
    assert [a == b for a, b in zip(keys(PROMPTS), keys(more))] == [True] * 4 + [False]
    alone = ("--seed_mode", "image")
    assert keys(PROMPTS, *alone) == keys(more, *alone)[:5] == keys(PROMPTS, *alone, "--n_samples", "3")


def test_another_model_file_generates_anew(place, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    first = wanted(place, "--ckpt", str(tmp_path / "model.ckpt"))
    os.utime(tmp_path / "model.ckpt", (1, 1))
    assert not set(first) & set(wanted(place, "--ckpt", str(tmp_path / "model.ckpt")))


def test_resuming_needs_saved_images(place, capsys):
    assert cli.run(txt2img.main, options(place, "--resume", "--skip_save")) == 2
    assert "leave --skip_save out" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\xff\n[1]\n{}\n3\n" + b"[" * 9999 + b"\n", b'{"key": 1, "sha256": 2}'])
def test_manifests_that_are_damaged(place, tmp_path, content):
    (tmp_path / "manifest.jsonl").write_bytes(content)
    sample(place, tmp_path, "--n_iter", "1", "--resume")
    sample(place, tmp_path, "--n_iter", "1", "--resume")
    assert len(list((tmp_path / "samples").iterdir())) == 5
    assert (tmp_path / "manifest.jsonl").read_bytes().startswith(content)


def killed(place: Path, folder: Path, kills: int, seed: int, *more: str) -> dict:
    command = [sys.executable, "-m", "tests.scripts.killing", str(folder), str(kills), str(seed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options(place, *more)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.subprocess
def test_five_kills(place, tmp_path):
    assert killed(place, tmp_path, 5, 0)["kills"] == 5


@pytest.mark.subprocess
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["batch", "image"])
def test_a_hundred_kills(place, tmp_path, mode):
    found = killed(place, tmp_path, 100, 1, "--seed_mode", mode, "--steps", "10")
    assert found["kills"] == 100 and len(found["held"]) > 3  # they came at different moments
