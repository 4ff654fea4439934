"""Training of first stages: seconds of it on small networks, and the rules of its two optimizers."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch.utils.data import DataLoader, DistributedSampler

from ldm.checkpoint import build_on_meta, fill_model, read_checkpoint, save_checkpoint
from ldm.models.autoencoder import AutoencoderKL, VQModel, VQModelInterface, psnr
from ldm.util import instantiate_from_config

REFERENCE = Path(__file__).parents[1] / "reference"
KEYS, PUBLIC = REFERENCE / "keys", json.loads((REFERENCE / "public_configs.json").read_text())
DDCONFIG = {"z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 8, "ch_mult": [1, 2]}
DDCONFIG |= {"num_res_blocks": 1, "attn_resolutions": []}
DISCRIMINATOR = {"disc_num_layers": 1, "disc_start": 0, "disc_ndf": 16, "disc_weight": 0.5}
DISCRIMINATOR |= {"perceptual_weight": 0.0}
KL_LOSS = "ldm.modules.losses.LPIPSWithDiscriminator"
VQ_LOSS = "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
PLAIN = {"target": "ldm.modules.losses.reconstruction.ReconstructionLoss", "params": {"foreground_weight": 3.0}}
NO_LOSS = {"target": "torch.nn.Identity"}


def build(kind: str, loss: dict | None = None, lr: float = 2e-3, **changes) -> AutoencoderKL | VQModel:
    """A small first stage with a discriminator; `loss` changes its options, or is a config."""
    torch.manual_seed(0)
    params = {"ddconfig": DDCONFIG | {"double_z": kind == "kl"}, "embed_dim": 4}
    params |= {"channels_per_group": 4, "initial_logvar": -6.0} if kind == "kl" else {"n_embed": 32}
    if "target" not in (loss or {}):
        weight = {"kl_weight": 1e-6} if kind == "kl" else {}
        loss = {"target": KL_LOSS if kind == "kl" else VQ_LOSS, "params": DISCRIMINATOR | weight | (loss or {})}
    target = "ldm.models.autoencoder." + ("AutoencoderKL" if kind == "kl" else "VQModel")
    model = instantiate_from_config({"target": target, "params": params | {"lossconfig": loss} | changes})
    model.learning_rate = lr
    return model


def squares(count: int, size: int = 16) -> list[dict]:
    """Pictures of one plain square each on plain ground."""
    rng = np.random.default_rng(0)
    items = []
    for _ in range(count):
        image = np.empty((size, size, 3), np.float32)
        image[:] = rng.uniform(-1, 1, 3)
        top, left = rng.integers(size // 2, size=2)
        image[top : top + size // 2, left : left + size // 2] = rng.uniform(-1, 1, 3)
        items.append({"image": image})
    return items


def images(items: list[dict]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(item["image"]) for item in items]).movedim(-1, 1)


class Recorder(pl.Callback):
    """Every logged training number, and the steps at which batches began."""

    def __init__(self) -> None:
        self.parts: list[dict[str, float]] = []
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer, *_) -> None:
        self.steps.append(trainer.global_step)

    def on_train_batch_end(self, trainer, *_) -> None:
        self.parts.append({name.removesuffix("_step"): float(v) for name, v in trainer.logged_metrics.items()})


def fit(model, steps: int, folder, **options) -> tuple[pl.Trainer, Recorder]:
    recorder = Recorder()
    defaults = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults |= {"enable_checkpointing": False, "default_root_dir": folder, "max_steps": steps, "log_every_n_steps": 1}
    defaults |= {"use_distributed_sampler": False}
    options["callbacks"] = [recorder, *options.get("callbacks", [])]
    trainer = pl.Trainer(**defaults | options)
    data = squares(4) * steps
    rank, world = int(os.environ.get("LOCAL_RANK", 0)), trainer.world_size
    sampler = DistributedSampler(data, world, rank, shuffle=False)
    trainer.fit(model, DataLoader(data, 4 // world, sampler=sampler), DataLoader(data[:4], 4))
    return trainer, recorder


STAGES = [("kl", None), ("kl", PLAIN), ("kl", {"disc_start": 1000}), ("vq", None), ("vq", {"disc_factor": 0.0})]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind, loss", STAGES)
def test_training_in_seconds(kind, loss, tmp_path):
    """The loss falls, the checkpoint loads strictly and reconstructs."""
    model = build(kind, loss, monitor="val/rec_loss")
    before = copy.deepcopy(model)
    trainer, recorder = fit(model, 32, tmp_path)
    losses = [part["train/rec_loss"] for part in recorder.parts]
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])
    adversarial = getattr(model.loss, "discriminator", None) is not None
    assert len(trainer.optimizers) == 1 + adversarial and trainer.global_step == 32
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before.get_parameter(name))]
    active = adversarial and loss != {"disc_start": 1000}
    assert any(name.startswith("loss.discriminator") for name in moved) == active
    assert "loss.logvar" not in moved and {name.partition(".")[0] for name in moved} >= set(model.NETWORKS)
    assert {"val/rec_loss", "val/aeloss", "val/psnr"} <= trainer.callback_metrics.keys()

    trainer.save_checkpoint(tmp_path / "stage.ckpt")
    again = build(kind, loss)
    again.load_state_dict(read_checkpoint(tmp_path / "stage.ckpt").state, strict=True)
    x = images(squares(4))
    with torch.no_grad():
        torch.manual_seed(3)
        found = again.eval()(x)[0]
        torch.manual_seed(3)
        assert torch.equal(found, model.eval()(x)[0])
        assert psnr(found, x).mean() > psnr(before.eval()(x)[0], x).mean() + 1.5


# ---- the rules of its two optimizers ----

SGD = {"target": "torch.optim.SGD"}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_each_side_follows_its_own_gradient(kind, tmp_path):
    """One step against both gradients by hand."""
    model = build(kind, lr=1e-3, optimizer_config=SGD)
    reference = copy.deepcopy(model).train()
    fit(model, 1, tmp_path, callbacks=[Seed()])
    Seed().on_train_batch_start()
    _, loss_of = reference.losses(images(squares(4)))
    aeloss, discloss = (loss_of(i, 0, last_layer=reference.get_last_layer())[0] for i in (0, 1))
    for loss, parameters in (
        (aeloss, reference.trained_parameters()),
        (discloss, list(reference.loss.discriminator.parameters())),
    ):
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
            parameter.data -= 1e-3 * gradient
    assert_same_weights(model, reference)


class Seed(pl.Callback):
    """The same random numbers in every batch."""

    def on_train_batch_start(self, *_) -> None:
        torch.manual_seed(7)


def assert_same_weights(one, other, rtol: float = 1e-4) -> None:
    expected = weights(other)
    for name, value in weights(one).items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_steps_are_counted_as_batches(tmp_path):
    """disc_start=2 lets two batches pass, though two optimizers step in each."""
    trainer, recorder = fit(build("kl", {"disc_start": 2}), 4, tmp_path)
    assert recorder.steps == [0, 1, 2, 3] and trainer.global_step == 4
    assert [part["train/disc_factor"] for part in recorder.parts] == [0, 0, 1, 1]


def test_accumulated_batches_are_one_large_one(tmp_path):
    """Also where an epoch ends with a group that is not full."""
    data = squares(4)
    models = [build("vq", {"disc_factor": 0.0}, lr=0.1, optimizer_config=SGD) for _ in range(2)]
    models[0].accumulate_grad_batches = 2
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options |= {"enable_checkpointing": False, "default_root_dir": tmp_path, "max_epochs": 1}
    for model, size in zip(models, (2, 4)):
        pl.Trainer(**options).fit(model, DataLoader(data * 2, size))
        assert model.global_step == 2
    assert_same_weights(*models)
    recorder = Recorder()
    pl.Trainer(**options | {"callbacks": [recorder]}).fit(models[0], DataLoader(data + data[:2], 2))
    assert recorder.steps == [0, 0, 1] and models[0].global_step == 2


def test_gradients_are_clipped_apart(tmp_path):
    model = build("kl", lr=1.0, optimizer_config=SGD)
    model.gradient_clip_val = 1e-3
    before = weights(model)
    fit(model, 1, tmp_path)
    change = {name: value - before[name] for name, value in weights(model).items()}
    for discriminator in (False, True):
        side = [x.flatten() for name, x in change.items() if name.startswith("loss.discriminator") == discriminator]
        assert torch.cat(side).norm() == pytest.approx(1e-3, rel=1e-2)


def test_learning_rates(tmp_path):
    schedule = {"warm_up_steps": [4], "cycle_lengths": [100], "f_start": [0.0], "f_max": [1.0], "f_min": [1.0]}
    schedule = {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": schedule}
    model = build("vq", lr=1e-3, lr_g_factor=2.0, scheduler_config=schedule)
    trainer, _ = fit(model, 2, tmp_path)
    assert [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups] == [1e-3, 0.5e-3]
    assert trainer.optimizers[0].param_groups[0]["betas"] == (0.5, 0.9)
    with pytest.raises(ValueError, match="leave out params.lr"):
        build("vq", optimizer_config={**SGD, "params": {"lr": 1.0}}).configure_optimizers()


def test_float16_scales_both_sides_alike(tmp_path):
    """The scale doubles in every step, also between the two optimizers'."""
    models = [build("vq", {"disc_start": 0}, lr=0.01, optimizer_config=SGD) for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    fit(models[0], 2, tmp_path, plugins=[Scaled("16-mixed", "cpu", scaler)])
    fit(models[1], 2, tmp_path)
    assert scaler.get_scale() == 64 * 2**4
    assert_same_weights(*models)


class Scaled(MixedPrecision):
    """Scaled gradients without the rounding of half precision."""

    def autocast_context_manager(self):
        return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_mixed_precision(kind, tmp_path):
    _, recorder = fit(build(kind), 2, tmp_path, precision="bf16-mixed")
    exact = build(kind)
    _, expected = fit(exact, 2, tmp_path)
    assert recorder.parts[0]["train/rec_loss"] == pytest.approx(expected.parts[0]["train/rec_loss"], rel=0.02)
    assert recorder.parts[1]["train/d_weight"] == pytest.approx(expected.parts[1]["train/d_weight"], rel=0.3)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path):
    model = build("kl", PLAIN)
    spoilt = [{"image": np.full((16, 16, 3), np.nan, np.float32)}] * 4
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(**options, enable_checkpointing=False, default_root_dir=tmp_path, max_steps=5)
    with pytest.raises(FloatingPointError, match=r"loss is not finite at step 1: .*train/rec_loss = nan"):
        trainer.fit(model, DataLoader(squares(4) + spoilt, 4))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_learnt_variance(tmp_path):
    model = build("kl", learn_logvar=True)
    fit(model, 1, tmp_path)
    assert model.loss.logvar != 0
    with pytest.raises(ValueError, match="ReconstructionLoss has no logvar"):
        build("kl", PLAIN, learn_logvar=True)


