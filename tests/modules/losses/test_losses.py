"""The losses of first stages against the goldens, and what their options do."""

from __future__ import annotations

import copy

import pytest
import torch

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import LPIPSWithDiscriminator, ReconstructionLoss, VQLPIPSWithDiscriminator
from ldm.modules.losses.adversarial import NLayerDiscriminator, vanilla_d_loss
from ldm.modules.losses.lpips import LPIPS, VGG16, VGG_WIDTHS
from ldm.modules.losses.vqperceptual import measure_perplexity
from ldm.util import get_obj_from_str, instantiate_from_config
from tests.golden import assert_agrees, goldens, tensor
from tests.reference.fill import fill, values

G = goldens("losses")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """LPIPS's two files as they are published, with filled values under the names they have in a loss."""
    folder = tmp_path_factory.mktemp("lpips")
    prefix = "loss.perceptual_loss."
    with torch.device("meta"):
        shapes = {f"net.{name}": tuple(value.shape) for name, value in VGG16().state_dict().items()}
    vgg = {
        f"features.{name.split('.', 2)[2]}": torch.from_numpy(values(prefix + name, shape))
        for name, shape in shapes.items()
    }
    lin = {
        name: torch.from_numpy(values(prefix + name, (1, widths[-1], 1, 1)))
        for i, widths in enumerate(VGG_WIDTHS)
        for name in (f"lin{i}.model.1.weight",)
    }
    torch.save(vgg | {"classifier.0.weight": torch.zeros(2, 2)}, folder / "vgg16.pth")
    torch.save(lin, folder / "lin.pth")
    return {"vgg_path": str(folder / "vgg16.pth"), "lpips_path": str(folder / "lin.pth")}


@pytest.fixture(scope="module")
def inputs() -> dict:
    """The pictures of the goldens, the layer that makes reconstructions, and the posterior."""
    last = torch.nn.Conv2d(3, 3, 3, padding=1)
    fill({f"last.{key}": value for key, value in last.state_dict().items()})
    return {
        "x": tensor("loss.x", 2, 3, 64, 64).clamp(-1, 1),
        "y": tensor("loss.y", 2, 3, 64, 64).clamp(-1, 1),
        "last": last,
        "posterior": DiagonalGaussianDistribution(tensor("loss.post", 2, 8, 8, 8)),
    }


def loss_of(kind: str, files: dict[str, str]) -> torch.nn.Module:
    if kind == "kl":
        loss = LPIPSWithDiscriminator(10, kl_weight=1e-6, disc_weight=0.5, logvar_init=0.1, **files)
    else:
        loss = VQLPIPSWithDiscriminator(
            10, codebook_weight=1.0, disc_weight=0.75, disc_num_layers=2, n_classes=64, **files
        )
    # LPIPS is filled already, and large
    fill({f"loss.{key}": value for key, value in loss.state_dict().items() if not key.startswith("perceptual_loss")})
    return loss.eval()


def call(kind: str, loss: torch.nn.Module, inputs: dict, optimizer_idx: int, step: int, split: str = "train"):
    last, x = inputs["last"], inputs["x"]
    y = last(inputs["y"])
    if kind == "kl":
        return loss(x, y, inputs["posterior"], optimizer_idx, step, last_layer=last.weight, split=split)
    indices = torch.arange(128) % 64
    codebook = torch.tensor(0.3)
    return loss(codebook, x, y, optimizer_idx, step, last_layer=last.weight, split=split, predicted_indices=indices)


@pytest.fixture(scope="module", params=["kl", "vq"])
def built(request, files) -> tuple[str, torch.nn.Module]:
    return request.param, loss_of(request.param, files)


@pytest.mark.parametrize("step", [0, 20])
def test_goldens(built, inputs, step):
    kind, loss = built
    for idx in (0, 1):
        prefix = f"{kind}.step{step}.opt{idx}."
        total, parts = call(kind, loss, inputs, idx, step)
        assert_agrees(total, G[f"{prefix}loss"], 1e-5)
        assert {f"{prefix}{name}" for name in parts} == {k for k in G if k.startswith(f"{prefix}train/")}
        for name, value in parts.items():
            assert_agrees(value, G[prefix + name], 1e-5)


def test_published_names(built):
    kind, loss = built
    assert sorted(loss.state_dict()) == sorted(G[f"{kind}.keys"])


