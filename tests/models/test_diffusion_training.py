"""Training of diffusion: closed forms of the additions, hooks under a trainer, random numbers of several processes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from ldm.models.diffusion.batches import ConditionDropout
from ldm.models.diffusion.ddpm import DDPM
from ldm.models.diffusion.distributed_rng import DistributedRNG, seeded
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.training import TimestepBuckets
from ldm.modules.diffusionmodules.schedule import (
    make_beta_schedule,
    min_snr_weights,
    rescale_zero_terminal_snr,
    schedule_buffers,
)
from ldm.util import instantiate_from_config
from tests.models.test_training import batch, build
from tests.tiny import tiny_config


class Point(torch.nn.Module):
    """The least network: one weight a channel, which sees latents, and a condition if there is one."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.1, 1.0, channels).reshape(-1, 1, 1))
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, context=None):
        shift = 0.0 if context is None else context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1)
        return self.weight * x + shift + 0.0 * self.unused


def point(**changes) -> pl.LightningModule:
    """A LatentDiffusion of latents as they are, with that network."""
    settings = {
        "unet_config": {"target": f"{__name__}.Point"},
        "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "cond_stage_config": "__is_unconditional__",
        "image_size": 8,
        "channels": 4,
        "use_ema": False,
    }
    model = instantiate_from_config(
        {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": settings | changes}
    )
    model.learning_rate = 1e-2
    return model


def latents(count: int, size: int = 2) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"latents": torch.randn(size, 4, 8, 8, generator=generator)} for _ in range(count)]


def fit(model, batches, tmp_path, validation=None, **options) -> pl.Trainer:
    torch.manual_seed(0)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False, num_sanity_val_steps=0, **quiet | options
    )
    aside = torch.Generator()  # loaders draw a number each time they are walked
    given = [b for b in (batches, validation) if b is not None]
    loaders = [torch.utils.data.DataLoader(b, batch_size=None, generator=aside) for b in given]
    trainer.fit(model, *loaders)
    return trainer


# ---- closed forms ----


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_min_snr_weighs_every_parameterization_alike(parameterization):
    """Whatever the network predicts, an error in x0 must count min(SNR, gamma) times its square."""
    a = torch.tensor(np.cumprod(1 - make_beta_schedule("linear", 1000, 0.00085, 0.012)))
    weights = min_snr_weights(a, 5.0, parameterization).double()
    snr = a / (1 - a)
    # the square of what a unit error in x0 makes of the prediction: eps = (x - sqrt(a) x0) / sqrt(1 - a), and
    # v = (sqrt(a) x - x0) / sqrt(1 - a)
    squared = {"eps": snr, "x0": torch.ones_like(a), "v": 1 / (1 - a)}[parameterization]
    torch.testing.assert_close(weights * squared, snr.clamp(max=5.0), rtol=1e-5, atol=1e-9)
    with pytest.raises(ValueError, match="min_snr_gamma must be above 0"):
        min_snr_weights(a, 0.0, parameterization)


def test_min_snr_weighs_the_loss_but_not_its_plain_part():
    x, t, noise = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.randn(2, 4, 8, 8)
    plain, weighted = point(), point(min_snr_gamma=5.0)
    _, before = plain.p_losses(x, None, t, noise)
    loss, parts = weighted.p_losses(x, None, t, noise)
    assert torch.equal(parts["train/loss_simple"], before["train/loss_simple"])
    errors = [plain.p_losses(x[i : i + 1], None, t[i : i + 1], noise[i : i + 1])[0] for i in range(2)]
    torch.testing.assert_close(loss, (torch.stack(errors) * weighted.min_snr_weights[t]).mean())


def test_zero_terminal_snr():
    betas = make_beta_schedule("linear", 1000, 0.00085, 0.012)
    rescaled = rescale_zero_terminal_snr(betas)
    buffers = schedule_buffers(rescaled)
    assert buffers["alphas_cumprod"][-1] == 0.0 and rescaled[0] == pytest.approx(betas[0], rel=1e-9)
    assert all(torch.isfinite(value).all() for value in buffers.values())
    roots = buffers["sqrt_alphas_cumprod"].double()  # a straight line of the old ones
    old = torch.tensor(np.sqrt(np.cumprod(1 - betas)))
    torch.testing.assert_close(roots, (old - old[-1]) * old[0] / (old[0] - old[-1]), rtol=0, atol=1e-6)