def test_averages(tmp_path):
    model = build("vq", use_ema=True)
    names = {name for name in model.state_dict() if name.startswith("model_ema.")}
    assert "model_ema.encoderconv_inweight" in names and not any("discriminator" in name for name in names)
    trainer, _ = fit(model, 2, tmp_path)
    assert model.model_ema.num_updates == 2 and "val_ema/rec_loss" in trainer.callback_metrics
    trained = weights(model)
    with model.ema_scope():
        assert not torch.equal(model.decoder.conv_in.weight, trained["decoder.conv_in.weight"])
    assert_same_weights(model, copy.deepcopy(model))
    path = save_checkpoint(tmp_path / "plain.ckpt", build("vq").state_dict())
    started = build("kl", ema_decay=0.9, ckpt_path=None)
    assert started.model_ema.decay == pytest.approx(0.9)
    started = build("vq", use_ema=True, ckpt_path=str(path))
    average = started.model_ema.get_buffer("encoderconv_inweight")
    assert torch.equal(average, started.encoder.conv_in.weight)


@pytest.mark.subprocess
def test_processes_share_a_batch(tmp_path):
    """Two processes with two images each train as one with four, and a discriminator is no obstacle to them."""
    command = [sys.executable, "-m", "tests.models.train_first_stage_ddp", str(tmp_path)]
    subprocess.run(command, check=True, cwd=REFERENCE.parents[1], timeout=600)
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = build("kl", PLAIN, lr=0.1, optimizer_config=SGD)
    fit(model, 2, tmp_path, callbacks=[Seed()])
    assert found.keys() == model.state_dict().keys()
    for name, value in weights(model).items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


