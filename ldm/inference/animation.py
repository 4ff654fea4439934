"""From one picture to another in small steps: between prompts, between seeds, or both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm.inference.conditioning import TEXT, require
from ldm.inference.loading import sampling_plan
from ldm.inference.pipeline import OnStep, decode, draw, drawing, resolve_size, text_condition
from ldm.inference.prompts import DEFAULT_PROMPT_OPTIONS, PromptOptions
from ldm.inference.seamless import seamless
from ldm.models.diffusion.noise import InterpolatedNoise, PerImageNoise, slerp
from ldm.models.diffusion.schedules import ScheduleChoice

if TYPE_CHECKING:
    from PIL import Image

    from ldm.models.diffusion.ddpm import LatentDiffusion

CONTEXTS = ("linear", "slerp")


@dataclass(frozen=True)
class Frame:
    """A frame on the way from one key (a prompt and a seed) to another; weight: 0 is the one, 1 the other."""

    start: int
    end: int
    weight: float


def frames_between(keys: int, count: int, loop: bool = False) -> list[Frame]:
    """`count` frames evenly from key 0 to the last; with `loop` on to key 0 again, whose frame is not repeated.

    ValueError for fewer keys than 2, or frames than keys.
    """
    if keys < 2:
        raise ValueError("there is no way from one prompt and seed alone: give two prompts or more, or two seeds")
    if count < keys:
        raise ValueError(f"{count} frames cannot show {keys} keys: give at least as many")
    frames = []
    for number in range(count):
        place = number * keys / count if loop else number * (keys - 1) / (count - 1)
        start = min(int(place), keys - 1 if loop else keys - 2)
        frames.append(Frame(start, (start + 1) % keys, place - start))
    return frames


def as_many(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """Prompts and seeds of the keys: as many of both, where one alone serves for all. ValueError for other numbers."""
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
    negative_prompt: str | Sequence[str] = "",
    reading: PromptOptions = DEFAULT_PROMPT_OPTIONS,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    eta: float = 0.0,
    scale: float | Sequence[float] | None = None,
    schedule: ScheduleChoice | None = None,
    guidance: Mapping[str, Any] | None = None,
    tiling: str | None = None,
    on_step: OnStep | None = None,
    progress: bool = True,
) -> Iterator[list[Image.Image]]:
    """Pictures of `frames` (see `frames_between`), in batches as they come; key i is of prompt i and seed i.

    Noise goes from seed to seed on the arc (`slerp`), at every draw; contexts: whether the prompts' encodings go
    straight ("linear") or on the arc ("slerp"). A frame at a key is what `txt2img` draws with a list of seeds. The rest
    as in `txt2img`.
    """
    require(model, TEXT)
    if contexts not in CONTEXTS:
        raise ValueError(f"contexts {contexts!r} is not one of {', '.join(CONTEXTS)}")
    prompts, seeds = as_many(prompts, seeds)
    shape = (model.channels, *model.latent_size(*resolve_size(model, height, width)))
    how, guided_by = sampling_plan(model, 7.5, steps, sampler, scale, eta, schedule, guidance)
    how |= {"on_step": on_step, "progress": progress}
    with drawing(model):
        keys = text_condition(model, prompts, negative_prompt, guided_by, reading)
    for first in range(0, len(frames), batch_size):
        batch = frames[first : first + batch_size]
        cond, uncond = (None if c is None else mixed(c, batch, contexts) for c in (keys.cond, keys.uncond))
        guided = replace(keys, cond=cond, uncond=uncond)
        starts, ends = (PerImageNoise([seeds[key] for key in end]) for end in _ends(batch))
        noise = InterpolatedNoise(starts, ends, [frame.weight for frame in batch])
        with drawing(model), seamless(model, tiling):
            latents = draw(model, guided, shape, len(batch), **how, noise=noise)
            pictures = decode(model, latents)
        yield pictures


def mixed(encodings: Tensor, frames: Sequence[Frame], contexts: str) -> Tensor:
    """Of the encodings of all keys (K, L, D), those of frames between them (B, L, D)."""
    start, end = (encodings[keys] for keys in _ends(frames))
    weights = [frame.weight for frame in frames]
    if contexts == "slerp":
        return slerp(start, end, weights)
    return torch.lerp(start, end, torch.tensor(weights, device=start.device, dtype=start.dtype)[:, None, None])


def _ends(frames: Sequence[Frame]) -> tuple[list[int], list[int]]:
    return [frame.start for frame in frames], [frame.end for frame in frames]
