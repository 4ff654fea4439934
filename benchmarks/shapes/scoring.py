"""Accuracy of a model on prompt sets of synthetic scenes, and reconstruction quality of its first stage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmarks.shapes.evaluator import Match, evaluate
from ldm import inference
from ldm.data.shapes import SIDE, Scene, ShapesDataset, describe, parse, render
from ldm.images import tensor_to_images
from ldm.models.diffusion.noise import SeededNoise
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

PARTS = ("objects", "sizes", "background", "relation")
_FIRST_SEED = 1_000_000  # training uses small seeds


@dataclass(frozen=True)
class PromptSet:
    """Prompts with a number of objects, of held-out pairs or not, complete or only with colours and shapes."""

    title: str
    objects: int = 1
    held_out: bool = False
    complete: bool = False


PROMPT_SETS: dict[str, PromptSet] = {
    "single": PromptSet('one object, "a red circle"'),
    "single-full": PromptSet("one object, complete captions", complete=True),
    "relation": PromptSet("two objects with a relation, complete captions", objects=2, complete=True),
    "relation-plain": PromptSet('two objects, "a red circle above a blue square"', objects=2),
    "held-out": PromptSet("one object, pairs never seen in training", held_out=True),
    "held-out-relation": PromptSet("two objects, both pairs never seen in training", objects=2, held_out=True),
}


def plain(scene: Scene) -> str:
    """Caption a scene of one or two objects by colours, shapes and relation only."""
    return f" {scene.relation} ".join(f"a {item.colour} {item.shape}" for item in scene.items)


def scenes_of(prompt_set: str, count: int, seed: int = 0) -> list[Scene]:
    """Return `count` scenes of one of the `PROMPT_SETS`, determined by `seed`; training uses none of them."""
    wanted = PROMPT_SETS[prompt_set]
    weights = [float(number == wanted.objects) for number in range(1, wanted.objects + 1)]
    data = ShapesDataset(count, _FIRST_SEED + seed, weights, held_out=wanted.held_out)
    return [data.scene(i) for i in range(count)]


def prompts_of(prompt_set: str, count: int, seed: int = 0) -> list[str]:
    """Return the captions of `scenes_of`."""
    caption = describe if PROMPT_SETS[prompt_set].complete else plain
    return [caption(scene) for scene in scenes_of(prompt_set, count, seed)]


def binomial_interval(right: int, count: int) -> tuple[float, float]:
    """Compute the 95 % confidence interval of a fraction `right` / `count` (Wilson 1927)."""
    z = 1.959963984540054  # 95 % of the normal distribution lie within this many standard deviations
    fraction = right / count
    middle = fraction + z**2 / (2 * count)
    half = z * math.sqrt(fraction * (1 - fraction) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def summary(prompts: Sequence[str], matches: Sequence[Match]) -> dict[str, Any]:
    """Count images that match completely, and by part; None for parts that no prompt mentions."""
    parsed = [parse(prompt) for prompt in prompts]
    mentioned = {
        "objects": True,
        "sizes": any(item.size for items, _, _ in parsed for item in items),
        "background": any(background for _, _, background in parsed),
        "relation": any(relation for _, relation, _ in parsed),
    }
    right = sum(match.all for match in matches)
    return {
        "prompts": len(prompts),
        "right": right,
        "accuracy": right / len(prompts),
        "interval": binomial_interval(right, len(prompts)),
        "parts": {
            part: sum(getattr(match, part) for match in matches) / len(matches) if mentioned[part] else None
            for part in PARTS
        },
        "wrong": [
            {"index": i, "prompt": prompt, "parts": [part for part in PARTS if not getattr(match, part)]}
            for i, (prompt, match) in enumerate(zip(prompts, matches))
            if not match.all
        ],
    }


def evaluate_all(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[Match]:
    """Evaluate each image against its prompt."""
    return [evaluate(np.asarray(image), prompt) for image, prompt in zip(images, prompts)]


def generate_all(
    model: LatentDiffusion, prompts: Sequence[str], batch: int, seed: int, title: str = "Sampling", **options: Any
) -> list[Image.Image]:
    """Generate an image per prompt in batches, with one random stream from `seed` on.

    `options` are those of `ldm.inference.txt2img`.
    """
    noise = SeededNoise(seed)
    images: list[Image.Image] = []
    with tqdm(total=len(prompts), desc=title, unit="image") as bar:
        for texts in _batches(prompts, batch):
            images += inference.txt2img(model, texts, noise=noise, progress=False, **options)
            bar.update(len(texts))
    return images


def check_model(model: LatentDiffusion) -> None:
    """Raise ValueError for a model of another image size than the evaluator's."""
    side = inference.default_size(model)
    if side != SIDE:
        raise ValueError(f"the evaluator needs scenes of {SIDE}x{SIDE} pixels, but this model generates {side}x{side}")


@torch.no_grad()
def reconstruct(model: LatentDiffusion, images: Tensor) -> Tensor:
    """Encode and decode images (B, 3, H, W) in [-1, 1], by the mean of a posterior; clamped to [-1, 1]."""
    encoded = model.encode_first_stage(images.to(model.device))
    if isinstance(encoded, DiagonalGaussianDistribution):
        encoded = encoded.mode()
    return model.decode_first_stage(model.scale_factor * encoded).float().clamp(-1, 1).cpu()


def score_first_stage(
    model: LatentDiffusion, count: int, batch: int, seed: int = 0
) -> tuple[dict[str, Any], list[Image.Image], list[Image.Image]]:
    """Score reconstructions of `count` scenes that training does not use.

    Returns:
        (scores, originals, reconstructions). The scores are the PSNR over all pixels in dB and the accuracy of the
        reconstructions, which bounds that of samples.
    """
    data = ShapesDataset(count, _FIRST_SEED + seed)
    scenes = [data.scene(i) for i in range(count)]
    originals = [Image.fromarray(render(scene)) for scene in scenes]
    reconstructions: list[Image.Image] = []
    squares = 0.0
    with tqdm(total=count, desc="first stage", unit="image") as bar:
        for part in _batches(originals, batch):
            images = torch.from_numpy(np.stack(part)).movedim(-1, 1).float() / 127.5 - 1  # (B, 3, H, W)
            back = reconstruct(model, images)
            squares += float((back - images).double().square().sum()) / 4  # of values in [0, 1]
            reconstructions += tensor_to_images(back)
            bar.update(len(part))
    captions = [describe(scene) for scene in scenes]
    scores = summary(captions, evaluate_all(reconstructions, captions))
    scores["psnr"] = -10 * math.log10(max(squares / (count * SIDE * SIDE * 3), 1e-12))
    return scores, originals, reconstructions


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
