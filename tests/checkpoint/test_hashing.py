"""The fingerprint of weights: what changes it, and what does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.checkpoint import fingerprint


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.BatchNorm1d(4)})


def test_equal_weights_have_equal_fingerprints() -> None:
    one = module()
    other = nn.ModuleDict({"b": one["b"], "a": one["a"]})  # another order
    assert fingerprint(one) == fingerprint(module()) == fingerprint(other)
    assert len(fingerprint(one)) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["a"].weight.data[0, 0].add_(1e-7),
        lambda m: m["b"].running_mean.add_(1),  # buffers count
        lambda m: m.half(),
        lambda m: m.add_module("c", nn.Linear(1, 1)),
        lambda m: setattr(m["a"], "weight", nn.Parameter(m["a"].weight.detach().reshape(3, 4))),
    ],
)
def test_any_change_shows(change) -> None:
    changed = module()
    with torch.no_grad():
        change(changed)
    assert fingerprint(changed) != fingerprint(module())


def test_parts_can_be_ignored() -> None:
    changed = module()
    changed["b"].running_mean.add_(1)
    assert fingerprint(changed, ignore=["b."]) == fingerprint(module(), ignore=["b."])


def test_bf16_and_empty_modules_have_one() -> None:
    assert fingerprint(module().bfloat16()) != fingerprint(module())
    assert fingerprint(nn.Identity()) == fingerprint(nn.SiLU())


def test_a_module_without_weights_has_none() -> None:
    with torch.device("meta"):
        empty = module()
    with pytest.raises(ValueError, match="has no fingerprint .*meta device"):
        fingerprint(empty)
