"""GroupNorm32 in half precision: float32 inside, its weights widened once and whenever they change."""

from __future__ import annotations

import copy

import pytest
import torch

from ldm.modules.diffusionmodules.util import GroupNorm32
from tests.golden import filled, tensor


@pytest.mark.parametrize("name", ["weight", "bias"])
@torch.no_grad()
def test_widened_weights_are_kept_until_they_change(name):
    norm, x = filled(GroupNorm32(2, 8)).bfloat16(), tensor("x", 2, 8, 4, 4).bfloat16()

    def expected():
        wide = torch.nn.functional.group_norm(x.float(), 2, norm.weight.float(), norm.bias.float(), norm.eps)
        return wide.bfloat16()

    assert norm(x).equal(expected())
    first = norm._in_float32()
    assert all(a is b for a, b in zip(first, norm._in_float32()))
    getattr(norm, name).add_(1)
    assert norm(x).equal(expected())
    assert copy.deepcopy(norm)(x).equal(expected())  # a copy keeps nothing of it