def test_zero_terminal_snr_in_a_model():
    model = point(parameterization="v", rescale_betas_zero_snr=True, timesteps=50, min_snr_gamma=5.0)
    assert all(torch.isfinite(buffer).all() for buffer in model.buffers())
    assert torch.isfinite(model.p_losses(torch.randn(1, 4, 8, 8), None, torch.tensor([49]))[0])
    assert torch.isfinite(model.sample(batch_size=1, verbose=False)).all()
    assert torch.isfinite(DPMSolverSampler(model).sample(5, 1, (4, 8, 8), verbose=False)[0]).all()
    with pytest.raises(ValueError, match="rescale_betas_zero_snr needs parameterization v or x0"):
        point(rescale_betas_zero_snr=True)


def test_noise_offset_is_shared_within_a_channel():
    torch.manual_seed(0)
    x = torch.zeros(20_000, 2, 2, 2)
    noise = point(noise_offset=0.5).training_noise(x).flatten(1)  # (N, 8)
    expected = torch.block_diag(*[torch.full((4, 4), 0.25)] * 2) + torch.eye(8)
    torch.testing.assert_close(noise.T.cov(), expected, rtol=0, atol=0.05)
    torch.manual_seed(3)
    plain = point().training_noise(x)
    torch.manual_seed(3)
    assert torch.equal(plain, torch.randn_like(x))


# ---- dropped conditions ----


def test_captions_and_labels_are_dropped_at_their_rates():
    torch.manual_seed(0)
    dropout = ConditionDropout({"caption": {"p": 0.25, "val": "nothing"}, "class_label": {"p": 0.5, "val": 10}})
    given = {"caption": ["a"] * 4000, "class_label": torch.zeros(4000, dtype=torch.long)}
    dropped = dropout(given, DistributedRNG())
    assert dropped["caption"].count("nothing") / 4000 == pytest.approx(0.25, abs=0.02)
    assert dropped["class_label"].eq(10).float().mean() == pytest.approx(0.5, abs=0.03)
    assert set(given["caption"]) == {"a"} and set(dropped["caption"]) == {"a", "nothing"}
    torch.manual_seed(0)
    assert dropout(given, DistributedRNG())["caption"] == dropped["caption"]
    with pytest.raises(ValueError, match="drops 'caption', but batches hold image"):
        dropout({"image": [1]}, DistributedRNG())


@pytest.mark.parametrize("settings", [{"caption": 0.1}, {"caption": {"p": 1.5}}, {"caption": {"p": 0.1, "value": ""}}])
def test_wrong_dropout_is_named(settings):
    with pytest.raises(ValueError, match="ucg_training.caption"):
        ConditionDropout(settings)


def test_cached_contexts_are_dropped_to_the_encoding(monkeypatch):
    model = build(ucg_training={"txt": {"p": 0.5, "val": "a"}})
    empty = model.get_learned_conditioning(["a"])
    monkeypatch.setattr(model, "get_learned_conditioning", lambda c, n=[]: n.append(1) or (empty, None)[len(n) > 1])
    torch.manual_seed(0)
    cached = {"moments": torch.randn(8, 8, 16, 16), "context": torch.zeros(8, 12, 24)}
    for _ in range(2):  # encoded once
        rows = model.drop_conditions(cached)["context"]
        is_empty = torch.tensor([torch.equal(row, empty[0]) for row in rows])
        assert 0 < is_empty.sum() < 8 and rows[~is_empty].eq(0).all()


# ---- batches from a cache ----


def test_cached_batches_are_the_same_as_their_images():
    model = build()
    images = batch()
    posterior = model.encode_first_stage(images["jpg"].movedim(-1, 1))
    context = model.get_learned_conditioning(images["txt"])
    torch.manual_seed(4)
    z, c = model.get_input(images, "jpg")
    torch.manual_seed(4)
    cached_z, cached_c = model.get_input({"moments": posterior.parameters, "context": context}, "jpg")
    torch.testing.assert_close((cached_z, cached_c), (z, c))
    with pytest.raises(ValueError, match="cond_stage_trainable would change its encoder"):
        build(cond_stage_trainable=True).get_input({"moments": posterior.parameters, "context": context}, "jpg")
    with pytest.raises(ValueError, match="batches have no 'jpg', only caption, png"):
        model.get_input({"png": 1, "caption": ["a"]}, "jpg")


# ---- noisy conditions ----


