"""Speed of the networks: UNet with guidance, first stage, text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks import networks
from benchmarks.compare import Bench, Contender
from benchmarks.measure import count_flops
from benchmarks.networks import on_meta, prepare, with_weights
from benchmarks.settings import Row, Scan, Settings, row_of
from ldm.modules.encoders.clip_text import CLIPTextModel

if TYPE_CHECKING:
    from ldm.models.autoencoder import AutoencoderKL

TOKENS = 77
SCALE = 7.5
LOOP_STEPS = 50  # default on a GPU
DIRECTIONS = ("decode", "encode")
Ready = Callable[[], Tensor]


def _weights(settings: Settings, meta: nn.Module) -> Iterator[tuple[Scan, Any]]:
    """Iterate over scans and the network's weights in their precision."""
    weights: tuple[torch.dtype, nn.Module] | None = None
    for scan in settings.scans():
        if weights is None or weights[0] != scan.dtype:
            weights = None  # free the last before the next
            weights = scan.dtype, with_weights(meta, settings.device, scan.dtype)
        yield scan, weights[1]


def _noise(settings: Settings, scan: Scan, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(settings.device, scan.dtype) for shape in shapes]


# ---- UNet ----


def unet(bench: Bench) -> Iterator[Row]:
    """Measure a guided call (two predictions per image), and the sampling loop."""
    settings = bench.settings
    meta = on_meta(settings.model_config["model"]).model.diffusion_model
    steps = settings.loop_steps if settings.loop_steps is not None else LOOP_STEPS if settings.on_gpu else 0
    for scan, weights in _weights(settings, meta):
        operations = unet_flops(settings, scan, meta)
        yield from bench.compare(list(_unet_contenders(bench, scan, weights, "guided call", operations, 1)))
        if steps:
            what = f"loop of {steps} steps"
            yield from bench.compare(list(_unet_contenders(bench, scan, weights, what, operations * steps, steps)))


def _unet_contenders(
    bench: Bench, scan: Scan, weights: nn.Module, what: str, operations: int, steps: int
) -> Iterator[Contender]:
    settings, config = bench.settings, bench.settings.model_config
    shapes = unet_shapes(settings, scan)
    x, context = _noise(settings, scan, *shapes)
    t = torch.full((len(x),), 981, device=settings.device)
    loop = what != "guided call"

    def ours(mode: str) -> Ready:
        network = prepare(weights, mode, settings.device, config)
        if loop:
            return our_loop(settings, network, x[: scan.batch].float(), *context.chunk(2), steps)
        return lambda: network(x, t, context=context)

    def theirs(mode: str) -> Ready:
        network = networks.prepare_baseline(networks.diffusers_unet(config, weights), mode)
        if loop:
            sample = networks.diffusers_loop(config, network)
            return partial(sample, x[: scan.batch], *context.chunk(2), steps, SCALE)
        return lambda: network(x, t, encoder_hidden_states=context, return_dict=False)[0]

    builds = {f"ours {mode}": partial(ours, mode) for mode in settings.modes}
    if settings.compare:
        builds |= {f"diffusers {mode}": partial(theirs, mode) for mode in networks.baseline_modes(settings.device)}
    for who, build in builds.items():
        counted = {} if who.endswith("int8") else {"flops": operations, "peak": bench.peak(scan.precision)}
        yield Contender(row_of("unet", what, who, settings.device, scan, items=steps, **counted), build)


