"""Overrides of methods: their order, their removal under others' functions, their copies and their threads."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from torch import nn

from ldm.attach import Handle, Override, override_chain


class Add(Override):
    """Adds a number, and multiplies by ten what lies below."""

    state = ("number",)

    def __init__(self, module, number, priority=0):
        super().__init__(module)
        self.number, self.priority = number, priority

    def __call__(self, x):
        return self.original(x) * 10 + self.number if self.is_active() else self.original(x)


class Own(Add):
    thread_local = True


@pytest.fixture
def layer():
    return nn.Identity()


X = torch.zeros(1)


def test_levels_are_the_order(layer):
    for number, level in ((3, 30), (1, 10), (2, 20)):
        Add(layer, number, level).attach()
    assert layer(X).item() == 123 and [override.number for override in override_chain(layer)] == [3, 2, 1]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_removal_in_any_order_restores_exactly(layer, order):
    before = dict(vars(layer))
    handles = [Handle("add", [Add(layer, number).attach()]) for number in (1, 2, 3)]
    for i in order:
        handles[i].remove()
        handles[i].remove()  # a second time does nothing
    assert vars(layer) == before


def test_a_foreign_forward_below_and_above(layer):
    layer.forward = below = lambda x: x + 5
    override = Add(layer, 1).attach()
    assert layer(X).item() == 51 and override_chain(layer) is None
    inner = layer.forward
    layer.forward = above = lambda x: inner(x) + 100
    assert layer(X).item() == 151
    override.remove()
    assert layer.forward is above and layer(X).item() == 105  # as if it had never been there
    layer.forward = inner
    assert layer(X).item() == 5
    layer.forward = below
    with Handle("add", [Add(layer, 1).attach()]):
        assert layer(X).item() == 51
    assert layer.forward is below


def test_a_deleted_forward(layer):
    handle = Handle("add", [Add(layer, 1).attach()])
    del layer.forward
    handle.remove()
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_have_overrides_of_their_own(way):
    model = nn.Sequential(nn.Identity(), nn.Identity())
    Handle("add", [Add(part, 1).attach() for part in model]).list_on(model)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert twin(X).item() == 11 and all(part.forward.module is part for part in twin)
    (handle,) = twin.acceleration
    handle.remove()
    assert twin(X).item() == 0 and model(X).item() == 11
    assert twin.acceleration == [] and len(model.acceleration) == 1


def test_a_model_is_freed_at_once():
    model = nn.Sequential(nn.Identity())
    Handle("add", [Add(model[0], 1).attach()]).list_on(model)
    gone = weakref.ref(model[0])
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_overrides_of_one_thread(layer):
    found = []
    with Handle("own", [Own(layer, 1).attach()]):
        assert layer(X).item() == 1
        thread = threading.Thread(target=lambda: found.append(layer(X).item()))
        thread.start()
        thread.join()
        assert copy.deepcopy(layer)(X).item() == 0
    assert found == [0]
