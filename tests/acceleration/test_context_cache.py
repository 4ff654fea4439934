"""Keys and values that are computed once: how often, and when they must not be what they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.acceleration.context_cache import MAX_CONTEXTS, cache_contexts
from ldm.attach import Override
from ldm.modules.attention import CrossAttention
from tests.golden import filled, tensor


@pytest.fixture
def attention():
    return filled(CrossAttention(16, 12, heads=2, dim_head=8)).eval()


@pytest.fixture
def asked(attention):
    """How often the keys' projection was computed."""

    class Counted(Override):
        def __call__(self, input):
            count.append(1)
            return self.original(input)

    count = []
    Counted(attention.to_k).attach()
    return count


def test_a_context_is_projected_once(attention, asked):
    x, context = tensor("x", 2, 9, 16), tensor("c", 2, 5, 12)
    with torch.no_grad():
        plain = attention(x, context), attention(x + 1, context)
        with cache_contexts(attention):
            kept = attention(x, context), attention(x + 1, context)
    assert len(asked) == 2 + 1
    assert all(a.equal(b) for a, b in zip(plain, kept))
    assert "forward" not in vars(attention) and "forward" not in vars(attention.to_v)  # nothing stays alive


def change_context(attention, context):
    context.add_(1)


def change_weight(attention, context):
    attention.to_v.weight.mul_(2)


def replace_data(attention, context):
    attention.to_v.weight.data = 2 * attention.to_v.weight.data


def replace_weight(attention, context):
    attention.to_v.weight = nn.Parameter(2 * attention.to_v.weight)


def change_data(attention, context):
    attention.to_v.weight.data.mul_(2)


def change_context_data(attention, context):
    context.data += 1


CHANGES = [change_context, change_weight, replace_data, replace_weight, change_data, change_context_data]


def double_data(module, args, output):
    output.data.mul_(2)


@torch.no_grad()
def test_results_that_a_hook_changes_are_computed_again(attention):
    x, context = tensor("x", 2, 9, 16), tensor("c", 2, 5, 12)
    attention.to_v.register_forward_hook(double_data)
    wanted = attention(x, context)
    with cache_contexts(attention):
        for _ in range(3):
            torch.testing.assert_close(attention(x, context), wanted)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changes_are_seen(attention, change):
    x, context = tensor("x", 2, 9, 16), tensor("c", 2, 5, 12)
    with cache_contexts(attention):
        before = attention(x, context)
        change(attention, context)
        after = attention(x, context)
    assert after.equal(attention(x, context)) and not after.allclose(before)


@torch.no_grad()
def test_an_equal_context_at_the_address_of_one_that_is_gone_is_another(attention, asked):
    x = tensor("x", 2, 9, 16)
    with cache_contexts(attention):
        for seed in range(2 * MAX_CONTEXTS):
            context = tensor(f"c{seed}", 2, 5, 12)
            assert attention(x, context).equal(attention(x, context))
            del context
        assert len(attention.to_k.forward.results) == MAX_CONTEXTS
    assert len(asked) == 2 * MAX_CONTEXTS


@torch.no_grad()
def test_another_precision_is_another_answer(attention):
    x, context = tensor("x", 2, 9, 16), tensor("c", 2, 5, 12)
    with cache_contexts(attention):
        whole = attention(x, context)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert attention(x, context).dtype == torch.bfloat16
        assert attention(x, context).equal(whole)


def test_gradients_reach_the_projections(attention, asked):
    x, context = tensor("x", 2, 9, 16), tensor("c", 2, 5, 12)
    with cache_contexts(attention):
        for _ in range(2):
            attention(x, context).sum().backward()
    assert len(asked) == 2 and attention.to_k.weight.grad is not None


def test_self_attention_is_computed(asked, attention):
    own = CrossAttention(16, heads=2, dim_head=8)
    with torch.no_grad(), cache_contexts(own):
        own(tensor("x", 2, 9, 16))
        assert own.to_k.forward.results == []
