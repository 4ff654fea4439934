"""Code and settings for Lightning 1, and the Trainer settings of all public configs."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl

from ldm.training.compat import TRAINER_KEYS, translate_trainer

PUBLIC = json.loads((Path(__file__).parent.parent / "reference/public_configs.json").read_text())


def test_keys_are_those_of_the_trainer():
    assert set(TRAINER_KEYS) < set(inspect.signature(pl.Trainer).parameters)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_configs(name):
    settings = PUBLIC[name].get("lightning", {}).get("trainer", {})
    current, notes = translate_trainer(settings)
    assert current == settings and not notes
    assert pl.Trainer(**current, accelerator="cpu", logger=False, enable_checkpointing=False)


OLD = [
    ({"gpus": "0,"}, {"accelerator": "gpu", "devices": "0,"}),
    ({"gpus": 2, "distributed_backend": "ddp"}, {"accelerator": "gpu", "devices": 2, "strategy": "ddp"}),
    ({"gpus": "2"}, {"accelerator": "gpu", "devices": 2}),
    ({"gpus": 0}, {"accelerator": "cpu"}),
    ({"gpus": "0,1", "accelerator": "ddp"}, {"accelerator": "gpu", "devices": "0,1", "strategy": "ddp"}),
    ({"accelerator": "ddp_cpu", "num_processes": 2}, {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}),
    ({"accelerator": "cpu"}, {"accelerator": "cpu"}),
    ({"gpus": "0,", "devices": 1, "accelerator": "cpu"}, {"accelerator": "cpu", "devices": 1}),
    ({"progress_bar_refresh_rate": 0}, {"enable_progress_bar": False}),
    ({"max_epochs": 3, "benchmark": True, "accumulate_grad_batches": 2, "gradient_clip_val": None}, None),
    ({"weights_summary": "full", "terminate_on_nan": True, "increase_log_steps": False}, {}),
]


@pytest.mark.parametrize("old, expected", OLD)
def test_older_settings(old, expected):
    current, notes = translate_trainer(old)
    if expected is None:
        expected = {key: value for key, value in old.items() if value is not None}
    assert current == expected
    assert len(notes) == len([key for key in old if old[key] is not None and current.get(key) != old[key]])


def test_mistakes():
    with pytest.raises(ValueError, match="no setting 'max_stepps': did you mean max_steps"):
        translate_trainer({"max_stepps": 3})
    with pytest.raises(ValueError, match="distributed_backend=dpd is not one of"):
        translate_trainer({"distributed_backend": "dpd"})
