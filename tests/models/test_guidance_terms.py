"""What guides beside a scale, against other libraries, numpy and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.guidance import TERMS, ConditionalModel, Guidance, ModelOutputs, identity_self_attention
from ldm.models.diffusion.samplers import SAMPLERS, make_sampler
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock
from ldm.modules.diffusionmodules.schedule import eps_and_x0, make_beta_schedule
from ldm.util import instantiate_from_config
from tests import witness
from tests.golden import assert_agrees, filled, tensor
from tests.tiny import tiny_config
from tests.unprompted import toy

V1 = np.cumprod(1 - make_beta_schedule("linear", 1000, 0.00085, 0.012))
CFG_PP = ("ddim", "euler", "euler_a", "dpmpp_2m", "dpmpp_2s", "dpmpp_3m", "dpmpp_2m_sde")


# ---- terms ----


def model_outputs(kind: str = "eps", a: float = 0.3) -> ModelOutputs:
    """Outputs of a model that are fixed."""
    x, cond, uncond, identity = (tensor(name, 2, 4, 8, 8) for name in ("x_T", "x0", "z", "noise"))
    network = ConditionalModel(lambda x, t, c: torch.zeros_like(x), None, None, kind)
    point = ModelOutputs(network, x, torch.zeros(2), a)
    point._cache |= {"cond": cond, "uncond": uncond, "identity": identity}
    return point


@pytest.mark.parametrize("strength", [0.0, 0.7, 1.0])
def test_rescale_is_diffusers(strength):
    point = model_outputs()
    output = 7.5 * point.cond() - 6.5 * point._cache["uncond"]
    theirs = rescale_noise_cfg(output, point.cond(), guidance_rescale=strength)
    assert_agrees(TERMS["rescale"].apply(output, point, strength), theirs, 1e-6)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("share", [0.9, 0.995, 1.0])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_threshold_is_imagens_in_units_of_the_conditional_prediction(kind, share, scale):
    point = model_outputs(kind)
    output = point._cache["uncond"] + scale * (point.cond() - point._cache["uncond"])
    (_, guided), (_, own) = (eps_and_x0(y, point.x, point.alpha_bar, kind) for y in (output, point.cond()))
    _, x0 = eps_and_x0(TERMS["threshold"].apply(output, point, share), point.x, point.alpha_bar, kind)
    for i in range(2):
        unit, p = (np.quantile(np.abs(y[i].numpy()), share, method="inverted_cdf") for y in (own, guided))
        imagens = guided[i].numpy() / unit  # whose range is now from -1 to 1
        s = max(p / unit, 1.0)
        assert_agrees(x0[i] / unit, np.clip(imagens, -s, s) / s, 1e-5)


def test_pag():
    point = model_outputs()
    output = TERMS["pag"].apply(torch.zeros_like(point.x), point, 3.0)
    torch.testing.assert_close(output, 3.0 * (point.cond() - point.identity_attention()))
    with pytest.raises(ValueError, match="needs a network with a middle block"):
        ModelOutputs(ConditionalModel(lambda x, t, c: x, None), point.x, point.t, 0.5).identity_attention()


def test_corrections_come_last():
    point = model_outputs()
    point.model = ConditionalModel(lambda x, t, c: x, None, point.x)
    both = [
        Guidance(3.0, terms=terms)(point, 3.0).output
        for terms in ({"rescale": 1.0, "pag": 2.0}, [("pag", 2.0), ("rescale", 1.0)])
    ]
    assert both[0].equal(both[1])
    torch.testing.assert_close(both[0].std(dim=(1, 2, 3)), point.cond().std(dim=(1, 2, 3)))


# ---- when and how much ----


class Counting:
    """A network of zeros that counts the items it is asked about; `sigmas` lists where it was asked about two each."""

    num_timesteps, device, parameterization = 1000, torch.device("cpu"), "eps"
    alphas_cumprod = torch.from_numpy(V1)

    def __init__(self) -> None:
        self.items, self.sigmas = 0, []

    def apply_model(self, x, t, c):
        self.items += len(x)
        if len(x) == 2:
            a = V1[int(t[0])]
            self.sigmas.append(math.sqrt((1 - a) / a))
        return c.reshape(-1, 1, 1, 1) * torch.ones_like(x)

    def run(self, guidance: Guidance, steps: int = 20, guided: bool = True):
        x, uncond = torch.ones(1, 1, 2, 2), torch.zeros(1) if guided else None
        options = {"unconditional_conditioning": uncond, "guidance": guidance, "x_T": x, "verbose": False}
        return DDIMSampler(self).sample(steps, 1, (1, 2, 2), torch.ones(1), **options)[0]


def test_interval_in_sigma():
    model, low, high = Counting(), 0.5, 5.0
    model.run(Guidance(3.0, interval=(low, high)))
    sigma = np.sqrt((1 - V1) / V1)[1::50]
    inside = sigma[(low < sigma) & (sigma <= high)]
    assert 0 < len(inside) < 20 and model.items == 20 + len(inside)
    np.testing.assert_allclose(sorted(model.sigmas), inside)


def test_scales_of_a_run():
    seen = []

    class Seen(Counting):
        def apply_model(self, x, t, c):
            seen.append(int(t[0]))
            return super().apply_model(x, t, c)

    two, listed = (Counting().run(Guidance(scale), 3) for scale in ([9.0, 3.0], [9.0, 6.0, 3.0]))
    assert two.equal(listed)
    assert [Guidance([9, 3]).over(5).scale_at(i) for i in range(5)] == [9.0, 7.5, 6.0, 4.5, 3.0]
    assert Guidance([4.0, 8.0]).over(1).scale_at(0) == 4.0 and Guidance(2.0).over(7).scale == 2.0
    model = Counting()
    model.run(Guidance([1.0, 1.0, 5.0, 1.0]), 4)
    assert model.items == 5  # guidance at one of the steps


# ---- CFG++ ----


class Gaussians:
    """An ideal model of Gaussian data: conditions (B, 2) are mean and standard deviation."""

    num_timesteps, device, parameterization = 1000, torch.device("cpu"), "eps"
    alphas_cumprod = torch.from_numpy(V1)
    cond, uncond = (torch.tensor([pair] * 4, dtype=torch.float64) for pair in ((1.0, 0.5), (0.0, 0.7)))

    def apply_model(self, x, t, c):
        a = torch.from_numpy(np.exp(np.interp(t.double().numpy(), np.arange(1000), np.log(V1)))).view(-1, 1, 1, 1)
        mean, std = (c[:, i].view(-1, 1, 1, 1) for i in range(2))
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)


START = tensor("x_T", 4, 1, 4, 4).double()


def drawn(name: str, guidance: Guidance, steps: int = 12, model=None, cond=Gaussians.cond, uncond=Gaussians.uncond):
    torch.manual_seed(0)
    options = {"x_T": START, "unconditional_conditioning": uncond, "guidance": guidance, "verbose": False}
    return make_sampler(model or Gaussians(), name).sample(steps, 4, (1, 4, 4), cond, **options)[0]


@pytest.mark.parametrize("name", CFG_PP)
def test_cfg_pp_at_0_is_unconditional_exactly(name):
    guided = drawn(name, Guidance(0.0, cfg_pp=True))
    assert guided.equal(drawn(name, Guidance(), cond=Gaussians.uncond, uncond=None))
    assert not guided.equal(drawn(name, Guidance(0.5, cfg_pp=True)))


def test_cfg_pp_is_for_samplers_that_renoise_with_eps():
    assert {name for name, make in SAMPLERS.items() if make.func.cfg_pp} == {*CFG_PP, "dpm_solver", "ddpm"}
    for name in SAMPLERS.keys() - {*CFG_PP, "dpm_solver", "ddpm"}:
        with pytest.raises(ValueError, match="CFG.. works with .*euler.*, not with"):
            drawn(name, Guidance(0.5, cfg_pp=True))


@pytest.mark.parametrize("name", ["ddim", "euler"])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_cfg_pp_is_plain_guidance_with_scales_of_its_own(name, scale):
    """A step of CFG++ at lambda is one of plain guidance at lambda sigma / (sigma - sigma'), in DDIM without noise."""
    solver = make_sampler(Gaussians(), name)
    solver.make_schedule(12, verbose=False)
    sigma, after = (
        np.sqrt((1 - a) / a)
        for a in (solver.sampling_schedule.alphas_cumprod, solver.sampling_schedule.alphas_cumprod_prev)
    )
    scales = (scale * sigma / (sigma - after))[::-1].tolist()
    torch.testing.assert_close(drawn(name, Guidance(scale, cfg_pp=True)), drawn(name, Guidance(scales)))


def test_cfg_pp_at_1_ends_in_the_conditional_prediction():
    """To clean data a step goes to x0 alone, and that is the conditional one."""
    model, x = Gaussians(), START
    options = {"unconditional_conditioning": model.uncond, "x_T": x, "verbose": False, "schedule": "trailing"}
    last, _ = make_sampler(model, "euler").sample(
        1, 4, (1, 4, 4), model.cond, guidance=Guidance(1.0, cfg_pp=True), **options
    )
    _, x0 = eps_and_x0(model.apply_model(x, torch.full((4,), 999), model.cond), x, V1[-1], "eps")
    torch.testing.assert_close(last, x0)


def returned(guidance: Guidance, steps: int, model: Gaussians) -> float:
    """By how much of its length a latent differs after inversion and sampling."""
    x0 = 1.0 + 0.5 * START
    solver = DDIMSampler(model)
    solver.make_schedule(steps, verbose=False)
    options = {"unconditional_conditioning": model.uncond, "guidance": guidance, "verbose": False}
    z, _ = solver.encode(x0, model.cond, steps, schedule_timesteps=True, **options)
    return float((solver.decode(z, model.cond, steps, **options) - x0).norm() / x0.norm())


class Unmoved(Gaussians):
    """One whose answers do not depend on x, so that inversion has nothing to approximate."""

    def apply_model(self, x, t, c):
        return super().apply_model(START.repeat(len(x) // 4, 1, 1, 1), t, c)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(7.5), Guidance(0.6, cfg_pp=True), Guidance([1, 5])])
def test_inversion_is_the_steps_backwards(guidance):
    assert returned(guidance, 10, Unmoved()) < 1e-10


# Where Chung et al. find CFG++ to go as far as plain guidance: (lambda, scale).
MATCHED = [(0.2, 2.0), (0.4, 5.0), (0.6, 7.5)]


@pytest.mark.parametrize("cfg_pp, plain", MATCHED)
def test_cfg_pp_returns_from_inversion_where_plain_guidance_does_not(cfg_pp, plain):
    """In few steps. CFG++ guides more the more steps there are, which plain guidance does not."""
    model = Gaussians()
    unguided = returned(Guidance(), 10, model)  # the error of discretisation
    ours, theirs = (returned(Guidance(s, cfg_pp=p), 10, model) for s, p in ((cfg_pp, True), (plain, False)))
    assert ours < 2 * unguided < theirs and theirs > 3.5 * ours


# ---- perturbed attention ----


def middle_block(model):
    return model.model.diffusion_model.middle_block


@pytest.fixture(scope="module")
def text_model():
    return filled(instantiate_from_config(tiny_config()))


def test_perturbed_attention_is_diffusers(text_model):
    theirs = witness.unet({"model": tiny_config()}, text_model.state_dict())
    processors = theirs.attn_processors
    middle = [name for name in processors if name.startswith("mid_block") and "attn1" in name]
    theirs.set_attn_processor({**processors, **{name: PAGIdentitySelfAttnProcessor2_0() for name in middle}})
    x, t, c = tensor("x_T", 2, 4, 16, 16), torch.tensor([7, 900]), tensor("c", 2, 12, 24)
    with torch.no_grad():
        plain = text_model.apply_model(x, t, c)
        with identity_self_attention(middle_block(text_model)):
            perturbed = text_model.apply_model(x, t, c)
        # there the first half of a batch is as ever, the second perturbed
        both = theirs(torch.cat([x, x]), torch.cat([t, t]), encoder_hidden_states=torch.cat([c, c])).sample
        assert_agrees(plain, both[:2], 1e-5)
        assert_agrees(perturbed, both[2:], 1e-5)
        assert len(middle) == 1 and (perturbed - plain).abs().max() > 1e-3
        assert text_model.apply_model(x, t, c).equal(plain)  # nothing stays


def test_nothing_stays_after_an_exception(text_model):
    with pytest.raises(RuntimeError, match="out of memory"), identity_self_attention(text_model):
        assert any("forward" in vars(module) for module in text_model.modules())
        raise RuntimeError("out of memory")
    assert not any("forward" in vars(module) for module in text_model.modules())


def test_attention_without_a_transformer():
    block, x = filled(AttentionBlock(32, 2)), tensor("x_T", 2, 32, 4, 4)
    with torch.no_grad():
        plain = block(x)
        heads = block.qkv(block.norm(x.flatten(2))).unflatten(1, (2, 3, 16))  # (B, heads, 3, 16, N)
        values = heads[:, :, 2].flatten(1, 2)
        with identity_self_attention(block):
            assert_agrees(block(x), x + block.proj_out(values).view_as(x), 1e-6)
            assert not block(x).equal(plain)
        assert block(x).equal(plain)


def test_networks_without_self_attention_in_their_middle():
    config = tiny_config()
    config["params"]["unet_config"]["params"]["disable_middle_self_attn"] = True
    model = instantiate_from_config(config)
    with (
        pytest.raises(ValueError, match="needs self-attention in the middle"),
        identity_self_attention(middle_block(model)),
    ):
        pass


def test_pag_with_and_without_a_condition(text_model):
    """By hand: one step of DDIM on cond + s (cond - perturbed), and with guidance beside it."""
    for model, shape, cond, uncond in (
        (text_model, (4, 16, 16), tensor("c", 2, 12, 24), tensor("uc", 2, 12, 24)),
        (toy("nothing"), (3, 8, 8), None, None),
    ):
        x = tensor("x_T", 2, *shape)
        solver, t = DDIMSampler(model), torch.full((2,), 1)
        options = {"x_T": x, "unconditional_conditioning": uncond, "verbose": False}
        ours, _ = solver.sample(
            1, 2, shape, cond, guidance=Guidance(1.0 if cond is None else 4.0, terms={"pag": 2.0}), **options
        )
        with torch.no_grad():
            plain = model.apply_model(x, t, cond)
            with identity_self_attention(middle_block(model)):
                eps = plain + 2.0 * (plain - model.apply_model(x, t, cond))
            if cond is not None:
                eps = eps + 3.0 * (plain - model.apply_model(x, t, uncond))
        a, a_prev = (
            float(y[0]) for y in (solver.sampling_schedule.alphas_cumprod, solver.sampling_schedule.alphas_cumprod_prev)
        )
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        assert_agrees(ours, math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev) * eps, 1e-4)


# ---- what goes together ----


REFUSED = [
    ({"terms": {"magic": 1}}, "guidance 'magic' is not one of pag, rescale, threshold"),
    ({"scale": []}, "finite numbers"),
    ({"scale": math.nan}, "finite numbers"),
    ({"scale": 2.0, "terms": {"rescale": 1.5}}, "guidance rescale must be from 0 to 1, not 1.5"),
    ({"scale": 2.0, "terms": {"threshold": 99.5}}, "guidance threshold must be from 0.5 to 1, not 99.5"),
    ({"scale": 2.0, "interval": (5, 1)}, "a low and a high sigma"),
    ({"scale": 2.0, "interval": (1,)}, "a low and a high sigma"),
    ({"scale": 7.5, "cfg_pp": True}, r"CFG\+\+ takes scales from 0 to 1 \(0.6 is usual\), not 7.5"),
    ({"scale": 0.5, "cfg_pp": True, "interval": (0, 1)}, "leave the interval out"),
    ({"scale": 0.5, "cfg_pp": True, "terms": {"rescale": 0.7}}, "leave rescale out"),
    ({"scale": 0.5, "cfg_pp": True, "terms": {"pag": 3.0}}, "leave one of them out"),
    ({"terms": {"rescale": 0.7}}, "at scale 1 there is none: leave rescale out"),
    ({"terms": {"threshold": 0.9}}, "at scale 1 there is none: leave threshold out"),
    ({"interval": (0, 1)}, "at scale 1 there is none: leave the interval out"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**options)


def test_what_goes_together():
    Guidance(5.0, (0.2, 6.0), terms={"pag": 3.0, "rescale": 0.7, "threshold": 0.995})
    Guidance(1.0, (0.2, 6.0), terms={"pag": 3.0, "rescale": 0.7})
    Guidance([0.0, 1.0], cfg_pp=True, terms={"threshold": 0.995})
    assert Guidance([1.0, 2.0]).needs_uncond and Guidance(1.0, cfg_pp=True).needs_uncond
    assert not Guidance(1.0, terms={"pag": 2.0}).needs_uncond


def test_what_needs_an_unconditional_prediction_says_so():
    with pytest.raises(ValueError, match="needs an unconditional prediction"):
        Counting().run(Guidance(0.5, cfg_pp=True), guided=False)