def test_lpips(built, inputs):
    lpips = built[1].perceptual_loss
    with torch.no_grad():
        assert_agrees(lpips(inputs["x"], inputs["y"]), G["lpips"], 1e-5)
        assert lpips(inputs["x"], inputs["x"]).abs().max() == 0
    assert not any(p.requires_grad for p in lpips.parameters())
    assert not copy.deepcopy(lpips).train().training


def test_lpips_needs_the_published_weights(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(
        FileNotFoundError, match=r"vgg16-397923af.pth.*download.pytorch.org.*vgg_path.*perceptual_weight: 0"
    ):
        LPIPSWithDiscriminator(disc_start=0)
    with pytest.raises(FileNotFoundError, match=r"taming/modules/autoencoder/lpips/vgg.pth or .*hub.*lpips_path"):
        LPIPSWithDiscriminator(disc_start=0, vgg_path=files["vgg_path"])
    with pytest.raises(ValueError, match=r"lin.pth does not hold the published weights of LPIPS: 26 of 26"):
        LPIPS(files["lpips_path"], files["lpips_path"])
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "hub/checkpoints/vgg16-397923af.pth").symlink_to(files["vgg_path"])
    (tmp_path / "taming/modules/autoencoder/lpips").mkdir(parents=True)
    (tmp_path / "taming/modules/autoencoder/lpips/vgg.pth").symlink_to(files["lpips_path"])
    assert not any(value.is_meta for value in LPIPS().state_dict().values())


def small(target: str = "ldm.modules.losses.LPIPSWithDiscriminator", **params) -> torch.nn.Module:
    defaults = {"disc_start": 10, "perceptual_weight": 0.0, "disc_num_layers": 1, "disc_ndf": 8}
    return instantiate_from_config({"target": target, "params": {**defaults, **params}})


def test_without_perceptual_weight_and_discriminator(inputs):
    loss = small(perceptual_weight=0, disc_factor=0.0, kl_weight=0.0, pixel_loss="l2", pixelloss_weight=3.0)
    assert list(loss.state_dict()) == ["logvar"]
    total, parts = loss(inputs["x"], inputs["y"], inputs["posterior"], 0, 20)
    torch.testing.assert_close(total, 3 * (inputs["x"] - inputs["y"]).square().sum() / 2)
    assert parts["train/g_loss"] == 0 and parts["train/d_weight"] == 0
    with pytest.raises(ValueError, match="disc_factor is 0"):
        loss(inputs["x"], inputs["y"], inputs["posterior"], 1, 20)


def test_balance_of_the_gradients(inputs):
    """From disc_start on both sides pull at the last layer alike, in the proportion disc_weight."""
    loss = small("ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", disc_weight=0.5, codebook_weight=0.0)
    with torch.no_grad():
        loss.discriminator.main[-1].weight.mul_(100)  # gradients far above the 1e-4 that guards the division
    last = copy.deepcopy(inputs["last"])
    gradients = {}
    for step in (9, 10):
        y = last(inputs["y"])
        total, parts = loss(torch.tensor(0.0), inputs["x"], y, 0, step, last_layer=last.weight)
        (gradients[step],) = torch.autograd.grad(total, last.weight)
        assert parts["train/disc_factor"] == (step == 10)
    assert (gradients[10] - gradients[9]).norm() / gradients[9].norm() == pytest.approx(0.5, rel=1e-3)


def test_validation_needs_no_gradients(inputs):
    loss = small()
    with torch.no_grad():
        for idx in (0, 1):
            total, parts = loss(
                inputs["x"], inputs["y"], inputs["posterior"], idx, 20, inputs["last"].weight, split="val"
            )
            assert total.isfinite() and all(name.startswith("val/") for name in parts)


def test_discriminator_learns_without_touching_the_generator(inputs):
    y = inputs["last"](inputs["y"])
    loss = small(disc_loss="vanilla")
    total, _ = loss(inputs["x"], y, inputs["posterior"], 1, 20)
    total.backward()
    assert inputs["last"].weight.grad is None
    assert all(p.grad.abs().sum() > 0 for p in loss.discriminator.parameters())
    zero = torch.zeros(3)
    torch.testing.assert_close(vanilla_d_loss(zero, zero), torch.tensor(2.0).log())


def test_discriminator_sees_its_condition(inputs):
    loss = small(disc_conditional=True, disc_in_channels=5)
    cond = torch.zeros(2, 2, 64, 64)
    assert loss(inputs["x"], inputs["y"], inputs["posterior"], 1, 20, cond=cond)[0].isfinite()
    with pytest.raises(ValueError, match="disc_conditional is True, but cond is NoneType"):
        loss(inputs["x"], inputs["y"], inputs["posterior"], 1, 20)


