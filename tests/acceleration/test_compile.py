"""A compiled network: the same numbers and names. The compiler's own code generation is slow, so most go without."""

from __future__ import annotations

import logging

import pytest
import torch

from ldm.acceleration.compile import compile_network
from ldm.models.diffusion.guidance import identity_self_attention
from ldm.modules.attention import BasicTransformerBlock, CrossAttention
from tests.golden import golden_configs, latent_diffusion, tensor


@pytest.fixture
def model():
    torch.compiler.reset()
    return latent_diffusion(golden_configs("diffusion")["model"])


X, T, C = tensor("x", 2, 4, 16, 16), torch.tensor([3, 500]), tensor("c", 2, 5, 24)


@torch.no_grad()
def test_numbers_and_names_stay(model, caplog):
    names, plain = list(model.state_dict()), model.apply_model(X, T, C)
    with identity_self_attention(model.model):
        perturbed = model.apply_model(X, T, C)
    caplog.set_level(logging.INFO)
    handle = compile_network(model, backend="aot_eager")
    torch.testing.assert_close(model.apply_model(X, T, C), plain)
    assert "compiled and ran the network once" in caplog.text
    with identity_self_attention(model.model):  # another way through a block
        torch.testing.assert_close(model.apply_model(X, T, C), perturbed)
    torch.testing.assert_close(model.apply_model(X, T, C), plain)
    assert list(model.state_dict()) == names
    handle.remove()
    assert not any(part._compiled_call_impl for part in model.modules()) and "forward" not in vars(model.model)


@torch.no_grad()
def test_later_changes_take_effect(model, monkeypatch):
    """Hooks on layers, and methods replaced on classes, after the first call."""
    plain = model.apply_model(X, T, C)
    block = next(part for part in model.modules() if isinstance(part, BasicTransformerBlock))

    def double(module, args, output):
        return output * 2

    with compile_network(model, backend="eager"):
        model.apply_model(X, T, C)
        for part in (block.attn2.to_k, block.ff, block.attn1):
            hook = part.register_forward_hook(double)
            assert not torch.allclose(model.apply_model(X, T, C), plain)
            hook.remove()
            torch.testing.assert_close(model.apply_model(X, T, C), plain)
        for kind, name in ((CrossAttention, "forward"), (BasicTransformerBlock, "_forward")):
            method = getattr(kind, name)
            with monkeypatch.context() as patch:
                patch.setattr(kind, name, lambda *args, method=method, **kwargs: 2 * method(*args, **kwargs))
                assert not torch.allclose(model.apply_model(X, T, C), plain)
            torch.testing.assert_close(model.apply_model(X, T, C), plain)


@torch.no_grad()
def test_without_a_compiler_it_goes_on(model, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler found")

    plain = model.apply_model(X, T, C)
    assert compile_network(model, backend=broken)
    torch.testing.assert_close(model.apply_model(X, T, C), plain)
    assert "no C++ compiler found" in caplog.text and "going on without" in caplog.text


def test_a_cpu_is_quicker_without(model, caplog):
    assert compile_network(model) is None
    assert "no effect on a CPU" in caplog.text
