"""The text encoder: 77 tokens of a prompt to its context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.comparing import Bench, Contender
from benchmarks.networks import build_ours, on_meta, with_weights
from benchmarks.roofline import count
from benchmarks.rows import Row, row_of
from ldm.modules.encoders.clip_text import CLIPTextModel


def rows(bench: Bench) -> Iterator[Row]:
    """A prompt, and as many as there are batches to scan. ValueError unless the model reads with CLIP."""
    settings = bench.settings
    meta = getattr(on_meta(settings.model_config["model"]).cond_stage_model, "transformer", None)
    if not isinstance(meta, CLIPTextModel):
        raise ValueError(f"--suite text measures CLIP, which {settings.config} does not have: leave the suite out")
    length, vocabulary = meta.config.max_position_embeddings, meta.config.vocab_size
    for scan in settings.scans(only_size=settings.own_size):
        weights = with_weights(meta, settings.device, scan.dtype)
        shape = (scan.batch, length)
        tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1)).to(settings.device)
        operations = count(partial(meta, torch.zeros(shape, dtype=torch.long, device="meta")))

        def ours(weights=weights, tokens=tokens) -> Callable[[], Tensor]:
            network = build_ours(weights, "eager", settings.device)
            return lambda: network(tokens).last_hidden_state

        def theirs(weights=weights, tokens=tokens) -> Callable[[], Tensor]:
            network = peers.text(weights)
            return lambda: network(tokens).last_hidden_state

        builds = {"ours eager": ours} | ({"transformers eager": theirs} if settings.compare else {})
        more = {"flops": operations, "peak": bench.peak(scan.precision), "items": scan.batch, "unit": "prompts"}
        found = [
            Contender(row_of("text", f"{length} tokens", who, settings.device, scan, **more), build)
            for who, build in builds.items()
        ]
        for contender in found:
            contender.row.size = None
        yield from bench.compare(found)
