"""Filling models: where tensors go, and what is refused before the model is touched."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.checkpoint import (
    Checkpoint,
    CheckpointError,
    build_on_meta,
    fill_model,
    read_checkpoint,
    save_checkpoint,
)
from ldm.modules.ema import LitEma
from ldm.util import instantiate_from_config
from tests.golden import filled

FIRST = "model.diffusion_model.input_blocks.0.0.weight"


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model = nn.Module()
        self.diffusion_model.input_blocks = nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, 3)))
        self.diffusion_model.out = nn.Linear(6, 2)


class Tiny(nn.Module):
    """A latent diffusion model in names only, as the real one makes its schedule on the CPU."""

    def __init__(self, use_ema: bool = False, lost: bool = False, scale: bool = False) -> None:
        super().__init__()
        self.model = Wrapper()
        self.register_buffer("betas", torch.linspace(1e-4, 2e-2, 10, device="cpu"))
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - self.betas, 0))
        self.register_buffer("lvlb_weights", torch.ones(10, device="cpu"), persistent=False)
        if use_ema:
            self.model_ema = LitEma(self.model)
        if scale:
            self.register_buffer("scale_factor", torch.tensor(1.0))
        if lost:
            self.register_buffer("grid", torch.arange(4), persistent=False)
        self.cond_stage_model = nn.Module()
        self.cond_stage_model.table = nn.Embedding(5, 3)
        self.cond_stage_model.register_buffer("position_ids", torch.arange(5, device="cpu")[None])


def tiny(**params) -> Tiny:
    return build_on_meta({"target": f"{__name__}.Tiny", "params": params})


def checkpoint(ema: bool = False, **changes) -> Checkpoint:
    """A file's worth of random weights for Tiny."""
    state = Tiny(use_ema=ema).state_dict()
    state = {key: torch.randn_like(v) if v.is_floating_point() and "alph" not in key else v for key, v in state.items()}
    state["betas"] = torch.linspace(1e-4, 2e-2, 10)
    if ema:
        state["model_ema.decay"] = torch.tensor(0.5)
        state["model_ema.num_updates"] = torch.tensor(42, dtype=torch.int32)
    state.pop("cond_stage_model.position_ids")
    return Checkpoint(Path("x.ckpt"), {**state, **changes})


def without(given: Checkpoint, *beginnings: str) -> Checkpoint:
    return Checkpoint(given.path, {key: value for key, value in given.state.items() if not key.startswith(beginnings)})


def test_build_on_meta_allocates_nothing():
    model = tiny()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.betas.is_meta