def test_conditions_noised_over_a_short_schedule():
    model = build(num_timesteps_cond=5)
    assert model.cond_ids[:6].tolist() == [0, 250, 500, 749, 999, 999] and model.cond_ids[-1] == 999
    assert "cond_ids" not in model.state_dict()
    c, t = torch.ones(2, 12, 24), torch.tensor([0, 800])
    torch.manual_seed(0)
    noisy = model.condition_at(c, t)
    torch.manual_seed(0)
    assert torch.equal(noisy, model.q_sample(c, torch.tensor([0, 999]), torch.randn_like(c)))
    assert (noisy[0] - 1).abs().max() < 0.2 < (noisy[1] - 1).abs().max()
    assert torch.isfinite(model.shared_step(batch())[0])
    with pytest.raises(ValueError, match="not 'hybrid'"):
        build(num_timesteps_cond=5, conditioning_key="hybrid")


# ---- under a trainer ----


@pytest.mark.parametrize("every, updates", [(False, 2), (True, 6)])
def test_averages_count_optimizer_steps(tmp_path, every, updates):
    model = point(use_ema=True, ema_every_micro_batch=every)
    fit(model, latents(6), tmp_path, accumulate_grad_batches=3, max_epochs=1)
    assert model.model_ema.num_updates == updates


def test_a_continued_run_does_not_count_its_first_batch(tmp_path):
    model = point(use_ema=True)
    path = tmp_path / "a.ckpt"
    fit(model, latents(4), tmp_path, accumulate_grad_batches=2, max_epochs=1).save_checkpoint(path)
    again = point(use_ema=True)
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(again, torch.utils.data.DataLoader(latents(4), batch_size=None), ckpt_path=path)
    assert again.model_ema.num_updates == 4


def test_averages_of_the_text_encoder():
    model = build(use_ema=True, cond_stage_trainable=True, ema_cond_stage=True)
    assert any(key.startswith("cond_stage_ema.") for key in model.state_dict())
    weight = model.cond_stage_model.transformer.text_model.final_layer_norm.weight
    weight.data.add_(1.0)
    with model.ema_scope():
        assert weight.eq(1.0).all()
    assert weight.eq(2.0).all()
    with pytest.raises(ValueError, match="ema_cond_stage needs use_ema"):
        build(use_ema=True, ema_cond_stage=True)


def test_loss_that_is_not_finite_stops_before_the_step(tmp_path):
    data = latents(3)
    data[2]["latents"][0, 0, 0, 0] = float("nan")
    model = point()
    message = "loss is not finite at step 2: train/loss_simple = nan, .*; try a lower learning rate"
    with pytest.raises(FloatingPointError, match=message):
        fit(model, data, tmp_path, max_epochs=1)
    assert torch.isfinite(model.model.diffusion_model.weight).all()


def test_validation_is_the_same_every_time_and_disturbs_nothing(tmp_path):
    class Watch(pl.Callback):
        seen: list = []

        def on_validation_epoch_end(self, trainer, model):
            self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name})

    watch = Watch()
    options = {"max_epochs": 2, "accumulate_grad_batches": 4, "callbacks": [watch]}
    model = point(use_ema=True)
    model.learning_rate = 0.0
    fit(model, latents(2), tmp_path, latents(8, size=4), **options)
    trained = point()
    fit(trained, latents(2), tmp_path, latents(8, size=4), max_epochs=2)
    alone = point()
    fit(alone, latents(2), tmp_path, max_epochs=2)
    assert torch.equal(trained.model.diffusion_model.weight, alone.model.diffusion_model.weight)

    first, second = ({k: v for k, v in seen.items() if "_t" not in k} for seen in watch.seen)
    assert first == second and first["val/loss_simple"] == first["val/loss_simple_ema"]


def test_validation_loss_by_timestep(tmp_path):
    model = point(use_ema=True)
    trainer = fit(model, latents(1), tmp_path, latents(20, size=8), max_epochs=1)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/loss_simple_t")}
    assert sorted(k for k in logged if not k.endswith("_ema")) == [f"val/loss_simple_t{i}00-{i}99" for i in range(10)]
    assert len(logged) == 20
    # the network sees mostly noise late, and is nearly told to copy it
    assert logged["val/loss_simple_t900-999"] != logged["val/loss_simple_t000-099"]


def test_buckets_are_means_over_batches_and_processes():
    buckets = TimestepBuckets(1000)
    for t, error in ((0, 1.0), (99, 3.0), (999, 5.0)):
        buckets.add("", torch.tensor([t]), torch.tensor([error]))
    assert buckets.means(lambda totals: 2 * totals) == {"t000-099": 2.0, "t900-999": 5.0}
    assert buckets.means(lambda totals: totals) == {}
    assert TimestepBuckets(4).count == 4


# ---- what is trained, and by what ----


