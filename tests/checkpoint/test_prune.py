"""Pruned checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.checkpoint import build_on_meta, fill_model, prune, read_checkpoint, save_checkpoint
from ldm.util import instantiate_from_config
from scripts import prune_checkpoint
from tests.tiny import tiny_config, upscaler_config


def trained(**params) -> torch.nn.Module:
    """A tiny model whose averages differ from its weights."""
    model = instantiate_from_config(tiny_config(use_ema=True, **params))
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(1.0)
    return model


def test_ema_replaces_weights() -> None:
    model = trained()
    pruned = prune(model.state_dict())
    assert set(pruned) == {key for key in model.state_dict() if not key.startswith("model_ema.")}
    with model.ema_scope():
        assert all(torch.equal(pruned[key], value) for key, value in model.state_dict().items() if key in pruned)
    raw = prune(model.state_dict(), use_ema=False)
    assert all(torch.equal(raw[key], model.state_dict()[key]) for key in raw)


def test_half_converts_weights_and_not_the_schedule() -> None:
    pruned = prune(trained().state_dict(), half=True)
    assert pruned["alphas_cumprod"].dtype == torch.float32
    assert {value.dtype for key, value in pruned.items() if key.startswith("model.")} == {torch.float16}
    pruned = prune(trained(scale_by_std=True, scale_factor=0.18215).state_dict(), half=True)
    assert pruned["scale_factor"] == torch.tensor(0.18215)


def test_first_stage_ema_is_dropped() -> None:
    state = {
        "encoder.conv_in.weight": torch.zeros(2),
        "loss.logvar": torch.zeros(()),
        "model_ema.decay": torch.ones(()),
    }
    pruned = prune(state | {"model_ema.encoderconv_inweight": torch.ones(2)})
    assert set(pruned) == {"encoder.conv_in.weight"} and pruned["encoder.conv_in.weight"].eq(1).all()


def test_incomplete_ema_is_refused() -> None:
    state = dict(trained().state_dict())
    del state[next(key for key in state if key.startswith("model.diffusion_model."))]
    with pytest.raises(ValueError, match="EMA weights"):
        prune(state)


def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained()
    state = {**model.state_dict(), "loss.discriminator.main.0.weight": torch.zeros(3)}
    source = save_checkpoint(tmp_path / "last.ckpt", state, global_step=7)
    prune_checkpoint.main([str(source), str(tmp_path / "model.safetensors")])
    assert "MB instead of" in capsys.readouterr().out
    checkpoint = read_checkpoint(tmp_path / "model.safetensors")
    assert checkpoint.global_step == 7
    small = build_on_meta(tiny_config(use_ema=False))
    fill_model(small, checkpoint)
    with model.ema_scope():
        for ours, theirs in zip(small.model.parameters(), model.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(FileExistsError):
        prune_checkpoint.main([str(source), str(tmp_path / "model.safetensors")])


def test_schedules_of_conditions_are_not_rounded() -> None:
    state = instantiate_from_config(upscaler_config()).state_dict()
    pruned = prune(state, half=True)
    schedule = [key for key in pruned if key.startswith("low_scale_model.")]
    assert len(schedule) == 8 and all(torch.equal(pruned[key], state[key]) for key in schedule)