def test_all_values_come_from_the_file():
    given, model = checkpoint(), tiny()
    report = fill_model(model, given)
    for key, value in given.state.items():
        assert torch.equal(model.state_dict()[key], value), key
    assert torch.equal(model.cond_stage_model.position_ids, torch.arange(5)[None])
    assert report.own == ("cond_stage_model.position_ids",)
    assert (report.ignored, report.unexpected, report.ema, report.notes) == ((), (), "", ())
    assert report.filled == len(given.state)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tensors_of_the_right_dtype_are_not_copied(tmp_path):
    save_checkpoint(tmp_path / "a.ckpt", checkpoint().state)
    given, model = read_checkpoint(tmp_path / "a.ckpt"), tiny()
    fill_model(model, given)
    assert model.get_parameter(FIRST).data_ptr() == given.state[FIRST].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_applies_to_weights_and_not_to_the_schedule(dtype):
    given = checkpoint(ema=True)
    half = Checkpoint(given.path, {k: v.half() if v.is_floating_point() else v for k, v in given.state.items()})
    for source in (given, half):
        model = tiny(use_ema=True)
        fill_model(model, source, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model.model_ema.diffusion_modeloutweight.dtype == dtype
        assert model.model_ema.num_updates.dtype == torch.int32
        assert {model.alphas_cumprod.dtype, model.betas.dtype, model.model_ema.decay.dtype} == {torch.float32}
        assert torch.equal(model.get_parameter(FIRST), source.state[FIRST].to(dtype))


# ---- the schedule ----


def test_schedule_may_be_absent():
    model = tiny()
    report = fill_model(model, without(checkpoint(), "betas", "alphas_cumprod"))
    assert torch.equal(model.alphas_cumprod, Tiny().alphas_cumprod)
    assert report.own == ("alphas_cumprod", "betas", "cond_stage_model.position_ids")


def test_rounded_schedule_is_not_used():
    model = tiny()
    report = fill_model(model, checkpoint(alphas_cumprod=Tiny().alphas_cumprod.half()))
    assert torch.equal(model.alphas_cumprod, Tiny().alphas_cumprod)
    assert not report.notes


def test_another_schedule_is_used_and_reported(caplog):
    other = torch.cumprod(1 - torch.linspace(1e-3, 4e-2, 10), 0)
    model = tiny()
    report = fill_model(model, checkpoint(alphas_cumprod=other))
    assert torch.equal(model.alphas_cumprod, other)
    assert "another noise schedule" in report.notes[0]
    assert "the file's is used" in caplog.text


def test_schedule_of_another_length_is_refused():
    with pytest.raises(CheckpointError, match="betas is 7 in the file and 10 in the config"):
        fill_model(tiny(), checkpoint(betas=torch.ones(7)))


def test_scale_factor_comes_from_the_file():
    model = tiny(scale=True)
    fill_model(model, checkpoint(scale_factor=torch.tensor(0.21)))
    assert model.scale_factor.item() == pytest.approx(0.21)
    with pytest.raises(CheckpointError, match="1 of .* weights are missing, e.g. scale_factor"):
        fill_model(tiny(scale=True), checkpoint())


# ---- EMA ----


def assert_weights(model: Tiny, given: Checkpoint, weights: str, averages: str | None = None) -> None:
    """The model's weights are the file's `weights` set, its averages the `averages` set ("plain" or "ema")."""
    name = {"plain": "model.diffusion_model.out.weight", "ema": "model_ema.diffusion_modeloutweight"}
    assert torch.equal(model.model.diffusion_model.out.weight, given.state[name[weights]])
    if averages:
        assert torch.equal(model.model_ema.diffusion_modeloutweight, given.state[name[averages]])
        assert model.model_ema.diffusion_modeloutweight.data_ptr() != model.model.diffusion_model.out.weight.data_ptr()


def test_weights_and_ema_into_a_model_with_ema():
    given, model = checkpoint(ema=True), tiny(use_ema=True)
    report = fill_model(model, given)
    assert_weights(model, given, "plain", "ema")
    assert (model.model_ema.num_updates.item(), model.model_ema.decay.item()) == (42, 0.5)
    assert "plain and EMA" in report.ema


def test_weights_and_ema_into_a_model_without_ema(caplog):
    given, model = checkpoint(ema=True), tiny()
    with caplog.at_level(logging.INFO):
        report = fill_model(model, given)
    assert_weights(model, given, "plain")
    assert "the plain ones are used" in caplog.text
    assert len(report.ignored) == 6 and not report.unexpected and not report.notes


def test_only_plain_weights_into_a_model_with_ema():
    given, model = checkpoint(), tiny(use_ema=True)
    report = fill_model(model, given)
    assert_weights(model, given, "plain", "plain")
    assert "no EMA weights" in report.ema
    assert model.model_ema.num_updates.item() == 0
    assert "model_ema.num_updates" in report.own


@pytest.mark.parametrize("use_ema", [True, False])
def test_only_ema_weights(use_ema):
    given, model = without(checkpoint(ema=True), "model."), tiny(use_ema=use_ema)
    report = fill_model(model, given)
    assert_weights(model, given, "ema", "ema" if use_ema else None)
    assert "only EMA weights" in report.ema
    assert not report.unexpected


def test_missing_weight_is_not_replaced_by_its_ema():
    with pytest.raises(CheckpointError, match=r"1 of .* missing, e.g. model.diffusion_model.out.bias"):
        fill_model(tiny(), without(checkpoint(ema=True), "model.diffusion_model.out.bias"))
    with pytest.raises(CheckpointError, match=r"1 of .* missing, e.g. model_ema.diffusion_modeloutbias"):
        fill_model(tiny(use_ema=True), without(checkpoint(ema=True), "model_ema.diffusion_modeloutbias"))


# ---- extras ----


def test_harmless_and_unknown_extras(caplog):
    harmless = [
        "loss.logvar",
        "first_stage_model.loss.discriminator.main.0.weight",
        "lvlb_weights",
        "sqrt_alphas_cumprod",
        "logvar",
        "denoiser.sigmas",
        "cond_stage_model.transformer.vision_model.embeddings.class_embedding",
    ]
    unknown = ["control_model.x", "model.diffusion_model.extra.weight", "loss_weights"]
    report = fill_model(tiny(), checkpoint(**dict.fromkeys(harmless + unknown, torch.ones(1))))
    assert list(report.ignored) == harmless
    assert list(report.unexpected) == unknown
    assert "3 tensors have no place in the model: control_model.x, " in caplog.text


def test_ema_without_a_weight_is_reported():
    extra = {"model_ema.diffusion_modelextraweight": torch.ones(1)}
    assert fill_model(tiny(use_ema=True), checkpoint(ema=True, **extra)).unexpected == tuple(extra)
    assert tuple(extra)[0] in fill_model(tiny(), checkpoint(ema=True, **extra)).ignored


# ---- refusals ----


def refused(model: nn.Module, given: Checkpoint) -> str:
    """The sentence with which `given` is refused, once it is clear that the model was left alone."""
    before = dict(model.state_dict(keep_vars=True))
    with pytest.raises(CheckpointError) as caught:
        fill_model(model, given)
    after = model.state_dict(keep_vars=True)
    assert all(after[key] is before[key] for key in before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_weights():
    text = refused(tiny(), without(checkpoint(), "cond_stage_model", "model.diffusion_model.out."))
    assert "3 of 8 weights are missing, e.g. model.diffusion_model.out.weight, " in text
    assert "there is nothing of cond_stage_model;" in text
    assert "looks like a latent diffusion model" in text


def test_other_shapes():
    given = checkpoint(**{FIRST: torch.ones(6, 9, 3, 3)})
    text = refused(tiny(), given)
    assert f"1 weights have another shape, e.g. {FIRST} is 6x9x3x3 in the file and 6x4x3x3 in the config" in text


def test_lora_is_refused():
    text = refused(tiny(), Checkpoint(Path("l.safetensors"), {"lora_unet_x.lora_up.weight": torch.ones(1)}))
    assert text.startswith("l.safetensors is a LoRA, not a complete model")


def test_buffers_that_no_file_can_fill():
    with pytest.raises(RuntimeError, match=r"non-persistent buffers .*grid"):
        fill_model(tiny(lost=True), checkpoint())


def test_spare_weights_may_be_missing(tmp_path, caplog):
    """Files of Stable Diffusion 2 that came back from diffusers end with the last layer that is read."""
    caplog.set_level(logging.INFO)
    tower = {"width": 8, "heads": 2, "layers": 3, "vocab_size": 49408, "context_length": 8, "embed_dim": 8}
    target = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
    config = {"target": target, "params": {"layer": "penultimate", "config": tower, "max_length": 8}}
    whole = filled(instantiate_from_config(config))
    lacks = ("model.transformer.resblocks.2.", "model.text_projection", "model.logit_scale")
    state = {key: value for key, value in whole.state_dict().items() if not key.startswith(lacks)}
    model = build_on_meta(config)
    fill_model(model, Checkpoint(tmp_path / "converted.ckpt", state))
    assert model.state_dict().keys() == whole.state_dict().keys()
    assert model(["a cat"]).equal(whole(["a cat"])) and model.model.text_projection.eq(0).all()
    assert f"lacks {len(whole.state_dict()) - len(state)} weights that are never used" in caplog.text
    last = {**config, "params": {**config["params"], "layer": "last"}}
    with pytest.raises(CheckpointError, match=r"12 of 42 weights are missing, e.g. model.transformer.resblocks.2"):
        fill_model(build_on_meta(last), Checkpoint(tmp_path / "converted.ckpt", state))