def test_train_only():
    model = build(train_only=["model.*.attn2.*"], use_ema=True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("attn2" in name for name in trained)
    assert len(model.trainable_parameters()) == len(trained)
    assert set(build(use_ema=True).state_dict()) == set(model.state_dict())  # averages of all, as published
    with pytest.raises(ValueError, match=r"called 'model\.\*attn3\*'; similar names: model\..*attn"):
        build(train_only=["model.*attn3*"])
    with pytest.raises(ValueError, match="no trained parameter is called 'cond_stage_model"):
        build(train_only=["cond_stage_model.*"])
    assert build(train_only="cond_stage_model.*", cond_stage_trainable=True).trainable_parameters()


def test_optimizer_of_the_config():
    model = point(optimizer_config={"target": "torch.optim.SGD", "params": {"momentum": 0.9}})
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9
    assert optimizer.defaults["lr"] == model.learning_rate
    assert isinstance(point().configure_optimizers(), torch.optim.AdamW)
    with pytest.raises(ValueError, match="leave out params.lr"):
        point(optimizer_config={"target": "torch.optim.SGD", "params": {"lr": 1.0}}).configure_optimizers()
    model = point(learn_logvar=True)
    assert model.trainable_parameters()[-1] is model.logvar


def test_scale_is_measured_in_the_first_batch(tmp_path):
    data = [{"latents": 3.0 * item["latents"]} for item in latents(2, size=16)]
    model = point(scale_by_std=True)
    fit(model, data, tmp_path, max_epochs=1)
    assert model.scale_factor.item() == pytest.approx(1 / data[0]["latents"].std().item(), rel=1e-6)


def test_pixels_train_as_well(tmp_path):
    model = DDPM({"target": f"{__name__}.Point", "params": {"channels": 3}}, timesteps=20, image_size=8)
    model.learning_rate = 1e-2
    before = model.model.diffusion_model.weight.detach().clone()
    fit(model, [{"image": torch.randn(2, 8, 8, 3)}] * 2, tmp_path, max_epochs=1)
    assert not torch.equal(model.model.diffusion_model.weight, before)


# ---- several processes ----


def test_ranks_generate_the_rows_of_the_global_batch():
    def rank_draws(rank: int, world: int, count: int):
        torch.manual_seed(5)
        draws = DistributedRNG(rank, world)
        x = torch.zeros(count, 3, 4, 4)
        return draws.randn_like(x), draws.timesteps(count, 1000, x.device), draws.bernoulli(count, 0.5)

    whole = rank_draws(0, 1, 6)
    for rank in range(2):
        for part, all_rows in zip(rank_draws(rank, 2, 3), whole):
            assert torch.equal(part, all_rows[rank::2])


def test_two_processes_have_the_loss_of_one():
    """Every random number of a step: posterior, timesteps, noise and its offset, dropped and noised conditions."""
    settings = {"noise_offset": 0.1, "ucg_training": {"txt": {"p": 0.5, "val": "a"}}, "num_timesteps_cond": 3}
    model = build(**settings)
    whole = batch() | {"txt": ["a red circle", "a blue square"]}
    whole = {
        key: torch.cat([value] * 2) if isinstance(value, torch.Tensor) else value * 2 for key, value in whole.items()
    }

    def loss(rank: int, world: int) -> float:
        model._trainer = SimpleNamespace(global_rank=rank, world_size=world)
        torch.manual_seed(7)
        rows = {key: value[rank::world] for key, value in whole.items()}
        return model.shared_step(model.drop_conditions(rows))[0].item()

    try:
        one, two = loss(0, 1), (loss(0, 2) + loss(1, 2)) / 2
    finally:
        model._trainer = None
    assert two == pytest.approx(one, rel=1e-5)


def test_seeded_restores_the_generator():
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    with seeded(5, torch.device("cpu")):
        inside = torch.randn(2)
    assert torch.equal(torch.randn(3), expected)
    with seeded(5, torch.device("cpu")):
        assert torch.equal(torch.randn(2), inside)


def test_tiny_config_is_public():
    """Without the additions a model generates and computes the same numbers as the public one."""
    torch.manual_seed(0)
    model = instantiate_from_config(tiny_config())
    x, c = torch.randn(2, 4, 16, 16), torch.randn(2, 12, 24)
    torch.manual_seed(1)
    loss, _ = model(x, c)
    torch.manual_seed(1)
    t = torch.randint(0, 1000, (2,))
    assert torch.equal(loss, model.p_losses(x, c, t, torch.randn_like(x))[0])
