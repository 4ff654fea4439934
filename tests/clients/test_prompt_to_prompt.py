"""The pattern of prompt-to-prompt (Hertz et al. 2022): attention maps recorded, and replaced by another prompt's."""

from __future__ import annotations

import pytest
import torch

from ldm.models.diffusion.ddim import DDIMSampler
from tests.clients.common import PROMPTS, SHAPE, assert_close, noise, tiny_model


class Controller:
    """Sees the attention maps of each layer, and may change those of the text."""

    def __init__(self):
        self.maps = []

    def __call__(self, attention, is_cross):
        if is_cross:
            self.maps.append(attention.detach())
        return attention


class Replace(Controller):
    """Gives the second image of a batch the first one's attention to the text."""

    def __call__(self, attention, is_cross):
        super().__call__(attention, is_cross)
        if is_cross:
            half = len(attention) // 2
            attention = torch.cat([attention[:half], attention[:half]])
        return attention


def register(model, controller):
    """Replace the forward of every layer of class CrossAttention by one that shows its map to the controller."""

    def own_forward(layer):
        def forward(x, context=None, mask=None):
            is_cross = context is not None
            context = context if is_cross else x
            q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context)
            q, k, v = (y.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, N, D)
            attention = (q @ k.transpose(2, 3) * layer.scale).softmax(dim=-1)
            attention = controller(attention, is_cross)
            return layer.to_out((attention @ v).transpose(1, 2).flatten(2))

        return forward

    layers = [layer for layer in model.modules() if type(layer).__name__ == "CrossAttention"]
    for layer in layers:
        layer.forward = own_forward(layer)
    return layers


@pytest.fixture
def model():
    return tiny_model()


def sample(model, seed=2, steps=4):
    c = model.get_learned_conditioning(PROMPTS)
    x = noise(1, *SHAPE, seed=seed).repeat(2, 1, 1, 1)
    return DDIMSampler(model).sample(steps, 2, SHAPE, conditioning=c, x_T=x, verbose=False)[0]


def test_recorder(model):
    plain = sample(model)
    controller = Controller()
    layers = register(model.model.diffusion_model, controller)
    assert_close(sample(model), plain)
    assert len(layers) == 14 and len(controller.maps) == 4 * 7  # steps, layers of text
    for attention in controller.maps:
        assert attention.shape[:2] == (2, 4) and attention.shape[3] == 12
        assert_close(attention.sum(-1), torch.ones(attention.shape[:3]))


def test_replaced_maps_take_effect(model):
    plain = sample(model)
    layers = register(model.model.diffusion_model, Replace())
    edited = sample(model)
    assert_close(edited[0], plain[0])
    assert (edited[1] - plain[1]).abs().max() > 1e-3
    for layer in layers:
        del layer.forward
    assert torch.equal(sample(model), plain)
