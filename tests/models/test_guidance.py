"""Guidance on hand-made conditions and a network that returns its inputs."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.guidance import (
    ConditionalModel,
    Guidance,
    ModelOutputs,
    condition_batch_size,
    join_conditions,
)

A, B = torch.zeros(2, 3), torch.ones(2, 3)


def test_joining_keeps_order_and_structure():
    joined = join_conditions({"c_crossattn": [A], "c_adm": B}, {"c_crossattn": [B], "c_adm": A})
    assert joined["c_crossattn"][0].equal(torch.cat([A, B])) and joined["c_adm"].equal(torch.cat([B, A]))
    assert join_conditions([A], [B])[0].equal(torch.cat([A, B]))


MISFITS = [
    (A, torch.ones(2, 4), "differ in shape"),
    ([A], [A, A], "differ in length"),
    ({"c_adm": A}, {"c_concat": A}, "differ in their entries"),
    (A, [A], "types Tensor and list"),
]


@pytest.mark.parametrize("first, second, message", MISFITS)
def test_misfits_are_named(first, second, message):
    with pytest.raises(ValueError, match=message):
        join_conditions(first, second)


def guided(network, cond, uncond, guidance, a=0.5):
    """The guided output of a network, and x and t."""
    x, t = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([3.0, 4.0])
    return guidance(ModelOutputs(ConditionalModel(network, cond, uncond), x, t, a), guidance.scale_at(0)), x, t


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 7.5])
def test_formula_and_number_of_calls(scale):
    calls = []

    def network(x, t, c):
        calls.append(x.shape[0])
        return c[:, :1] * t[:, None] + x

    (out, uncond), x, t = guided(network, B, A, Guidance(scale))
    torch.testing.assert_close(out, x + scale * t[:, None])  # the unconditional answer is x, the other x + t
    assert calls == ([2] if scale == 1.0 else [4])  # one batch of both, or the conditional half alone
    assert uncond is None


def test_without_unconditional_condition():
    (out, _), _, _ = guided(lambda x, t, c: c, B, None, Guidance(7.5))
    assert out is B


def test_batch_size():
    assert condition_batch_size({"c_concat": [], "c_crossattn": [torch.zeros(5, 1)]}) == 5
    assert condition_batch_size(None) is None and condition_batch_size(torch.zeros(3)) == 3


@pytest.mark.parametrize("cfg_pp, scale", [(False, 7.5), (True, 0.6)])
def test_sequential_guidance_is_the_same_in_two_calls(cfg_pp, scale):
    sizes = []

    def network(x, t, cond):
        sizes.append(len(x))
        return x * t[:, None] + cond

    x, t = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([3.0, 4.0])
    cond, uncond = torch.full((2, 2), 5.0), torch.full((2, 2), 7.0)
    together, apart = (
        Guidance(scale, cfg_pp=cfg_pp)(
            ModelOutputs(ConditionalModel(network, cond, uncond, sequential=sequential), x, t, 0.5), scale
        )
        for sequential in (False, True)
    )
    assert sizes == [4, 2, 2]
    assert together.output.equal(apart.output)
    assert together.uncond is None or together.uncond.equal(apart.uncond)
