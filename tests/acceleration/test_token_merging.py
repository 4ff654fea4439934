"""Token merging (Bolya and Hoffman 2023): against arithmetic by hand, and where nothing can be lost."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.acceleration.token_merging import Merging, _MergedAttention, merge_tokens, outermost_transformers
from ldm.modules.attention import BasicTransformerBlock, SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.golden import filled, golden_configs, tensor

SIZES = [(1, 1), (1, 5), (3, 2), (4, 4), (7, 9), (6, 5)]


def by_hand(h: np.ndarray, height: int, width: int, ratio: float) -> list[list[int]]:
    """Of tokens (H W, C), those that stay, each with those that go there."""
    stay = [r * width + c for r in range(0, height, 2) for c in range(0, width, 2)]
    groups, found = {token: [token] for token in stay}, []
    for token in set(range(height * width)) - set(stay):
        cosines = [h[token] @ h[one] / np.linalg.norm(h[token]) / np.linalg.norm(h[one]) for one in stay]
        found.append((max(cosines), token, stay[int(np.argmax(cosines))]))
    for _, token, into in sorted(found, reverse=True)[: int(ratio * height * width)]:
        groups[into].append(token)
    return list(groups.values())


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("size", SIZES)
def test_merged_and_unmerged(size, ratio):
    count = size[0] * size[1]
    h = tensor("h", 2, count, 6)
    merging = Merging(h, size, ratio)
    fewer = merging.merge(h)
    back = merging.unmerge(fewer)
    assert back.shape == h.shape
    for item in range(2):
        groups = by_hand(h[item].double().numpy(), *size, ratio)
        assert fewer.shape[1] == count - sum(len(group) - 1 for group in groups)
        expected = h[item].clone()
        for group in groups:
            expected[group] = h[item, group].mean(dim=0)
        torch.testing.assert_close(back[item], expected)


@pytest.fixture(scope="module")
def block():
    return filled(BasicTransformerBlock(24, n_heads=2, d_head=12, context_dim=8))


@pytest.mark.parametrize(("size", "across", "ratio"), [((4, 6), (2, 2), 0.75), ((1, 12), (1, 2), 0.5)])
def test_equal_tokens_lose_nothing(block, size, across, ratio):
    """Where all tokens come in as many equal ones, attention among one of each is attention among all."""
    few = tensor("few", 2, 24, size[0] // across[0], size[1] // across[1])
    x = few.repeat_interleave(across[0], 2).repeat_interleave(across[1], 3).flatten(2).transpose(1, 2)
    context, seen = tensor("context", 2, 3, 8), []
    hook = block.attn1.to_q.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        plain = block(x, context)
        override = _MergedAttention(block.attn1, SimpleNamespace(size=size), ratio).attach()
        merged = block(x, context)
    override.remove()
    hook.remove()
    assert seen == [size[0] * size[1], few[0, 0].numel()]
    torch.testing.assert_close(merged, plain)


@pytest.fixture(scope="module")
def network():
    return filled(UNetModel(**golden_configs("unet_pub")["v1_tiny"]["config"]))


def ask(network, size=(16, 16)):
    with torch.no_grad():
        return network(tensor("x", 2, 4, *size), torch.tensor([5, 5]), context=tensor("context", 2, 7, 24))


def test_nothing_merged_is_as_without(network):
    plain = ask(network)
    with merge_tokens(network, 0.0):
        assert torch.equal(ask(network), plain)
    with merge_tokens(network, 0.5):
        assert not torch.allclose(ask(network), plain)
    assert torch.equal(ask(network), plain)


def test_nothing_is_drawn(network):
    state = torch.get_rng_state()
    with merge_tokens(network, 0.5):
        first, second = ask(network), ask(network)
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 9), (11, 16)])
def test_any_size(network, size):
    with merge_tokens(network, 0.5):
        out = ask(network, size)
    assert out.shape == (2, 4, *size) and torch.isfinite(out).all()


def test_half_precision():
    half = filled(UNetModel(**golden_configs("unet_pub")["v1_tiny"]["config"])).bfloat16()
    with merge_tokens(half, 0.5):
        assert torch.isfinite(ask(half)).all()


@pytest.mark.parametrize("name", ["v1_tiny", "cin_tiny", "depth2_legacy"])
def test_it_is_the_finest_transformers_that_merge(name):
    """Found by the places that they see."""
    config = golden_configs("unet_pub")[name]["config"]
    network, places = filled(UNetModel(**config)), {}
    for part in network.modules():
        if isinstance(part, SpatialTransformer):
            part.register_forward_hook(lambda module, args, out: places.update({module: out[0, 0].numel()}))
    with torch.no_grad():
        network(tensor("x", 1, 4, 16, 16), torch.tensor([5]), context=tensor("c", 1, 7, config["context_dim"]))
    finest = [part for part, count in places.items() if count == max(places.values())]
    assert set(outermost_transformers(network)) == set(finest) and len(finest) == 5
    with merge_tokens(network, 0.5):
        blocks = [p for p in network.modules() if isinstance(p, BasicTransformerBlock) and "forward" in vars(p.attn1)]
    assert blocks and {id(block) for block in blocks} == {id(b) for part in finest for b in part.transformer_blocks}


def test_refusals(network):
    with pytest.raises(ValueError, match="from 0 to 0.75, not 0.8"), merge_tokens(network, 0.8):
        pass
    plain = filled(UNetModel(**golden_configs("unet_pub")["uncond_tiny"]["config"]))
    for other in (plain, torch.nn.Linear(1, 1)):
        with pytest.raises(ValueError, match="this network has none"), merge_tokens(other, 0.5):
            pass
    with pytest.raises(RuntimeError), merge_tokens(network, 0.5):
        raise RuntimeError
    assert not any("forward" in vars(part) for part in network.modules())
