"""The first stage: decoding latents to pictures, and encoding pictures to latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.comparing import Bench, Contender
from benchmarks.networks import build_ours, decode_ours, encode_ours, in_channels_last, on_meta, with_weights
from benchmarks.roofline import count
from benchmarks.rows import Row, row_of
from benchmarks.settings import Scan, Settings

if TYPE_CHECKING:
    from ldm.models.autoencoder import AutoencoderKL

WAYS = ("eager",)  # of the first stage
KINDS = ("decode", "encode")


def rows(bench: Bench) -> Iterator[Row]:
    """Both directions, of every scan."""
    settings = bench.settings
    meta = on_meta(settings.model_config["model"]).first_stage_model
    weights: tuple[torch.dtype, AutoencoderKL] | None = None
    for scan in settings.scans():
        if weights is None or weights[0] != scan.dtype:
            weights = scan.dtype, with_weights(meta, settings.device, scan.dtype)
        for kind in KINDS:
            operations = flops(settings, meta, kind, scan)
            yield from bench.compare(
                [
                    Contender(
                        row_of(
                            "vae",
                            kind,
                            who,
                            settings.device,
                            scan,
                            flops=operations,
                            peak=bench.peak(scan.precision),
                            items=scan.batch,
                            unit="images",
                        ),
                        build,
                    )
                    for who, build in contenders(settings, weights[1], kind, scan)
                ]
            )


def flops(settings: Settings, meta: AutoencoderKL, kind: str, scan: Scan) -> int:
    """Operations of a call, without tiles."""
    x = torch.empty(shape(settings, kind, scan), device="meta")
    return count(lambda: meta.decode(x) if kind == "decode" else meta.encode(x))


def shape(settings: Settings, kind: str, scan: Scan) -> tuple[int, int, int, int]:
    """Of what is decoded or encoded."""
    side = settings.latent(scan.size)
    channels = settings.model_config["model"]["params"]["first_stage_config"]["params"]["embed_dim"]
    return (scan.batch, channels, side, side) if kind == "decode" else (scan.batch, 3, scan.size, scan.size)


def contenders(
    settings: Settings, weights: AutoencoderKL, kind: str, scan: Scan
) -> Iterator[tuple[str, Callable[[], Callable[[], Tensor]]]]:
    """(who, how to make it ready) of everybody."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape(settings, kind, scan), generator=generator).to(settings.device, scan.dtype)
    x = x if kind == "decode" else x.clamp(-1, 1)

    def ours(way: str) -> Callable[[], Tensor]:
        return partial(decode_ours if kind == "decode" else encode_ours, build_ours(weights, way, settings.device), x)

    def theirs(way: str) -> Callable[[], Tensor]:
        """Theirs, made ready as `peers` makes the UNet."""
        network = in_channels_last(peers.vae(settings.model_config, weights))
        decode, encode = network.decode, network.encode
        if way == "compiled":
            decode, encode = peers.compiled(decode), peers.compiled(encode)
        if kind == "decode":
            return lambda: decode(x).sample
        return lambda: encode(x).latent_dist.mean

    for way in WAYS:
        yield f"ours {way}", partial(ours, way)
    if settings.compare:
        for way in peers.peer_ways(settings.device):
            yield f"diffusers {way}", partial(theirs, way)
