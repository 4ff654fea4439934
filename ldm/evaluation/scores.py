"""How many prompts of drawn scenes a model gets right, by the judge, and how well its first stage keeps pictures."""

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

from ldm import inference
from ldm.data.shapes import SIDE, Scene, ShapesDataset, describe, draw, parse
from ldm.data.shapes_judge import Verdict, judge
from ldm.images import tensor_to_images
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

PARTS = ("objects", "sizes", "background", "relation")
_FRESH = 1_000_000  # seeds of the prompts start here; training takes small ones


@dataclass(frozen=True)
class Kind:
    """A kind of prompts: of how many objects, whether of the pairs never seen, and whether everything is said."""

    title: str
    objects: int = 1
    held_out: bool = False
    complete: bool = False


KINDS: dict[str, Kind] = {
    "single": Kind('one object, "a red circle"'),
    "single-full": Kind("one object, everything said", complete=True),
    "relation": Kind("two objects with a relation, everything said", objects=2, complete=True),
    "relation-plain": Kind('two objects, "a red circle above a blue square"', objects=2),
    "held-out": Kind("one object, pairs never seen in training", held_out=True),
    "held-out-relation": Kind("two objects, both pairs never seen in training", objects=2, held_out=True),
}


def plain(scene: Scene) -> str:
    """Colours and shapes of a scene of one or two objects, and their relation."""
    return f" {scene.relation} ".join(f"a {item.colour} {item.shape}" for item in scene.items)


def scenes_of(kind: str, count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes of one of the `KINDS` that no training has drawn; fixed by `seed`."""
    wanted = KINDS[kind]
    shares = [float(number == wanted.objects) for number in range(1, wanted.objects + 1)]
    data = ShapesDataset(count, _FRESH + seed, shares, held_out=wanted.held_out)
    return [data.scene(i) for i in range(count)]


def prompts_of(kind: str, count: int, seed: int = 0) -> list[str]:
    """`count` prompts of one of the `KINDS`, for its `scenes_of`."""
    return [(describe if KINDS[kind].complete else plain)(scene) for scene in scenes_of(kind, count, seed)]


def binomial_interval(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of which `right` of `count` were seen (Wilson 1927)."""
    z = 1.959963984540054  # of the normal distribution 95 % lie within this many standard deviations
    share = right / count
    middle = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    scale = 1 + z**2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def summary(prompts: Sequence[str], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts over the pictures of some prompts: fully right, and right by part; None where no prompt says the part."""
    read = [parse(prompt) for prompt in prompts]
    said = {
        "objects": True,
        "sizes": any(item.size for items, _, _ in read for item in items),
        "background": any(background for _, _, background in read),
        "relation": any(relation for _, relation, _ in read),
    }
    right = sum(verdict.all for verdict in verdicts)
    return {
        "prompts": len(prompts),
        "right": right,
        "share": right / len(prompts),
        "interval": binomial_interval(right, len(prompts)),
        "parts": {
            part: sum(getattr(verdict, part) for verdict in verdicts) / len(verdicts) if said[part] else None
            for part in PARTS
        },
        "wrong": [
            {"index": i, "prompt": prompt, "parts": [part for part in PARTS if not getattr(verdict, part)]}
            for i, (prompt, verdict) in enumerate(zip(prompts, verdicts))
            if not verdict.all
        ],
    }


def judge_all(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[Verdict]:
    """The judge's verdict on each picture."""
    return [judge(np.asarray(picture), prompt) for picture, prompt in zip(pictures, prompts)]


def draw_all(
    model: LatentDiffusion, prompts: Sequence[str], batch: int, seed: int, title: str = "drawing", **options: Any
) -> list[Image.Image]:
    """A picture of each prompt, in batches whose random numbers follow each other from `seed` on.

    `options` are those of `ldm.inference.txt2img`.
    """
    inference.seed_everything(seed)
    pictures: list[Image.Image] = []
    with tqdm(total=len(prompts), desc=title, unit="picture") as bar:
        for texts in _batches(prompts, batch):
            pictures += inference.txt2img(model, texts, progress=False, **options)
            bar.update(len(texts))
    return pictures


def check_model(model: LatentDiffusion) -> None:
    """Raise ValueError for a model that does not draw the scenes that the judge reads."""
    side = inference.default_size(model)
    if side != SIDE:
        raise ValueError(f"the judge reads drawn scenes of {SIDE}x{SIDE} pixels, but this model draws {side}x{side}")


@torch.no_grad()
def reconstruct(model: LatentDiffusion, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] through the first stage and back, by the mean of a posterior; cut to [-1, 1]."""
    encoded = model.encode_first_stage(images.to(model.device))
    if isinstance(encoded, DiagonalGaussianDistribution):
        encoded = encoded.mode()
    return model.decode_first_stage(model.scale_factor * encoded).float().clamp(-1, 1).cpu()


def score_first_stage(
    model: LatentDiffusion, count: int, batch: int, seed: int = 0
) -> tuple[dict[str, Any], list[Image.Image], list[Image.Image]]:
    """(scores, originals, reconstructions) of `count` scenes that no training has drawn.

    The scores are the peak signal-to-noise ratio over all pixels in dB, and what the judge makes of the
    reconstructions: no sample can be expected to do better.
    """
    data = ShapesDataset(count, _FRESH + seed)
    scenes = [data.scene(i) for i in range(count)]
    originals = [Image.fromarray(draw(scene)) for scene in scenes]
    reconstructions: list[Image.Image] = []
    squares = 0.0
    with tqdm(total=count, desc="first stage", unit="picture") as bar:
        for part in _batches(originals, batch):
            images = torch.from_numpy(np.stack(part)).movedim(-1, 1).float() / 127.5 - 1  # (B, 3, H, W)
            back = reconstruct(model, images)
            squares += float((back - images).double().square().sum()) / 4  # of values in [0, 1]
            reconstructions += tensor_to_images(back)
            bar.update(len(part))
    captions = [describe(scene) for scene in scenes]
    scores = summary(captions, judge_all(reconstructions, captions))
    scores["psnr"] = -10 * math.log10(max(squares / (count * SIDE * SIDE * 3), 1e-12))
    return scores, originals, reconstructions


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
