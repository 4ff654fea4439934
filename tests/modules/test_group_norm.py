"""GroupNorm32 in half precision: float32 inside, and by the weights that are there now."""

from __future__ import annotations

import copy

import pytest
import torch

from ldm.modules.diffusionmodules.util import GroupNorm32
from tests.golden import filled, tensor


@pytest.mark.parametrize("name", ["weight", "bias"])
@torch.no_grad()
def test_half_precision_is_float32_inside(name):
    norm, x = filled(GroupNorm32(2, 8)).bfloat16(), tensor("x", 2, 8, 4, 4).bfloat16()

    def expected():
        wide = torch.nn.functional.group_norm(x.float(), 2, norm.weight.float(), norm.bias.float(), norm.eps)
        return wide.bfloat16()

    assert norm(x).equal(expected())
    getattr(norm, name).data.add_(1)
    assert norm(x).equal(expected())
    assert copy.deepcopy(norm)(x).equal(expected())
