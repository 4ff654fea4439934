"""The options of samplers, schedules and guidance, from command lines to files."""

from __future__ import annotations

import importlib
import json

import pytest
import yaml
from PIL import Image

from ldm import cli
from scripts import sample_diffusion, txt2img
from tests.tiny import write_tiny
from tests.unprompted import write_toy

SCRIPTS = ("txt2img", "img2img", "inpaint", "upscale", "variations", "knn2img", "sample_diffusion")
CHOSEN = "--sampler dpmpp_2m --schedule karras --scale_schedule 5,2 --guidance rescale=0.7 --guidance_interval 0.1 9"


def run(script, *argv: object) -> int:
    return cli.run(script.main, [str(arg) for arg in argv])


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_takes_them(name):
    parser = importlib.import_module(f"scripts.{name}").parser()
    picture = ["--init-img", "x.png"] if name in ("img2img", "upscale", "variations") else []
    options = cli.sampling_options(cli.parse(parser, [*picture, *CHOSEN.split()]))
    expected = {"steps": None, "sampler": "dpmpp_2m", "eta": 0.0, "scale": [5.0, 2.0], "schedule": "karras"}
    expected |= {"terms": {"rescale": 0.7}, "interval": [0.1, 9.0]}
    assert vars(options) | expected == vars(options)


def test_pictures_say_how_they_were_drawn(tmp_path):
    ckpt = write_tiny(tmp_path)
    flags = ["--ckpt", ckpt, "--device", "cpu", "--n_samples", 1, "--n_iter", 1, "--steps", 2, "--skip_grid"]
    assert run(txt2img, *flags, "--outdir", tmp_path / "out", *CHOSEN.split()) == 0
    assert run(txt2img, *flags, "--outdir", tmp_path / "out", "--cfg_pp", "--negative_prompt", "blue") == 0
    chosen, cfg_pp = (json.loads(Image.open(path).info["ldm"]) for path in sorted(tmp_path.glob("out/samples/*")))
    expected = {"sampler": "dpmpp_2m", "schedule": "karras", "scale": [5.0, 2.0], "guidance": "rescale=0.7"}
    assert chosen | expected | {"guidance_interval": [0.1, 9.0]} == chosen and "eta" not in chosen
    expected = {"sampler": "ddim", "cfg_pp": True, "scale": 0.6, "eta": 0.0, "negative_prompt": "blue"}
    assert cfg_pp | expected == cfg_pp


def test_runs_without_text_record_them(tmp_path):
    ckpt = write_toy(tmp_path, "classes")
    flags = ["-r", ckpt, "--device", "cpu", "-n", 1, "--classes", "3", "-c", 2, "-l", tmp_path / "log"]
    assert run(sample_diffusion, *flags, *CHOSEN.split()) == 0
    (folder,) = (tmp_path / "log/samples/00000007").iterdir()
    said = json.loads(Image.open(folder / "img/sample_000000.png").info["ldm"])
    expected = {"sampler": "dpmpp_2m", "schedule": "karras", "scale": [5.0, 2.0], "guidance": "rescale=0.7", "class": 3}
    assert said | expected == said and "eta" not in said
    config = yaml.safe_load((folder / "sampling_config.yaml").read_text())
    assert (config["guidance"], config["schedule"], config["scale"]) == ({"rescale": 0.7}, "karras", [5.0, 2.0])


@pytest.mark.parametrize("option", ["--schedule karras", "--guidance pag=2", "--cfg_pp"])
def test_ancestral_sampling_takes_none_of_them(tmp_path, capsys, option):
    ckpt = write_toy(tmp_path, "nothing")
    assert run(sample_diffusion, "-r", ckpt, "-v", *option.split()) == 2
    assert "--vanilla_sample walks all timesteps without guidance" in capsys.readouterr().err
