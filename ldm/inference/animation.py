"""Interpolation between prompts, seeds, or both, as frames of an animation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.inference.conditioning import TEXT, Conditioning, require
from ldm.inference.options import SamplingOptions
from ldm.inference.pipeline import OnStep, Pipeline
from ldm.models.diffusion.noise import InterpolatedNoise, PerImageNoise, slerp

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

CONTEXTS = ("linear", "slerp")


@dataclass(frozen=True)
class Frame:
    """A frame between two keys (a prompt and a seed each); weight 0 is `start`, 1 is `end`."""

    start: int
    end: int
    weight: float


def frames_between(keys: int, count: int, loop: bool = False) -> list[Frame]:
    """Spread `count` frames evenly from key 0 to the last; with `loop` on to key 0, whose frame is not repeated.

    Raises:
        ValueError: for fewer than 2 keys, or fewer frames than keys.
    """
    if keys < 2:
        raise ValueError("one prompt and one seed leave nothing to interpolate: give two prompts or more, or two seeds")
    if count < keys:
        raise ValueError(f"{count} frames cannot show {keys} keys: give at least as many")
    frames = []
    for number in range(count):
        place = number * keys / count if loop else number * (keys - 1) / (count - 1)
        start = min(int(place), keys - 1 if loop else keys - 2)
        frames.append(Frame(start, (start + 1) % keys, place - start))
    return frames


def pair_keys(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """Repeat a single prompt or seed so that there are as many of both; ValueError for other numbers."""
    keys = max(len(prompts), len(seeds))
    if {len(prompts), len(seeds)} - {1, keys} or not prompts or not seeds:
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds do not pair: give as many, or one of either")
    return [*prompts] * (keys // len(prompts)), [*seeds] * (keys // len(seeds))


@torch.no_grad()
def interpolate(
    model: LatentDiffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    frames: Sequence[Frame],
    *,
    batch_size: int = 1,
    contexts: str = "linear",
    options: SamplingOptions | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
    **overrides: Any,
) -> Iterator[list[Image.Image]]:
    """Generate the images of `frames` in batches, as they come. A frame at a key is what `txt2img` gives for its seed.

    Args:
        model: A text-conditional model.
        prompts, seeds: Those of the keys; a single one serves all keys.
        frames: From `frames_between`.
        batch_size: Frames per batch.
        contexts: How to interpolate encoded prompts: "linear" or "slerp". Noise is interpolated with `slerp`.
        options, on_step, progress, **overrides: See `txt2img`.
    """
    require(model, TEXT)
    if contexts not in CONTEXTS:
        raise ValueError(f"contexts {contexts!r} is not one of {', '.join(CONTEXTS)}")
    prompts, seeds = pair_keys(prompts, seeds)
    pipe = Pipeline(model)
    options = pipe.resolve(options, **overrides)
    pipe.latent_shape(batch_size, options)
    with pipe.inference_mode(options):
        keys = pipe.encode_prompts(prompts, options)
    for first in range(0, len(frames), batch_size):
        batch = frames[first : first + batch_size]
        cond, uncond = (None if c is None else interpolated(c, batch, contexts) for c in (keys.cond, keys.uncond))
        starts, ends = (PerImageNoise([seeds[key] for key in end]) for end in _ends(batch))
        noise = InterpolatedNoise(starts, ends, [frame.weight for frame in batch])
        with pipe.inference_mode(options):
            latents = pipe.sample(Conditioning(cond, uncond), options, noise, on_step=on_step, progress=progress)
            images = pipe.decode(latents)
        yield images


def interpolated(encodings: Tensor, frames: Sequence[Frame], contexts: str) -> Tensor:
    """Encodings (B, L, D) of frames, from those of all keys (K, L, D)."""
    start, end = (encodings[keys] for keys in _ends(frames))
    weights = [frame.weight for frame in frames]
    if contexts == "slerp":
        return slerp(start, end, weights)
    return torch.lerp(start, end, torch.tensor(weights, device=start.device, dtype=start.dtype)[:, None, None])


def _ends(frames: Sequence[Frame]) -> tuple[list[int], list[int]]:
    return [frame.start for frame in frames], [frame.end for frame in frames]
