"""Published files of each family load, with the extra tensors that they have or lack."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.checkpoint import Checkpoint, CheckpointError, build_on_meta, ema_name, fill_model
from ldm.checkpoint.families import FAMILIES
from ldm.checkpoint.load_weights import SCHEDULE_BUFFERS
from ldm.util import instantiate_from_config
from tests.checkpoint.test_families import AUTOENCODERS, KEYS, ROOT, WHOLE, config_of
from tests.golden import filled
from tests.tiny import tiny_config

COMPUTED = SCHEDULE_BUFFERS | {"position_ids"}


def published(name: str) -> dict[str, Tensor]:
    """A file of the published names, shapes and dtypes without what follows from configs; its zeros take no memory."""
    rows = (line.split("\t") for line in (KEYS / f"{name}.tsv").read_text().splitlines())
    return {
        key: torch.zeros((), dtype=getattr(torch, kind)).expand([int(n) for n in shape.split("x") if n != "-"])
        for key, shape, kind in rows
        if key.rpartition(".")[2] not in COMPUTED
    }


def averages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7, dtype=torch.int32)}
    return counters | {ema_name(key): value for key, value in state.items() if key.startswith("model.")}


def extras(*keys: str) -> dict[str, Tensor]:
    return dict.fromkeys(keys, torch.zeros(1))


def fill_public(name: str, state: dict[str, Tensor]) -> tuple[nn.Module, Any]:
    model = build_on_meta(OmegaConf.load(ROOT / config_of(name)).model)
    return model, fill_model(model, Checkpoint(Path("x.ckpt"), state))


# one of those that are alike
DISTINCT = [name for name in WHOLE if config_of(name) in {family.configs[0] for family in FAMILIES if family.configs}]


@pytest.mark.family
@pytest.mark.parametrize("name", DISTINCT)
def test_published_files_load_with_their_extras(name):
    """Averages where the config has none, learnt loss weights, a first stage's training."""
    state = published(name)
    odds = extras(
        "logvar",
        "loss.logvar",
        "first_stage_model.loss.discriminator.main.0.weight",
        "first_stage_model.model_ema.encoderconv_inweight",
        "first_stage_model.model_ema.decay",
        "lvlb_weights",
    )
    model, report = fill_public(name, averages(state) | odds | state)
    assert not report.unexpected and not report.notes
    assert {key.rpartition(".")[2] for key in report.own} <= COMPUTED
    assert odds.keys() <= set(report.ignored)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.family
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_published_autoencoders_load_with_their_losses(name):
    odds = extras("loss.logvar", "loss.perceptual_loss.lin0.model.1.weight", "model_ema.encoderconv_inweight")
    _, report = fill_public(name, published(name) | odds)
    assert not report.unexpected and not report.notes and set(report.ignored) == odds.keys()


def test_autoencoder_file_does_not_fill_a_model():
    given = Checkpoint(Path("vae.ckpt"), published("first_stage_models.kl-f8"))
    with pytest.raises(CheckpointError, match=r"^vae.ckpt is an autoencoder \(VAE\) alone, not a complete model"):
        fill_model(build_on_meta(tiny_config()), given)
    other = build_on_meta(OmegaConf.load(ROOT / "models/first_stage_models/kl-f4/config.yaml").model)
    with pytest.raises(CheckpointError, match=r"weights have another shape.* looks like the KL-regularised .* kl-f8 "):
        fill_model(other, given)


@pytest.mark.parametrize(
    "name",
    [
        "cond_stage_model.model.attn_mask",
        "cond_stage_model.model.visual.conv1.weight",
        "embedder.model.attn_mask",
        "embedder.model.transformer.resblocks.0.ln_1.weight",
        "embedder.mean",
        "low_scale_model.alphas_cumprod",
    ],
)
def test_unused_clip_weights_are_harmless(name):
    state = tiny_file() | extras(name)
    report = fill_model(build_on_meta(tiny_config()), Checkpoint(Path("x.ckpt"), state))
    assert report.ignored == (name,) and not report.notes


@pytest.mark.parametrize("name", ["cond_stage_model.model.transformer.resblocks.24.ln_1.weight", "embedder.proj"])
def test_unknown_tower_weights_are_reported(name):
    state = tiny_file() | extras(name)
    report = fill_model(build_on_meta(tiny_config()), Checkpoint(Path("x.ckpt"), state))
    assert report.unexpected == (name,)


@cache
def tiny_file() -> dict[str, Tensor]:
    return dict(filled(instantiate_from_config(tiny_config())).state_dict())


# ---- a first stage that encodes the condition, too: one module, listed twice ----

FIRST = "first_stage_model.encoder.conv_in.weight"
SECOND = "cond_stage_model.encoder.conv_in.weight"


def inpainting() -> dict[str, Any]:
    """A small model of the structure of inpainting_big: masked picture and mask beside the latent."""
    config = tiny_config(cond_stage_config="__is_first_stage__", conditioning_key="concat", use_ema=True)
    config["params"]["unet_config"] = copy.deepcopy(config["params"]["unet_config"])
    unet = config["params"]["unet_config"]["params"]
    unet |= {"in_channels": 9, "use_spatial_transformer": False, "context_dim": None}
    return config


@cache
def inpainting_file() -> dict[str, Tensor]:
    return {key: value.clone() for key, value in filled(instantiate_from_config(inpainting())).state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("names", ["both", "first", "second"])
def test_shared_first_stage_is_filled_once(names, dtype):
    state, lost = inpainting_file(), {"first": "cond_stage_model.", "second": "first_stage_model."}.get(names)
    weights = state[FIRST].clone()
    if lost:
        state = {key: value for key, value in state.items() if not key.startswith(lost)}
    model = build_on_meta(inpainting())
    report = fill_model(model, Checkpoint(Path("x.ckpt"), state), dtype=dtype)
    assert not report.unexpected and not report.notes
    assert model.cond_stage_model is model.first_stage_model
    assert torch.equal(model.get_parameter(SECOND), weights.to(dtype))
    listed = model.state_dict()
    assert listed[FIRST].data_ptr() == listed[SECOND].data_ptr()
    if dtype == torch.float32:  # of the file's memory, the first name's where it has both
        assert listed[FIRST].data_ptr() == state[SECOND if names == "second" else FIRST].data_ptr()


def test_missing_shared_first_stage_is_refused():
    state = {key: value for key, value in inpainting_file().items() if key not in (FIRST, SECOND)}
    with pytest.raises(CheckpointError, match=r"weights are missing, e\.g\. first_stage_model\.encoder\.conv_in"):
        fill_model(build_on_meta(inpainting()), Checkpoint(Path("x.ckpt"), state))
