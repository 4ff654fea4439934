"""The benchmark: both of its loops train the same weights, and it says how quick they are."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from ldm.util import instantiate_from_config
from scripts import benchmark
from tests.golden import filled


@pytest.fixture
def narrow(monkeypatch):
    """v1's UNet with 32 channels in place of 320, two levels of four."""
    real = benchmark.training_configs

    def configs(name):
        model, latents = real(name)
        if name == "v1":
            unet = model["params"]["unet_config"]["params"]
            unet |= {"model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2], "attention_resolutions": [2]}
        return model, latents

    monkeypatch.setattr(benchmark, "training_configs", configs)


@pytest.mark.parametrize("model, options", [("bundled", []), ("v1", ["--optimizer", "sgd", "--precision", "bf16"])])
def test_it_prints_the_speed_of_both_loops(script, narrow, capsys, model, options):
    assert script("training", "--model", model, "--steps", 2, "--batch", 3, "--device", "cpu", *options) == 0
    head, *lines = capsys.readouterr().out.strip().splitlines()[-4:]
    assert re.match(rf"{model}, batch 3, \w+, \w+, cpu \(\d+ threads\), 2 steps$", head)
    speeds = [
        re.match(r"(training run|plain loop) +([\d.]+) images/s +([\d.]+) ms a step$", line) for line in lines[:2]
    ]
    assert [match[1] for match in speeds] == ["training run", "plain loop"]
    for match in speeds:
        assert float(match[2]) * float(match[3]) == pytest.approx(3000, rel=0.02)
    ratio = float(re.match(r"run / plain +([\d.]+) of the speed$", lines[2])[1])
    assert 0.1 < ratio < 10


def test_a_plain_step_trains_what_a_run_trains(narrow):
    config, latents = benchmark.training_configs("v1")
    model = filled(instantiate_from_config(config | {"params": config["params"] | {"use_ema": True}}))
    data = benchmark.RandomLatents(2, **latents)
    batch = torch.utils.data.default_collate([data.get(i, np.random.default_rng(i)) for i in range(2)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    benchmark.plain_step(model, torch.optim.SGD(model.trainable_parameters(), lr=0.1), batch, bf16=False)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, _ in model.model.named_parameters(prefix="model")}
    averages = {"model_ema." + name.removeprefix("model.").replace(".", "") for name in trained}
    assert moved <= trained | averages | {"model_ema.num_updates"}
    assert len(moved & trained) > 0.9 * len(trained) and moved >= averages


def test_mistakes_end_in_one_line(script, capsys):
    with pytest.raises(SystemExit, match="2"):
        script("training", "--steps", 0)
    assert "is not a whole number of at least 1" in capsys.readouterr().err
    assert script("training", "--device", "abacus") == 2
    assert "abacus" in capsys.readouterr().err