def test_patches():
    """Three layers: a logit sees 70 pixels, and there are as many as fit at a stride of 8."""
    net = NLayerDiscriminator(ndf=4).eval()
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = net(x)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    rows = x.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def test_perplexity():
    assert measure_perplexity(torch.tensor([[3, 3], [3, 3]]), 8) == (pytest.approx(1.0), 1)
    assert measure_perplexity(torch.arange(8), 8) == (pytest.approx(8.0), 8)


def test_reconstruction_loss():
    """Closed form: errors of 0.5 on one pixel in four, which is the only one unlike the corner."""
    x = torch.zeros(2, 3, 2, 2)
    x[:, 1, 1, 1] = 0.2
    y = x.clone()
    y[:, :, 1, 1] += 0.5
    posterior = DiagonalGaussianDistribution(torch.cat([torch.full((2, 4, 1, 1), 3.0), torch.zeros(2, 4, 1, 1)], dim=1))
    total, parts = ReconstructionLoss(kl_weight=0.1, foreground_weight=3.0)(x, y, posterior)
    assert parts["train/rec_loss"] == pytest.approx(0.75 / 4)
    assert parts["train/nll_loss"] == pytest.approx(0.75)
    assert parts["train/kl_loss"] == pytest.approx(4 * 9 / 2)
    assert total == pytest.approx(0.75 + 0.1 * 18)
    assert ReconstructionLoss(0.0, l1_weight=0.0, l2_weight=2.0)(x, y, posterior)[0] == pytest.approx(2 * 0.25 / 4)


MISTAKES = [
    ({"disc_loss": "wgan"}, "'wgan' is not one of hinge, vanilla"),
    ({"pixel_loss": "l3"}, "'l3' is not one of l1, l2"),
    ({"use_actnorm": True}, "use_actnorm is not supported"),
    ({"disc_strat": 3}, "does not fit.*disc_strat"),
]


@pytest.mark.parametrize("params, message", MISTAKES)
def test_mistakes_are_named(params, message):
    with pytest.raises(ValueError, match=message):
        small(**params)


def test_only_lpips_is_a_perceptual_loss():
    with pytest.raises(ValueError, match="perceptual_loss 'clips' is not supported"):
        VQLPIPSWithDiscriminator(0, perceptual_loss="clips", perceptual_weight=0.0)


def test_public_paths():
    taming = "taming.modules.losses"
    assert get_obj_from_str("ldm.modules.losses.contperceptual.LPIPSWithDiscriminator") is LPIPSWithDiscriminator
    assert get_obj_from_str(f"{taming}.vqperceptual.VQLPIPSWithDiscriminator") is VQLPIPSWithDiscriminator
    assert get_obj_from_str(f"{taming}.lpips.LPIPS") is LPIPS
    assert get_obj_from_str("taming.modules.discriminator.model.NLayerDiscriminator") is NLayerDiscriminator
    for dummy in (
        f"{taming}.DummyLoss",
        f"{taming}.vqperceptual.DummyLoss",
        "ldm.modules.losses.contperceptual.DummyLoss",
    ):
        assert not list(instantiate_from_config({"target": dummy}).parameters())


def test_published_helpers():
    from ldm.modules.losses import contperceptual, vqperceptual

    assert [contperceptual.adopt_weight(2.0, step, threshold=3) for step in (2, 3)] == [0.0, 2.0]
    assert vqperceptual.adopt_weight(2.0, 2, threshold=3, value=0.5) == 0.5
    x, y = torch.rand(2, 3), torch.rand(2, 3)
    assert torch.equal(vqperceptual.l1(x, y), (x - y).abs()) and torch.equal(vqperceptual.l2(x, y), (x - y) ** 2)
    for module in (contperceptual, vqperceptual):
        assert {"LPIPS", "NLayerDiscriminator", "hinge_d_loss", "vanilla_d_loss", "weights_init"} <= set(module.__all__)


def test_an_overridden_adaptive_weight_is_used():
    class Fixed(LPIPSWithDiscriminator):
        def calculate_adaptive_weight(self, nll_loss, g_loss, last_layer=None):
            return torch.tensor(3.0)

    loss = Fixed(disc_start=0, perceptual_weight=0.0, disc_ndf=8, disc_num_layers=1)
    x, y = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16, requires_grad=True)
    posterior = DiagonalGaussianDistribution(torch.zeros(1, 8, 2, 2))
    _, parts = loss(x, y, posterior, 0, 0)
    assert parts["train/d_weight"] == 3.0