# ---- building, loading, looking ----


def test_without_a_loss(tmp_path):
    with pytest.raises(ValueError, match="AutoencoderKL has no loss to train with"):
        fit(build("kl", NO_LOSS), 1, tmp_path)


def test_models_for_use_need_no_loss(tmp_path):
    """Without memory no loss is built: neither LPIPS's files nor its weights in the checkpoint are needed."""
    params = {"ddconfig": DDCONFIG | {"double_z": True}, "embed_dim": 4}
    loss = {"target": KL_LOSS, "params": {"disc_start": 0}}
    model = build_on_meta({"target": "ldm.models.autoencoder.AutoencoderKL", "params": params | {"lossconfig": loss}})
    path = save_checkpoint(tmp_path / "published.ckpt", build("kl", channels_per_group=None).state_dict())
    report = fill_model(model, read_checkpoint(path))
    assert report.ignored and all(key.startswith("loss.") for key in report.ignored) and not report.unexpected


def test_starting_from_a_file_with_another_loss(tmp_path):
    source = build("kl", {"disc_num_layers": 2})
    with torch.no_grad():
        source.loss.discriminator.main[0].weight += 1
    path = save_checkpoint(tmp_path / "published.ckpt", source.state_dict())
    model = build("kl", PLAIN, ckpt_path=str(path))
    assert torch.equal(model.encoder.conv_in.weight, source.encoder.conv_in.weight)
    model = build("kl", {"disc_num_layers": 2}, ckpt_path=str(path), ignore_keys=["loss."])
    assert not torch.equal(model.loss.discriminator.main[0].weight, source.loss.discriminator.main[0].weight)


