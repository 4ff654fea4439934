"""The UNet with guidance: two predictions a picture. On a GPU, the whole loop that it draws in, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.comparing import Bench, Contender
from benchmarks.networks import build_ours, on_meta, with_weights
from benchmarks.roofline import count
from benchmarks.rows import Row, row_of
from benchmarks.settings import Scan, Settings

TOKENS = 77
SCALE = 7.5
LOOP_STEPS = 50  # of the loop on a GPU; elsewhere it is only measured when asked for
Build = Callable[[], nn.Module]


def rows(bench: Bench) -> Iterator[Row]:
    """A call of the network and the loop, of every scan."""
    settings = bench.settings
    meta = on_meta(settings.model_config["model"]).model.diffusion_model
    weights: tuple[torch.dtype, nn.Module] | None = None
    for scan in settings.scans():
        if weights is None or weights[0] != scan.dtype:
            weights = None  # two sets would be one too many
            weights = scan.dtype, with_weights(meta, settings.device, scan.dtype)
        yield from _calls(bench, scan, meta, weights[1])
        steps = settings.loop_steps if settings.loop_steps is not None else LOOP_STEPS if settings.on_gpu else 0
        if steps:
            yield from _loops(bench, scan, meta, weights[1], steps)


def _builds(settings: Settings, weights: nn.Module) -> Iterator[tuple[str, bool, Build]]:
    """(who, whether it is theirs, how to make it) of everybody."""
    for way in settings.ways:
        yield f"ours {way}", False, partial(build_ours, weights, way, settings.device)
    if settings.compare:
        for way in peers.peer_ways(settings.device):
            build = partial(_theirs, settings, weights, way)
            yield f"diffusers {way}", True, build


def _theirs(settings: Settings, weights: nn.Module, way: str) -> nn.Module:
    return peers.made_ready(peers.unet(settings.model_config, weights), way)


def inputs(settings: Settings, scan: Scan, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (2 B, C, h, w), timesteps (2 B,) and contexts (2 B, L, D) of B pictures under guidance."""
    unet = settings.model_config["model"]["params"]["unet_config"]["params"]
    side, count = settings.latent(scan.size), 2 * scan.batch
    shapes = (count, unet["in_channels"], side, side), (count, TOKENS, unet["context_dim"])
    if torch.device(device).type == "meta":
        x, context = (torch.empty(shape, device=device) for shape in shapes)
    else:
        generator = torch.Generator().manual_seed(1)
        x, context = (torch.randn(shape, generator=generator).to(device, scan.dtype) for shape in shapes)
    return x, torch.full((count,), 981, device=device), context


def flops(settings: Settings, scan: Scan, meta: nn.Module) -> int:
    """Operations of a call of the network."""
    x, t, context = inputs(settings, scan, "meta")
    return count(lambda: meta(x, t, context=context))


def _row(bench: Bench, scan: Scan, what: str, who: str, operations: int, **more: Any) -> Row:
    int8 = who.endswith("int8")  # whose peak is another
    more |= {} if int8 else {"flops": operations, "peak": bench.peak(scan.precision)}
    return row_of("unet", what, who, bench.settings.device, scan, **more)


def _calls(bench: Bench, scan: Scan, meta: nn.Module, weights: nn.Module) -> Iterator[Row]:
    settings, operations = bench.settings, flops(bench.settings, scan, meta)
    x, t, context = inputs(settings, scan, settings.device)

    def ready(build: Build, theirs: bool) -> Callable[[], Tensor]:
        network = build()
        if theirs:
            return lambda: network(x, t, encoder_hidden_states=context, return_dict=False)[0]
        return lambda: network(x, t, context=context)

    yield from bench.compare(
        [
            Contender(_row(bench, scan, "guided call", who, operations), partial(ready, build, theirs))
            for who, theirs, build in _builds(settings, weights)
        ]
    )


def _loops(bench: Bench, scan: Scan, meta: nn.Module, weights: nn.Module, steps: int) -> Iterator[Row]:
    settings, operations = bench.settings, steps * flops(bench.settings, scan, meta)
    x, _, context = inputs(settings, scan, settings.device)
    x, (context, nothing) = x[: scan.batch], context.chunk(2)

    def ready(build: Build, theirs: bool) -> Callable[[], Tensor]:
        network = build()
        if theirs:
            draw = peers.pipeline(settings.model_config, network)
            return lambda: draw(x, context, nothing, steps, SCALE)
        return our_loop(settings, network, x.float(), context, nothing, steps)  # noise is float32 in any precision

    yield from bench.compare(
        [
            Contender(
                _row(bench, scan, f"loop of {steps} steps", who, operations, items=steps), partial(ready, build, theirs)
            )
            for who, theirs, build in _builds(settings, weights)
        ]
    )


def our_loop(
    settings: Settings, network: nn.Module, x: Tensor, context: Tensor, nothing: Tensor, steps: int
) -> Callable[[], Tensor]:
    """Drawing by DDIM from latents x (B, C, h, w) under contexts (B, L, D), by the library's own loop."""
    from ldm.inference import Guided, draw
    from ldm.inference.pipeline import drawing
    from ldm.models.diffusion.guidance import Guidance

    model = on_meta(settings.model_config["model"])
    model.first_stage_model = model.cond_stage_model = nn.Identity()  # not needed, and without weights
    model.model.diffusion_model = network
    model.to(settings.device)
    guided = Guided(context, nothing, Guidance(SCALE))

    # the places of diffusers' steps: of the published ones there is one more where the number does not divide 1000
    how: dict[str, Any] = {"steps": steps, "sampler": "ddim", "schedule": "leading", "x_T": x, "progress": False}

    def loop() -> Tensor:
        with drawing(model):
            return draw(model, guided, x.shape[1:], len(x), **how)

    return loop
