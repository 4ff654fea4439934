"""The small LatentDiffusion and the first stages against the goldens: buffers, formulas, losses, averages."""

from __future__ import annotations

import pytest
import torch

from ldm.lr_scheduler import LambdaLinearScheduler, LambdaWarmUpCosineScheduler, LambdaWarmUpCosineScheduler2
from ldm.models.autoencoder import AutoencoderKL, VQModel, VQModelInterface
from ldm.modules.ema import LitEma
from tests.golden import assert_agrees, filled, golden_configs, goldens, latent_diffusion, tensor

G = goldens("diffusion")
CONFIG = golden_configs("diffusion")
NO_LOSS = {"target": "torch.nn.Identity"}


@pytest.fixture(scope="module")
def model():
    return latent_diffusion(CONFIG["model"])


@pytest.fixture(scope="module")
def inputs():
    return {
        "c": tensor("c", 2, 5, 24),
        "x_T": tensor("x_T", 2, 4, 16, 16),
        "x0": tensor("x0", 2, 4, 16, 16),
    }


def image(batch: int) -> torch.Tensor:
    return tensor("img", batch, 3, 32, 32).clamp(-1, 1)


@pytest.mark.parametrize("name", [key.removeprefix("buffer.") for key in G if key.startswith("buffer.")])
def test_buffers(model, name):
    buffer = getattr(model, name)
    assert buffer.dtype == torch.float32
    assert_agrees(buffer, G[f"buffer.{name}"], 1e-6)


def test_apply_model(model, inputs):
    with torch.no_grad():
        out = model.apply_model(inputs["x_T"], torch.tensor([500, 20]), inputs["c"])
    assert_agrees(out, G["apply_model"])


def test_first_stage_round_trip(model, inputs):
    assert_agrees(model.decode_first_stage(inputs["x_T"]), G["decode_first_stage"])
    posterior = model.encode_first_stage(image(1))
    assert_agrees(posterior.mean, G["encode.mean"])
    torch.manual_seed(1)
    assert_agrees(model.get_first_stage_encoding(posterior), G["get_first_stage_encoding"])


def test_q_sample(model, inputs):
    x = model.q_sample(inputs["x0"], torch.tensor([10, 900]), noise=inputs["x_T"])
    assert_agrees(x, G["q_sample"])


def test_p_mean_variance(model, inputs):
    with torch.no_grad():
        mean, _, log_variance = model.p_mean_variance(inputs["x_T"], [inputs["c"]], torch.tensor([700, 3]), False)
    assert_agrees(mean, G["p_mean_variance.mean"])
    assert_agrees(log_variance, G["p_mean_variance.log_variance"])


