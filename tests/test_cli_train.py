"""The command line of training: public spellings, settings after the options, mistakes in one line."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from ldm.cli.train import parse_train


def parsed(text: str) -> argparse.Namespace:
    return parse_train(text.split())


def test_public_command():
    args = parsed("--base configs/autoencoder/x.yaml -t --gpus 0,")
    assert args.base == ["configs/autoencoder/x.yaml"] and args.train is True and args.trainer == {"gpus": "0,"}
    assert (args.seed, args.scale_lr, args.no_test, args.logdir) == (None, None, False, "logs")


def test_settings_may_stand_anywhere():
    args = parsed("-b a.yaml b.yaml model.x=1 -t data.params.y=[1,2] --max_steps 5 model.z.w=a=b")
    assert args.base == ["a.yaml", "b.yaml"] and args.trainer == {"max_steps": 5}
    assert sorted(args.dotlist) == ["data.params.y=[1,2]", "model.x=1", "model.z.w=a=b"]


@pytest.mark.parametrize(
    "text, expected", [("-t", True), ("-t True", True), ("-t false", False), ("--train=no", False), ("", False)]
)
def test_yes_or_no(text, expected):
    assert parse_train(["--base", "a.yaml", *text.split(), "--scale-lr", "False"]).train is expected


def test_alternative_spellings():
    args = parsed("-b a.yaml --no_test --scale_lr False --val_check_interval 0.5 --limit-val-batches 3")
    assert args.no_test is True and args.scale_lr is False
    assert args.trainer == {"val_check_interval": 0.5, "limit_val_batches": 3}


MISTAKES = [
    ("-b a.yaml --max_stepps 3", "there is no option --max_stepps: did you mean --max_steps?"),
    ("-b a.yaml --detect_anomaly True", "write lightning.trainer.detect_anomaly=..."),
    ("-b a.yaml -t nonsense", "'nonsense' is neither an option nor a setting"),
    ("-t", "--base FILE.yaml"),
    ("-r logs/x -n y -t", "exclude each other"),
    ("-b a.yaml --scale_lr=maybe", "'maybe' is neither true nor false"),
    ("-b a.yaml --max_steps 1.5", "must be an integer"),
]


@pytest.mark.parametrize("text, message", MISTAKES)
def test_mistakes(text, message, capsys):
    with pytest.raises(SystemExit) as end:
        parsed(text)
    err = capsys.readouterr().err
    assert end.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.subprocess
def test_options_are_known_before_anything_heavy_is_imported():
    code = "import sys; from ldm.cli.train import parse_train; parse_train(['-b', 'a.yaml']); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "pytorch_lightning", "omegaconf", "numpy"} & set(modules)
