"""Options of txt2img and img2img per image: seeds, variations, tiling; progress and Ctrl-C. With a tiny model."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm import cli, inference
from ldm.distributed import DistributedContext
from scripts import img2img, txt2img
from tests.tiny import write_tiny


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs a script's `main`: gives its images, as pixels and metadata, in order; the exit code must be 0."""
    ckpt = write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.png")
    common = ["--ckpt", ckpt, "--device", "cpu", "--prompt", "red", "--skip_grid"]
    common += ["--steps", 2, "--ddim_eta", 1, "--scale", 2]

    def _run(main, outdir: str, *flags: Any, code: int = 0) -> list[tuple[np.ndarray, dict[str, Any]]]:
        source = ["--init-img", "photo.png"] if main is img2img.main else ["--H", 16, "--W", 16]
        argv = [*common, "--outdir", outdir, *source, *flags]
        assert cli.run(main, [str(arg) for arg in argv]) == code
        images = [Image.open(path) for path in sorted(Path(outdir, "samples").iterdir())]
        return [(np.asarray(image).astype(int), json.loads(image.text["ldm"])) for image in images]

    return _run


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for the last bit: batches of another size sum up in another order."""
    return np.abs(a - b).max() <= 1


@pytest.mark.parametrize("main", [txt2img.main, img2img.main])
def test_an_images_seed_reproduces_it_alone(script, main):
    flags = ["--seed_mode", "image", "--n_samples", 2, "--n_iter", 2]
    run = script(main, "run", *flags, "--seed", 5)
    assert [settings["seed"] for _, settings in run] == [5, 6, 7, 8]
    pixels, settings = run[2]
    assert settings["seed_mode"] == "image" and not {"index", "batch_size"} & settings.keys()
    ((alone, again),) = script(main, "alone", "--seed_mode", "image", "--n_samples", 1, "--n_iter", 1, "--seed", 7)
    assert same(alone, pixels) and again == settings
    assert not any(same(pixels, other) for i, (other, _) in enumerate(run) if i != 2)


def test_processes_need_not_skip_per_image_noise(script, monkeypatch):
    flags = ["--seed_mode", "image", "--n_samples", 2, "--n_iter", 3]
    alone = script(txt2img.main, "one", *flags)

    @dataclass(frozen=True)
    class Shared(DistributedContext):
        def broadcast(self, value):
            return 0

        def gather(self, values):
            return values

    monkeypatch.setattr(inference.Pipeline, "skip_noise", None)  # not to be called
    for rank in range(2):
        monkeypatch.setattr(txt2img, "process_group", lambda r=rank: contextlib.nullcontext(Shared(r, 2)))
        together = script(txt2img.main, "two", *flags)
    assert len(together) == 6
    for (one, settings), (two, others) in zip(alone, together):
        assert (one == two).all() and settings == others


def test_fixed_code_starts_every_batch_at_the_same_seeds(script):
    flags = ["--seed_mode", "image", "--fixed_code", "--n_samples", 2, "--n_iter", 2, "--seed", 5]
    run = script(txt2img.main, "run", *flags)
    assert [settings["seed"] for _, settings in run] == [5, 6, 5, 6]
    assert (run[0][0] == run[2][0]).all() and (run[1][0] == run[3][0]).all()


def test_variations(script):
    def sample(outdir: str, strength: float, *flags: Any) -> list[tuple[np.ndarray, dict[str, Any]]]:
        more = ["--variation_seed", 9, "--variation_strength", strength, "--n_samples", 2, "--n_iter", 1, "--seed", 5]
        return script(txt2img.main, outdir, *more, *flags)

    each = ["--seed_mode", "image"]
    near, far = sample("near", 0.1, *each), sample("far", 1, *each)
    ((own, _),) = script(txt2img.main, "own", *each, "--n_samples", 1, "--n_iter", 1, "--seed", 5)
    ((other, _),) = script(txt2img.main, "other", *each, "--n_samples", 1, "--n_iter", 1, "--seed", 10)
    assert same(far[1][0], other)
    distances = [np.abs(picture - own).mean() for picture, _ in (near[0], near[1], far[1])]
    assert 0 < max(distances[:2]) < distances[2] and not same(near[0][0], near[1][0])
    assert [(s["seed"], s["variation_seed"]) for _, s in near] == [(5, 9), (5, 10)]
    assert near[0][1]["variation_strength"] == 0.1
    # around the published images
    plain = script(txt2img.main, "plain", "--n_samples", 2, "--n_iter", 1, "--seed", 5)
    assert all((a == b).all() for (a, _), (b, _) in zip(plain, sample("zero", 0)))
    varied, gone = sample("batch", 0.1), sample("gone", 1)
    assert [settings["seed"] for _, settings in varied] == [5, 5] and varied[1][1]["index"] == 1
    for (a, _), (b, _), (c, _) in zip(plain, varied, gone):
        assert 0 < np.abs(a - b).mean() < np.abs(a - c).mean()


def test_noise_of_the_cpu_is_the_default_on_a_cpu(script):
    flags = ["--fixed_code", "--n_samples", 2, "--n_iter", 2]
    runs = [script(txt2img.main, name, *flags, "--noise_device", name) for name in ("model", "cpu")]
    assert all((a == b).all() for (a, _), (b, _) in zip(*runs))
    assert "noise_device" not in runs[0][0][1] and runs[1][0][1]["noise_device"] == "cpu"


@pytest.mark.parametrize("main", [txt2img.main, img2img.main])
def test_tiling_and_previews(script, main, capsys):
    flags = ["--seed_mode", "image", "--n_samples", 1, "--n_iter", 1]
    ((plain, _),) = script(main, "plain", *flags)
    capsys.readouterr()
    ((tiled, settings),) = script(main, "tiled", *flags, "--tiling", "--preview", 1)
    assert not same(plain, tiled) and settings["tiling"] == "both"
    steps = 2 if main is txt2img.main else 1  # of 2, at a strength of 0.75
    assert f"step {steps}/{steps} of batch 1/1" in capsys.readouterr().err
    with Image.open("tiled/preview.png") as preview:
        assert preview.size == plain.shape[1::-1]
    assert not Path("plain/preview.png").exists()


def test_one_bar_for_a_run_of_unequal_batches(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    totals = []
    progress = cli.Progress(Namespace(preview=None), None, batches=3)
    for steps in (2, 4, 4):
        for step in range(1, steps + 1):
            progress(None, step, steps)
            totals.append((progress._bar.n, progress._bar.total))
    progress.close()
    assert totals[:3] == [(1, 6), (2, 6), (3, 10)] and totals[-1] == (10, 10)


@pytest.fixture
def listening():
    """Ctrl-C counts even where the tests run in the background, whose processes are told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_middle_of_a_batch_keeps_what_is_done(script, listening, monkeypatch, capsys):
    calls = []

    def press(self, x0, step, total):
        calls.append(step)
        if len(calls) == 3:  # the first step of the second batch
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli.Progress, "__call__", press)
    done = script(txt2img.main, "run", "--n_samples", 2, "--n_iter", 3, code=130)
    assert len(done) == 2 and calls == [1, 2, 1]
    assert capsys.readouterr().err.endswith("interrupted; 2 images written to run/samples\n")


def test_ctrl_c_waits_for_finished_images(script, monkeypatch, capsys):
    from ldm import images

    save = images.save_png

    def press(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return save(*args, **kwargs)

    monkeypatch.setattr(images, "save_png", press)
    before = signal.getsignal(signal.SIGINT)
    done = script(txt2img.main, "run", "--n_samples", 3, "--n_iter", 2, code=130)
    assert len(done) == 3 and capsys.readouterr().err.endswith("interrupted; 3 images written to run/samples\n")
    assert signal.getsignal(signal.SIGINT) is before
