"""The script that caches a config's data: its files, what it prints, its mistakes."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ldm import cli
from ldm.data.cache import CachedDataset
from ldm.util import instantiate_from_config
from tests.tiny import write_tiny

KEYS = {"first_stage_key": "image", "cond_stage_key": "caption"}


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """A training config of the tiny model and four pictures with captions; the model's weights are in model.ckpt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(0, 255, (32, 40, 3), np.uint8)).save(tmp_path / f"photos/{name}.png")
        (tmp_path / f"photos/{name}.txt").write_text("a red circle")
    write_tiny(tmp_path, **KEYS)
    whole = OmegaConf.load(tmp_path / "config.yaml")
    params = {"root": "${pictures}", "size": 32}
    train, validation = (
        {"target": "ldm.data.folder.ImageFolder", "params": params | {"part": p}} for p in ([0, 0.5], [0.5, 1])
    )
    data = {
        "target": "main.DataModuleFromConfig",
        "params": {"batch_size": 2, "train": train, "validation": validation},
    }
    OmegaConf.save(OmegaConf.merge(whole, {"pictures": "???", "data": data}), tmp_path / "train.yaml")
    return tmp_path / "train.yaml"


@pytest.fixture
def run(capsys):
    """Runs the script with a command line: gives exit code, stdout and stderr."""
    main = importlib.import_module("scripts.cache_latents").main

    def call(*argv) -> tuple[int, str, str]:
        code = cli.run(main, [str(arg) for arg in argv])
        return code, *capsys.readouterr()

    return call


def test_the_printed_sections_work(config, run, tmp_path) -> None:
    settings = ("--device", "cpu", "--text", "--flips", "--dtype", "float16", "--batch-size", 2, "pictures=photos")
    code, out, err = run("--base", config, "--ckpt", "model.ckpt", "--out", tmp_path / "c", *settings)
    assert code == 0, err
    printed = OmegaConf.create(out[out.index("data:") : out.index("\n\n", out.index("data:"))])
    assert OmegaConf.load(tmp_path / "c/config.yaml").data.params.train == printed.data.params.train
    for name in ("train", "validation"):
        cached = instantiate_from_config(printed.data.params[name])
        assert isinstance(cached, CachedDataset) and len(cached) == 2
        assert cached[0].keys() == {"moments", "caption", "context"}
        assert (cached.index["flips"], cached.index["dtype"]) == (True, "float16")
        model = OmegaConf.merge(OmegaConf.load(config).model, {"params": {"ckpt_path": "model.ckpt"}})
        cached.check(instantiate_from_config(model))
    code, out, _ = run("--base", config, "--ckpt", "model.ckpt", "--out", tmp_path / "c", *settings)
    assert code == 0 and out.count("is finished already") == 2
    small = ("data.params.train.params.size=16", *settings)
    code, _, err = run("--base", config, "--ckpt", "model.ckpt", "--out", tmp_path / "c", *small)
    assert code == 2 and "was made of another data set: size differ" in err


def test_weights_may_come_by_the_config_and_sections_may_be_cached_already(config, run, tmp_path) -> None:
    OmegaConf.save(
        {
            "data": {
                "params": {
                    "train": {
                        "target": "ldm.data.cache.CachedDataset",
                        "params": {
                            "folder": "unused",
                            "dataset": {
                                "target": "ldm.data.folder.ImageFolder",
                                "params": {"root": "photos", "size": 32},
                            },
                        },
                    },
                    "validation": None,
                }
            }
        },
        tmp_path / "more.yaml",
    )
    weights = "model.params.ckpt_path=model.ckpt"
    code, _, err = run("--base", config, "more.yaml", "--out", "c", "--device", "cpu", weights, "pictures=photos")
    assert code == 0, err
    assert len(CachedDataset(tmp_path / "c/train")) > 0 and not (tmp_path / "c/validation").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pictures=photos"], "the first stage has no weights: give the model's by --ckpt"),
        (["--ckpt", "model.ckpt"], "the config needs a value for pictures: add pictures=..."),
        (["--ckpt", "model.ckpt", "pictures=elsewhere"], "there is no folder elsewhere"),
        (["--ckpt", "other.ckpt", "pictures=photos"], "there is no checkpoint at other.ckpt"),
        (["--fips", "pictures=photos"], "'--fips' is neither an option (see --help) nor of the form key.sub=value"),
        (["pictures=photos", "data.params.train=null", "data.params.validation=null"], "no data.params.train section"),
    ],
)
def test_mistakes_are_one_line(config, run, argv, message) -> None:
    code, _, err = run("--base", config, "--out", "c", "--device", "cpu", *argv)
    assert code == 2 and message in err
    assert err.count("error:") == 1 and "Traceback" not in err