SETTINGS = {
    "eps_l2": {},
    "eps_l1": {"loss_type": "l1"},
    "x0_l2": {"parameterization": "x0"},
    "logvar": {"learn_logvar": True, "logvar_init": 0.5},
    "elbo": {"original_elbo_weight": 0.01, "l_simple_weight": 0.9, "v_posterior": 0.2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_loss_and_gradient(inputs, name):
    model = latent_diffusion(CONFIG["model"], **SETTINGS[name]).train()
    loss, parts = model.p_losses(inputs["x0"], inputs["c"], torch.tensor([10, 900]), noise=inputs["x_T"])
    assert_agrees(loss, G[f"train.{name}.loss"])
    expected = {key.removeprefix(f"train.{name}.") for key in G if key.startswith(f"train.{name}.")}
    assert set(parts) == expected - {"loss", "grad_norm"}
    for part, value in parts.items():
        assert_agrees(value, G[f"train.{name}.{part}"])
    loss.backward()
    gradients = [p.grad.flatten() for p in model.model.diffusion_model.parameters() if p.grad is not None]
    assert_agrees(torch.cat(gradients).double().norm(), G[f"train.{name}.grad_norm"])


def test_v_formulas_and_loss(inputs):
    golden = goldens("sd2")
    model = latent_diffusion(golden_configs("sd2")["v_train"]["params"]).train()
    t = torch.tensor([10, 900])
    x, noise = inputs["x0"], inputs["x_T"]
    assert_agrees(model.get_v(x, noise, t), golden["v.get_v"])
    assert_agrees(model.predict_start_from_z_and_v(x, t, noise), golden["v.predict_start"])
    assert_agrees(model.predict_eps_from_z_and_v(x, t, noise), golden["v.predict_eps"])
    loss, _ = model.p_losses(x, inputs["c"], t, noise=noise)
    assert_agrees(loss, golden["v.train.loss"])
    assert_agrees(model.lvlb_weights, golden["v.train.lvlb"])


def test_ema():
    net = filled(torch.nn.Linear(3, 2))
    ema = LitEma(net, decay=0.9)
    for i in range(5):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.1 * (i + 1)
        ema(net)
    assert sorted(ema.state_dict()) == sorted(G["ema.keys"])
    trained = net.weight.clone()
    ema.swap(net)
    assert_agrees(net.weight, G["ema.weight"])
    assert_agrees(net.bias, G["ema.bias"])
    ema.swap(net)
    assert torch.equal(net.weight, trained)


def test_ema_copies_and_restores():
    net = filled(torch.nn.Linear(3, 2))
    ema = LitEma(net, decay=0.5, use_num_upates=False)
    start = net.weight.detach().clone()
    with torch.no_grad():
        net.weight += 1.0
    ema(net)
    ema.store(net.parameters())
    ema.copy_to(net)
    torch.testing.assert_close(net.weight, start + 0.5)  # half way, by the constant decay
    ema.restore(net.parameters())
    torch.testing.assert_close(net.weight, start + 1.0)
    with pytest.raises(ValueError, match="restore got 1 parameters"):
        ema.restore([net.weight])


CYCLES = {
    "warm_up_steps": [100, 10],
    "f_min": [0.1, 0.05],
    "f_max": [1.0, 0.5],
    "f_start": [1e-6, 0.01],
    "cycle_lengths": [1000, 100000],
}
ONE_CYCLE = {"warm_up_steps": 100, "lr_min": 0.01, "lr_max": 1.0, "lr_start": 1e-4, "max_decay_steps": 2000}
SCHEDULES = {
    "linear": LambdaLinearScheduler(**CYCLES),
    "cosine2": LambdaWarmUpCosineScheduler2(**CYCLES),
    "cosine": LambdaWarmUpCosineScheduler(**ONE_CYCLE),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates(name):
    assert_agrees([SCHEDULES[name].schedule(int(n)) for n in G["lr.steps"]], G[f"lr.{name}"], 1e-9)
    assert SCHEDULES[name](10**9) == pytest.approx(SCHEDULES[name](10**8))  # stays put past its end


def test_kl_first_stage():
    model = filled(AutoencoderKL(CONFIG["kl"], NO_LOSS, embed_dim=4))
    with torch.no_grad():
        posterior = model.encode(image(2))
        for name in ("mean", "logvar"):
            assert_agrees(getattr(posterior, name), G[f"kl.{name}"])
        assert_agrees(posterior.kl(), G["kl.kl"])
        assert_agrees(posterior.nll(posterior.mode()), G["kl.nll"])
        torch.manual_seed(4)
        sample = posterior.sample()
        assert_agrees(sample, G["kl.sample"])
        assert_agrees(model.decode(posterior.mode()), G["kl.rec"])


def test_vq_first_stage():
    arguments = {"ddconfig": CONFIG["vq"], "lossconfig": NO_LOSS, "n_embed": 64, "embed_dim": 3}
    model, interface = filled(VQModel(**arguments)), filled(VQModelInterface(**arguments))
    with torch.no_grad():
        quant, loss, (_, _, indices) = model.encode(image(2))
        assert_agrees(quant, G["vq.quant"])
        assert_agrees(loss, G["vq.loss"])
        assert indices.tolist() == G["vq.indices"].tolist()
        assert_agrees(model.encode_to_prequant(image(2)), G["vq.prequant"])
        assert_agrees(model(image(2))[0], G["vq.rec"])
        h = interface.encode(image(2))
        assert_agrees(h, G["vqi.encode"])
        assert_agrees(interface.decode(h), G["vqi.decode"])
        assert_agrees(interface.decode(h, force_not_quantize=True), G["vqi.decode_nq"])
