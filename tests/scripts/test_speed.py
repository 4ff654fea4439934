"""Options that trade quality for speed: every sampling script has them, and writes them to the metadata."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from ldm import cli
from ldm.inference import AccelerationOptions
from scripts import txt2img

SCRIPTS = (
    *("txt2img", "img2img", "inpaint", "upscale", "variations", "interpolate", "knn2img", "sample_diffusion"),
    "evaluate",
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_them_off_by_default(name):
    options = import_module(f"scripts.{name}").parser()
    given = {action.dest: action.default for action in options._actions}
    assert AccelerationOptions(given["cache_features"], given["merge_tokens"]) == AccelerationOptions()


def test_only_what_is_asked_for_counts():
    options = cli.ArgumentParser()
    assert cli.acceleration_options(options.parse_args([])) == AccelerationOptions()  # a script without them
    cli.add_speed(options)
    assert cli.acceleration_options(options.parse_args([])) == AccelerationOptions()
    args = options.parse_args(["--cache_features", "3", "--merge-tokens", "0.5", "--quantize", "int8"])
    assert cli.acceleration_options(args) == AccelerationOptions(3, 0.5, "int8")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cache_features", "0"], "must be an integer of at least 1, not '0'"),
        (["--cache_features", "2.5"], "must be an integer"),
        (["--merge_tokens", "0.8"], "must be a finite number from 0 to 0.75, not '0.8'"),
    ],
)
def test_bad_values_are_refused_in_one_line(capsys, argv, message):
    options = cli.ArgumentParser()
    cli.add_speed(options)
    with pytest.raises(SystemExit) as end:
        options.parse_args(argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


def test_they_arrive_and_are_in_the_metadata(inference, monkeypatch):
    found, sample = [], inference.txt2img

    def txt2img_(pipe, prompts, options, **arguments):
        found.append(options.acceleration)
        return sample(pipe, prompts, options, **arguments)

    monkeypatch.setattr(inference, "txt2img", txt2img_)
    flags = ["--n_iter", "1", "--n_samples", "1"]
    for more in (["--cache_features", "3", "--merge_tokens", "0.5"], []):
        assert cli.run(txt2img.main, [*flags, *more]) == 0
    assert found == [AccelerationOptions(3, 0.5), AccelerationOptions()]
    folder = Path("outputs/txt2img-samples/samples")
    asked, plain = (json.loads(Image.open(folder / f"0000{i}.png").text["ldm"]) for i in range(2))
    assert (asked["cache_features"], asked["merge_tokens"]) == (3, 0.5)
    assert not {"cache_features", "merge_tokens"} & set(plain)
