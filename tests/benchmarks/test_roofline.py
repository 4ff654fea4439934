"""Counted operations against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import networks
from benchmarks.measure import count_flops, measure_peak_flops
from benchmarks.settings import Scan, Settings
from benchmarks.suites.networks import unet_flops, vae_flops


def meta(*shape):
    return torch.empty(shape, device="meta")


def test_layers_count_two_for_a_multiply_add():
    with torch.device("meta"):
        linear, conv = nn.Linear(5, 7), nn.Conv2d(3, 4, 3, padding=1, stride=2)
    assert count_flops(lambda: linear(meta(2, 11, 5))) == 2 * 2 * 11 * 5 * 7
    assert count_flops(lambda: conv(meta(2, 3, 8, 8))) == 2 * 2 * 4 * 4 * 9 * 3 * 4


def test_attention_counts_both_products():
    q, k = meta(1, 2, 10, 8), meta(1, 2, 6, 8)
    assert count_flops(lambda: nn.functional.scaled_dot_product_attention(q, k, k)) == 2 * (2 * 2 * 10 * 6 * 8)


def test_v1_flops_match_published_counts():
    settings, scan = Settings(), Scan("fp32", 1, 512)
    model = networks.on_meta(settings.model_config["model"])
    # 803.3 and 2514.5 GFLOP, also by others' counts: 338.8 GMAC without attention's 126.1, 1273.7 GMAC
    assert unet_flops(settings, scan, model.model.diffusion_model) / 2e9 == pytest.approx(803.27, abs=0.01)
    assert vae_flops(settings, model.first_stage_model, "decode", scan) / 1e9 == pytest.approx(2514.5, abs=0.1)


def test_a_peak_is_measured():
    assert 1e8 < measure_peak_flops(torch.device("cpu"), torch.float32) < 1e15