def unet_shapes(settings: Settings, scan: Scan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of latents (2 B, C, h, w) and contexts (2 B, L, D) of B images with guidance."""
    params = settings.model_config["model"]["params"]["unet_config"]["params"]
    side, count = settings.latent(scan.size), 2 * scan.batch
    return (count, params["in_channels"], side, side), (count, TOKENS, params["context_dim"])


def unet_flops(settings: Settings, scan: Scan, meta: nn.Module) -> int:
    """Count the operations of a call."""
    x, context = (torch.empty(shape, device="meta") for shape in unet_shapes(settings, scan))
    return count_flops(lambda: meta(x, torch.full((len(x),), 981, device="meta"), context=context))


def our_loop(
    settings: Settings, network: nn.Module, x: Tensor, context: Tensor, unconditional: Tensor, steps: int
) -> Ready:
    """Return a function that samples by DDIM from latents x (B, C, h, w) with contexts (B, L, D)."""
    from ldm.models.diffusion.samplers import make_sampler

    sampler = make_sampler(networks.around(settings.model_config, network, settings.device), "ddim")
    # diffusers' timesteps; the published ones have one more where the number does not divide 1000
    options: dict[str, Any] = {"schedule": "leading", "verbose": False, "x_T": x}
    options |= {"unconditional_guidance_scale": SCALE, "unconditional_conditioning": unconditional}
    return lambda: sampler.sample(steps, len(x), x.shape[1:], context, **options)[0]


# ---- first stage ----


def vae(bench: Bench) -> Iterator[Row]:
    """Measure decoding and encoding."""
    settings = bench.settings
    meta = on_meta(settings.model_config["model"]).first_stage_model
    for scan, weights in _weights(settings, meta):
        for direction in DIRECTIONS:
            counted = {"flops": vae_flops(settings, meta, direction, scan), "peak": bench.peak(scan.precision)}
            counted |= {"items": scan.batch, "unit": "images"}
            builds = vae_builds(settings, weights, direction, scan)
            yield from bench.compare(
                [
                    Contender(row_of("vae", direction, who, settings.device, scan, **counted), build)
                    for who, build in builds.items()
                ]
            )


def vae_flops(settings: Settings, meta: AutoencoderKL, direction: str, scan: Scan) -> int:
    """Count the operations of a call, without tiles."""
    x = torch.empty(vae_shape(settings, direction, scan), device="meta")
    return count_flops(lambda: meta.decode(x) if direction == "decode" else meta.encode(x))


def vae_shape(settings: Settings, direction: str, scan: Scan) -> tuple[int, int, int, int]:
    """Return the shape of the input."""
    side = settings.latent(scan.size)
    channels = settings.model_config["model"]["params"]["first_stage_config"]["params"]["embed_dim"]
    return (scan.batch, channels, side, side) if direction == "decode" else (scan.batch, 3, scan.size, scan.size)


def vae_builds(
    settings: Settings, weights: AutoencoderKL, direction: str, scan: Scan
) -> dict[str, Callable[[], Ready]]:
    """Return, by contender, functions that prepare a call."""
    (x,) = _noise(settings, scan, vae_shape(settings, direction, scan))
    x = x if direction == "decode" else x.clamp(-1, 1)

    def ours() -> Ready:
        stage = prepare(weights, "eager", settings.device)
        return (lambda: stage.decode(x)) if direction == "decode" else (lambda: stage.encode(x).mean)

    def theirs(mode: str) -> Ready:
        network = networks.channels_last(networks.diffusers_vae(settings.model_config, weights))
        decode, encode = network.decode, network.encode
        if mode == "compiled":
            decode, encode = networks.compile_baseline(decode), networks.compile_baseline(encode)
        return (lambda: decode(x).sample) if direction == "decode" else (lambda: encode(x).latent_dist.mean)

    builds: dict[str, Callable[[], Ready]] = {"ours eager": ours}
    if settings.compare:
        builds |= {f"diffusers {mode}": partial(theirs, mode) for mode in networks.baseline_modes(settings.device)}
    return builds


# ---- text encoder ----


def text(bench: Bench) -> Iterator[Row]:
    """Measure the CLIP text encoder. ValueError if the model has none."""
    settings = bench.settings
    meta = getattr(on_meta(settings.model_config["model"]).cond_stage_model, "transformer", None)
    if not isinstance(meta, CLIPTextModel):
        raise ValueError(f"--suite text needs CLIP, which {settings.config} does not have: leave the suite out")
    length, vocabulary = meta.config.max_position_embeddings, meta.config.vocab_size
    for scan in settings.scans(only_size=settings.native_size):
        weights = with_weights(meta, settings.device, scan.dtype)
        shape = (scan.batch, length)
        tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1)).to(settings.device)
        operations = count_flops(partial(meta, torch.zeros(shape, dtype=torch.long, device="meta")))

        def build(make: Callable[[], nn.Module], tokens: Tensor = tokens) -> Ready:
            network = make()
            return lambda: network(tokens).last_hidden_state

        makes: dict[str, Callable[[], nn.Module]] = {"ours eager": partial(prepare, weights, "eager", settings.device)}
        if settings.compare:
            makes["transformers eager"] = partial(networks.transformers_text, weights)
        more = {"flops": operations, "peak": bench.peak(scan.precision), "items": scan.batch, "unit": "prompts"}
        contenders = []
        for who, make in makes.items():
            row = row_of("text", f"{length} tokens", who, settings.device, scan, **more)
            row.size = None
            contenders.append(Contender(row, partial(build, make)))
        yield from bench.compare(contenders)
