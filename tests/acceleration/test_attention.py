"""Attention to very many keys by threads, and feed-forward networks some tokens at a time."""

from __future__ import annotations

import pytest
import torch

from ldm.acceleration import accelerate, attention, onednn
from ldm.acceleration.attention import attend_long
from ldm.modules.attention import CrossAttention, FeedForward
from ldm.modules.diffusionmodules.model import AttnBlock
from ldm.modules.diffusionmodules.openaimodel import QKVAttention, QKVAttentionLegacy

pytestmark = pytest.mark.skipif(not onednn.has_kernels(), reason="this build of torch has no oneDNN")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def module(monkeypatch):
    """A module whose attention to 64 keys and more goes by threads."""
    monkeypatch.setattr(attention, "LONG", 64)
    module = CrossAttention(24, heads=3, dim_head=8)
    accelerate(module)
    return module


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(64, 64, 64), (70, 2048, 70), (4096, 5000, 257)])
def test_attention_to_many(monkeypatch, module, sizes):
    """However many scores are computed at a time, the formula in float64 is met; for many keys that way is taken."""
    queries, keys, cached = sizes
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 8).transpose(1, 2) for length in (queries, keys, keys))
    scores = q.double() @ k.double().transpose(-1, -2) / 8**0.5
    wanted = (scores.softmax(-1) @ v.double()).float()
    monkeypatch.setattr(attention, "SCORES", cached * keys)
    monkeypatch.setattr(module.attend, "original", None)
    torch.testing.assert_close(module.attend(q, k, v), wanted, **CLOSE)
    v = torch.cat([v, v], dim=-1)  # values of another width than keys
    torch.testing.assert_close(module.attend(q, k, v), torch.cat([wanted, wanted], dim=-1), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", [CrossAttention, AttnBlock, QKVAttention, QKVAttentionLegacy])
def test_every_kind_of_attention(monkeypatch, kind):
    monkeypatch.setattr(attention, "LONG", 64)
    torch.manual_seed(0)
    module = kind(2) if issubclass(kind, QKVAttention) else kind(32)
    x = {CrossAttention: torch.randn(2, 70, 32), AttnBlock: torch.randn(2, 32, 8, 9)}.get(kind, torch.randn(2, 96, 70))
    wanted = module(x)
    with accelerate(module):
        torch.testing.assert_close(module(x), wanted, **CLOSE)
        calls = []
        monkeypatch.setattr(attention, "attend_long", lambda *args: calls.append(1) or attend_long(*args))
        module(x)
        assert calls == [1]
        monkeypatch.setattr(kind, "attend", lambda self, q, k, v, mask=None: 0 * q)  # somebody else's
        assert not torch.equal(module(x), wanted) and calls == [1]
    assert "attend" not in vars(module)


def test_attention_to_many_is_not_for_training(module):
    x = torch.randn(1, attention.LONG, 24, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("offset", [0.0, 400.0, -400.0])  # of all scores: it makes no difference
@pytest.mark.parametrize("bf16", [False, True])
def test_many_keys_whatever_the_size_of_scores(monkeypatch, size, offset, bf16):
    """Beyond what powers of two hold, too; rows are taken a few at a time, and not all of them are steep."""
    monkeypatch.setattr(attention, "SCORES", 64 * 16)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3, 64, 16) for _ in range(3))
    q[:, :, 40:] *= size
    q[..., 0], k[..., 0] = 4.0, offset  # a score of q0 k0 / 4
    wanted = (q.double() @ k.double().mT / 4).softmax(-1) @ v.double()
    bf16 = bf16 and torch.cpu._is_avx512_bf16_supported()
    found = attend_long(q, k, v, torch.bfloat16 if bf16 else torch.float32)
    assert found.isfinite().all()
    if bf16:
        if size <= 1 and not offset:  # else eight bits of mantissa cannot tell
            assert (found - wanted).norm() < 0.01 * wanted.norm()
    else:
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-3 if size > 1 or offset else 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_many_keys_hide_no_fault(bad):
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    k[0, 1, 5, 3] = bad
    found = attend_long(q, k, v, torch.float32)
    assert found[0, 0].isfinite().all() and found[0, 1].isnan().any()


@torch.no_grad()
@pytest.mark.parametrize("queries", [1, 3, 64])
def test_one_head_is_shared_by_threads(monkeypatch, queries):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, queries, 16), torch.randn(1, 1, 64, 16), torch.randn(1, 1, 64, 24)
    wanted = (q.double() @ k.double().mT / 4).softmax(-1) @ v.double()
    torch.testing.assert_close(attend_long(q, k, v, torch.float32).double(), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("glu", [False, True])
def test_feed_forward_some_tokens_at_a_time(monkeypatch, glu):
    torch.manual_seed(0)
    layer, x = FeedForward(16, dim_out=8, glu=glu), torch.randn(2, 30, 16)
    wanted = layer(x)
    monkeypatch.setattr(onednn, "CHUNK", 128 * 7)
    monkeypatch.setattr(onednn, "MIN_TOKENS", 1)
    accelerate(layer)
    calls: list[int] = []
    kernel = onednn.PackedLinear.__call__

    def counted(self, input):
        if self.module is layer.net[-1]:
            calls.append(len(input))
        return kernel(self, input)

    monkeypatch.setattr(onednn.PackedLinear, "__call__", counted)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert calls == ([8] * 4 + [7] * 4 if glu else [15] * 4)  # of alike sizes: what is left over would be few
    with torch.enable_grad():
        calls.clear()
        layer(x)
    assert calls == [2]
