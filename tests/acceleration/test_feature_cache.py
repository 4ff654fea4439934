"""Feature caching (Ma et al. 2023): which blocks run when, and what of which call they are given."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ldm.acceleration.feature_cache import OUTER, cache_features
from ldm.models.diffusion.guidance import identity_self_attention
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.diffusionmodules.util import timestep_embedding
from tests.golden import filled, golden_configs, tensor


@pytest.fixture(scope="module")
def network():
    return filled(UNetModel(**golden_configs("unet_pub")["v1_tiny"]["config"]))


CONTEXT = tensor("context", 1, 7, 24)


def ask(network, t, x="x", context=CONTEXT, size=(16, 16)):
    """The answer at timestep t, to an input that is another one at every timestep."""
    with torch.no_grad():
        return network(tensor(f"{x}{t}", 1, 4, *size), torch.tensor([t]), context=context)


@pytest.fixture
def runs(network):
    """How often each block was computed, by its name."""
    counts = Counter()
    parts = {"middle": network.middle_block}
    parts |= {f"input {i}": block for i, block in enumerate(network.input_blocks)}
    parts |= {f"output {i}": block for i, block in enumerate(network.output_blocks)}
    hooks = [part.register_forward_hook(lambda *_, name=name: counts.update([name])) for name, part in parts.items()]
    yield counts
    for hook in hooks:
        hook.remove()


def test_every_step_is_as_without(network):
    with cache_features(network, 1):
        assert "forward" not in vars(network)
        cached = [ask(network, t) for t in (9, 8)]
    assert torch.equal(torch.cat(cached), torch.cat([ask(network, t) for t in (9, 8)]))


def test_only_the_outer_blocks_run_in_between(network, runs):
    outer = {f"input {i}" for i in range(OUTER)} | {
        f"output {len(network.output_blocks) - 1 - i}" for i in range(OUTER)
    }
    full = []
    with cache_features(network, 3):
        for t in range(9, 2, -1):
            runs.clear()
            ask(network, t)
            full.append(runs["middle"] == 1)
            inside = len(network.input_blocks) + 1 + len(network.output_blocks)
            assert set(runs.values()) == {1} and len(runs) == (inside if full[-1] else 2 * OUTER)
            assert outer <= set(runs)
    assert full == [True, False, False, True, False, False, True]
    assert "forward" not in vars(network)


def test_what_is_computed_in_between(network):
    """By hand: the outer blocks of this step, around what entered them at the last full one."""
    entered = []
    inner = network.output_blocks[-1 - OUTER]
    hook = inner.register_forward_hook(lambda module, args, out: entered.append(out))
    with cache_features(network, 2):
        first, second = ask(network, 9), ask(network, 8)
    hook.remove()
    assert OUTER == 1 and len(entered) == 1 and torch.equal(first, ask(network, 9))
    with torch.no_grad():
        emb = network.time_embed(timestep_embedding(torch.tensor([8]), network.model_channels))
        skip = network.input_blocks[0](tensor("x8", 1, 4, 16, 16), emb, CONTEXT)
        by_hand = network.out(network.output_blocks[-1](torch.cat([entered[0], skip], dim=1), emb, CONTEXT))
    torch.testing.assert_close(second, by_hand)
    assert not torch.allclose(second, ask(network, 8))


OTHERS = {
    "condition": {"context": tensor("other", 1, 7, 24)},
    "the same numbers": {"context": CONTEXT.clone()},
    "size": {"size": (7, 9)},
    "tile": {},
    "perturbed": {},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_calls_of_other_kinds_keep_to_themselves(network, kind):
    """Two calls at each timestep: both as if they had the network to themselves."""

    def other(t):
        if kind == "perturbed":
            with identity_self_attention(network.middle_block):
                return ask(network, t, "y")
        return ask(network, t, "y", **OTHERS[kind])

    steps = (9, 8, 7)
    alone = []
    for call in (lambda t: ask(network, t), other):
        with cache_features(network, 2):
            alone.append([call(t) for t in steps])
    with cache_features(network, 2):
        both = [(ask(network, t), other(t)) for t in steps]
    for i in range(2):
        assert all(torch.equal(pair[i], single) for pair, single in zip(both, alone[i]))


def test_a_kind_that_was_not_asked_for_long_is_computed(network, runs):
    """So it is where guidance has an interval: before and after it another kind is asked."""
    with cache_features(network, 2):
        ask(network, 9)
        ask(network, 8, context=OTHERS["condition"]["context"])
        ask(network, 7)
    assert runs["middle"] == 3


def test_every_picture_begins_anew(network, runs):
    with cache_features(network, 5):
        before = [ask(network, t) for t in (9, 8)]
        again = [ask(network, t, "z") for t in (9, 8)]
    assert runs["middle"] == 2
    with cache_features(network, 5):
        assert torch.equal(torch.cat([ask(network, t, "z") for t in (9, 8)]), torch.cat(again))
    with cache_features(network, 5):
        assert torch.equal(torch.cat([ask(network, t) for t in (9, 8)]), torch.cat(before))


@pytest.mark.parametrize("size", [(2, 3), (7, 9), (11, 16)])
def test_any_size(network, size):
    with cache_features(network, 2):
        answers = [ask(network, t, size=size) for t in (9, 8)]
    assert all(answer.shape == (1, 4, *size) and torch.isfinite(answer).all() for answer in answers)


@pytest.mark.parametrize("name", ["uncond_tiny", "noresample_tiny", "depth2_legacy"])
def test_any_unet(name):
    config = golden_configs("unet_pub")[name]["config"]
    network = filled(UNetModel(**config))
    context = tensor("context", 2, 5, config["context_dim"]) if "context_dim" in config else None
    x = tensor("x", 2, config["in_channels"], 16, 16)
    with torch.no_grad(), cache_features(network, 2):
        first, second = (network(x, torch.tensor([t, t]), context=context) for t in (9, 8))
    assert first.shape == second.shape and 0 < (first - second).abs().max() < first.abs().max()


def test_a_forward_replaced_on_the_class_takes_effect(network, monkeypatch):
    forward = UNetModel.forward
    wanted = 2 * ask(network, 8)
    with cache_features(network, 2):
        ask(network, 9)
        monkeypatch.setattr(UNetModel, "forward", lambda *args, **kwargs: 2 * forward(*args, **kwargs))
        assert torch.equal(ask(network, 8), wanted)


def test_an_empty_batch(network):
    with cache_features(network, 2), torch.no_grad():
        x, timesteps = torch.zeros(0, 4, 16, 16), torch.zeros(0, dtype=torch.long)
        assert network(x, timesteps, context=CONTEXT[:0]).shape == x.shape


def test_refusals(network):
    with pytest.raises(ValueError, match="for a UNetModel, not for Linear"), cache_features(torch.nn.Linear(1, 1), 2):
        pass
    with pytest.raises(ValueError, match="N at least 1, not 0"), cache_features(network, 0):
        pass
    with pytest.raises(RuntimeError), cache_features(network, 2):
        raise RuntimeError
    assert "forward" not in vars(network)
    network.forward = network.forward  # somebody's
    with pytest.raises(ValueError, match="forward has been replaced"):
        cache_features(network, 2)
    del network.forward