def batch_of(size: int = 16, channels: int = 3, count: int = 10) -> dict:
    return {"image": torch.rand(count, size, size, channels) * 2 - 1}


def test_log_images():
    shown = build("kl").log_images(batch_of(), N=3)
    assert set(shown) == {"inputs", "reconstructions", "samples"}
    assert all(value.shape == (3, 3, 16, 16) for value in shown.values())
    assert set(build("kl").log_images(batch_of(), only_inputs=True)) == {"inputs"}
    shown = build("vq", use_ema=True).log_images(batch_of(), plot_ema=True)
    assert set(shown) == {"inputs", "reconstructions", "reconstructions_ema"} and len(shown["inputs"]) == 8


def test_maps_are_shown_as_colors():
    ddconfig = DDCONFIG | {"double_z": True, "in_channels": 5, "out_ch": 5}
    shown = build("kl", NO_LOSS, ddconfig=ddconfig, colorize_nlabels=5).log_images(batch_of(channels=5))
    for value in shown.values():
        assert value.shape == (8, 3, 16, 16) and value.min() == -1 and value.max() == 1
    with pytest.raises(ValueError, match="needs colorize_nlabels: 5"):
        build("kl", NO_LOSS, ddconfig=ddconfig).log_images(batch_of(channels=5))


def test_batches_of_random_sizes(monkeypatch):
    model = build("vq", batch_resize_range=(16, 48)).train()
    assert model.get_input(batch_of(32), "image").shape == (10, 3, 48, 48)
    monkeypatch.setattr(VQModel, "global_step", 5)
    assert {model.get_input(batch_of(32), "image").shape[-1] for _ in range(30)} == {16, 32, 48}
    assert model.eval().get_input(batch_of(32), "image").shape[-1] == 32
    for sizes in ((10, 32), (32, 16), (16,)):
        with pytest.raises(ValueError, match="batch_resize_range must be two multiples of 16"):
            build("vq", batch_resize_range=sizes)


def test_sizes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="15 x 15 pixels do not fit: both sides must be multiples of 2"):
        build("kl").get_input(batch_of(15), "image")


def test_codebook_options(tmp_path):
    np.save(tmp_path / "used.npy", np.arange(7))
    model = build("vq", remap=str(tmp_path / "used.npy"), sane_index_shape=True)
    assert model.loss.n_classes == 7
    *_, indices = model(images(squares(2)), return_pred_indices=True)
    assert indices.shape == (2, 8, 8) and indices.max() < 7
    assert build("vq", {"n_classes": 9}).loss.n_classes == 9
    interface = VQModelInterface(4, DDCONFIG | {"double_z": False}, NO_LOSS, n_embed=8)
    assert len(interface(images(squares(2)))) == 2


def test_psnr():
    x = torch.zeros(2, 3, 4, 4)
    y = x.clone()
    y[0] += 0.2
    y[1] += 5.0  # cut to 1
    assert psnr(y, x).tolist() == pytest.approx([20.0, 10 * np.log10(4)], abs=1e-4)


@pytest.mark.parametrize("name", sorted(path.stem for path in KEYS.glob("first_stage_models.*.tsv")))
def test_published_names(name):
    """Names, shapes and dtypes of the published first stages, their losses left out."""
    config = PUBLIC[f"models/first_stage_models/{name.partition('.')[2]}/config.yaml"]["model"]
    rows = {tuple(line.split("\t")) for line in (KEYS / f"{name}.tsv").read_text().splitlines()}
    ours = {
        (key, "x".join(map(str, value.shape)) or "-", str(value.dtype).removeprefix("torch."))
        for key, value in build_on_meta(config).state_dict().items()
    }
    assert ours == rows
