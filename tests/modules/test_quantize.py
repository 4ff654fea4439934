"""The vector quantiser: nearest entries, gradients of its two terms, remapped indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from ldm.modules.quantize import VectorQuantizer
from ldm.util import instantiate_from_config


def quantiser(**options) -> VectorQuantizer:
    """Eight entries on the line 0, 1, ... 7 in the first of two channels."""
    module = VectorQuantizer(8, 2, **options)
    with torch.no_grad():
        module.embedding.weight.copy_(torch.stack([torch.arange(8.0), torch.zeros(8)], dim=1))
    return module


def latent(*values: float) -> torch.Tensor:
    """(1, 2, 1, W)."""
    z = torch.zeros(1, 2, 1, len(values))
    z[0, 0, 0] = torch.tensor(values)
    return z.requires_grad_()


@pytest.fixture
def used(tmp_path) -> str:
    np.save(tmp_path / "used.npy", np.array([6, 2, 4]))
    return str(tmp_path / "used.npy")


def test_nearest_entries_and_straight_through_gradient():
    z = latent(0.2, 6.6, 3.1)
    quantised, _, (_, _, indices) = quantiser()(z)
    assert indices.tolist() == [0, 7, 3]
    assert quantised[0, 0, 0].tolist() == pytest.approx([0, 7, 3])
    weight = torch.randn(quantised.shape)
    (quantised * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_nearest_entries_of_more_positions_than_are_compared_at_once(monkeypatch):
    monkeypatch.setattr("ldm.modules.quantize.ROWS", 7)
    module, z = VectorQuantizer(50, 4), torch.randn(2, 4, 5, 3)
    flat = z.movedim(1, -1).reshape(-1, 4)
    wanted = torch.cdist(flat.double(), module.embedding.weight.double()).argmin(dim=1)
    quantised, _, (_, _, indices) = module(z)
    assert torch.equal(indices, wanted)
    torch.testing.assert_close(quantised, module.embedding(wanted).view(2, 5, 3, 4).movedim(-1, 1))


def test_memory_does_not_grow_with_positions_times_entries():
    """Among the tensors that come to be, none holds all positions and all entries."""
    module, sizes = VectorQuantizer(512, 3), []

    class Sizes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            answer = func(*args, **(kwargs or {}))
            sizes.append(answer.numel() if isinstance(answer, torch.Tensor) else 0)
            return answer

    with Sizes(), torch.no_grad():
        module(torch.randn(1, 3, 160, 160))
    assert 0 < max(sizes) <= 4096 * 512 < 160 * 160 * 512


@pytest.mark.parametrize("legacy, codebook, commitment", [(True, 0.25, 1.0), (False, 1.0, 0.25)])
def test_legacy_weights_the_codebook_term(legacy, codebook, commitment):
    """Of the error e = 0.4 in one of two numbers the loss is (1 + beta) e^2 / 2; each side has its own gradient."""
    module, z = quantiser(beta=0.25, legacy=legacy), latent(2.4)
    _, loss, _ = module(z)
    assert loss.item() == pytest.approx(1.25 * 0.16 / 2)
    loss.backward()
    assert z.grad[0, 0, 0, 0].item() == pytest.approx(commitment * 0.4)
    assert module.embedding.weight.grad[2, 0].item() == pytest.approx(-codebook * 0.4)
    assert module.embedding.weight.grad[[0, 1, 3]].abs().sum() == 0


@pytest.mark.parametrize("unknown, expected", [("extra", 3), (1, 1)])
def test_remapped_indices(used, unknown, expected):
    module = quantiser(remap=used, unknown_index=unknown)
    quantised, _, (_, _, indices) = module(latent(2.0, 6.0, 5.0))
    assert indices.tolist() == [[1], [0], [expected]]
    assert quantised[0, 0, 0].tolist() == [2, 6, 5]  # only the indices are remapped
    entries = module.get_codebook_entry(indices[:2], (1, 1, 2, 2))
    assert torch.equal(entries, quantised[..., :2])
    assert module.get_codebook_entry(indices[2])[0, 0] == (6 if unknown == "extra" else 2)
    assert module.re_embed == (4 if unknown == "extra" else 3)
    assert "used" in module.state_dict() and "used" not in quantiser().state_dict()


def test_unknown_indices_at_random(used):
    module = quantiser(remap=used)
    found = module.remap_to_used(torch.full((1, 200), 5))
    assert set(found.flatten().tolist()) == {0, 1, 2}
    assert module.remap_to_used(torch.tensor([[2, 4, 6]])).tolist() == [[1, 2, 0]]


def test_shapes_of_indices(used):
    z = torch.randn(2, 2, 3, 4)
    assert quantiser()(z)[2][2].shape == (24,)
    assert quantiser(remap=used)(z)[2][2].shape == (24, 1)
    assert quantiser(remap=used, sane_index_shape=True)(z)[2][2].shape == (2, 3, 4)


def test_mistakes_are_named(used, tmp_path):
    with pytest.raises(FileNotFoundError, match="remap: .*none.npy does not exist"):
        quantiser(remap=str(tmp_path / "none.npy"))
    for index in ("other", 3):
        with pytest.raises(ValueError, match=f"unknown_index must be random, extra or 0 to 2, not {index!r}"):
            quantiser(remap=used, unknown_index=index)
    np.save(tmp_path / "bad.npy", np.array([8]))
    with pytest.raises(ValueError, match="indices from 0 to 7"):
        quantiser(remap=str(tmp_path / "bad.npy"))


def test_public_path():
    target = "taming.modules.vqvae.quantize.VectorQuantizer2"
    config = {"target": target, "params": {"n_e": 8, "e_dim": 2, "beta": 0.25, "remap": None}}
    assert isinstance(instantiate_from_config(config), VectorQuantizer)
