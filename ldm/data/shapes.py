"""Synthetic scenes with captions: the training data of the bundled small model.

A scene is a plain background with one to three objects, each with a shape, a colour and a size. Scenes are rendered
with antialiasing, captioned by a small grammar, and determined by their index and a seed. The pairs in `HELD_OUT` never
occur by default, so that models can be tested on combinations that they have not seen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
_SUPERSAMPLE = 4

# near the corners of the RGB cube: a small first stage confuses colours that are close
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 20, 25),
    "green": (20, 170, 35),
    "blue": (25, 50, 235),
    "yellow": (255, 225, 10),
    "cyan": (20, 215, 235),
    "magenta": (235, 30, 215),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (122, 122, 130),
    "tan": (215, 170, 110),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
SIZES: dict[str, float] = {"small": 9.0, "large": 14.5}  # radius in pixels
# Centres lie on multiples of this, the side in pixels of one position of a first stage with factor 8: a shape then has
# the same latents wherever it is, which a small diffusion model needs.
GRID = 8
RELATIONS: dict[str, tuple[int, int]] = {  # the direction from the second object to the first
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
# one pair per shape and per colour
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    zip(SHAPES, ("green", "blue", "magenta", "red", "cyan", "yellow", "black", "white"))
)

# every word of the grammar: the vocabulary of the bundled text encoder
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        ("a", "and", "on", "background", *SIZES, *COLOURS, *BACKGROUNDS, *SHAPES)
        + tuple(word for relation in RELATIONS for word in relation.split())
    )
)


@dataclass(frozen=True)
class Item:
    """One object: centre `x`, `y` and `radius`, half its extent, in pixels of the 64x64 image."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Background, objects, and relation of the first object to the second (None for one object)."""

    background: str
    items: tuple[Item, ...]
    relation: str | None = None


# ---- rendering ----


@cache
def outline(shape: str) -> np.ndarray:
    """Return the polygon (N, 2) of a shape in the square from -1 to 1, y downwards."""
    turn = np.linspace(0, 2 * np.pi, 65)[:-1]
    if shape in ("circle", "ring"):
        points = np.stack([np.cos(turn), np.sin(turn)], 1)
    elif shape == "square":
        points = 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        points = np.array([(0, -0.95), (1, 0.85), (-1, 0.85)])
    elif shape == "star":
        angle = np.arange(10) * np.pi / 5 - np.pi / 2
        points = np.where(np.arange(10) % 2, 0.45, 1.08)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
        points[:, 1] += 0.1
    elif shape == "diamond":
        points = np.array([(0, -1), (0.8, 0), (0, 1), (-0.8, 0)])
    elif shape == "cross":
        arm = 0.32
        points = np.array(
            [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
            + [(arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)]
        )
    elif shape == "heart":
        x = np.sin(turn) ** 3
        y = -(13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)) / 16
        points = np.stack([x, y - 0.1], 1)
    else:
        raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")
    return points


def coverage(shape: str, x: float, y: float, radius: float, side: int = SIDE) -> np.ndarray:
    """Compute the fraction of each pixel that a shape covers, (side, side) float32, from 4x4 samples per pixel."""
    canvas = Image.new("L", (side * _SUPERSAMPLE, side * _SUPERSAMPLE), 0)
    draw = ImageDraw.Draw(canvas)
    centre = np.array([x, y])
    # Pillow puts integer coordinates on pixel centres, hence the half sample
    draw.polygon([tuple(p) for p in (centre + radius * outline(shape)) * _SUPERSAMPLE - 0.5], fill=255)
    if shape == "ring":
        draw.polygon([tuple(p) for p in (centre + 0.5 * radius * outline(shape)) * _SUPERSAMPLE - 0.5], fill=0)
    small = canvas.reduce(_SUPERSAMPLE)
    return np.asarray(small, dtype=np.float32) / 255


def render(scene: Scene) -> np.ndarray:
    """Render a scene to an image (64, 64, 3) uint8."""
    image = np.empty((SIDE, SIDE, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for item in scene.items:
        alpha = coverage(item.shape, item.x, item.y, item.radius)[..., None]
        image += alpha * (np.array(COLOURS[item.colour], np.float32) - image)
    return np.rint(image).astype(np.uint8)


# ---- scenes ----


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


@cache
def placements(sizes: tuple[str, ...], relation: str | None = None) -> np.ndarray:
    """List the placements of objects on the grid, inside the image and apart: centres (N, objects, 2) in pixels.

    With `relation`, only those where the relation of the first object to the second is unambiguous.
    """
    radii = np.array([SIZES[size] for size in sizes])
    steps = GRID * np.arange(1, SIDE // GRID)
    points = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2)
    inside = [points[(np.minimum(points, SIDE - points) > radius).all(1)] for radius in radii]
    choice = np.stack(np.meshgrid(*(np.arange(len(one)) for one in inside), indexing="ij"), -1).reshape(-1, len(radii))
    centres = np.stack([one[choice[:, i]] for i, one in enumerate(inside)], 1)
    fits = np.ones(len(centres), bool)
    for i in range(len(radii)):
        for j in range(i):
            fits &= np.abs(centres[:, i] - centres[:, j]).max(1) >= radii[i] + radii[j] + 2
    if relation is not None:
        step = centres[:, 0] - centres[:, 1]
        along, aside = step @ np.array(RELATIONS[relation]), np.abs(step).min(1)
        fits &= (along >= 1.3 * aside) & (along == np.abs(step).max(1))
    return centres[fits]


def random_scene(rng: np.random.Generator, objects: int = 1, held_out: bool = False) -> Scene:
    """Sample a scene of 1 to 3 objects, without the `HELD_OUT` pairs or, with `held_out`, of these only."""
    if objects not in (1, 2, 3):
        raise ValueError(f"a scene has 1, 2 or 3 objects, not {objects}")
    background = _choose(rng, tuple(BACKGROUNDS))
    pairs: list[tuple[str, str]] = []
    while len(pairs) < objects:
        pair = (_choose(rng, SHAPES), _choose(rng, tuple(COLOURS)))
        if (pair in HELD_OUT) == held_out and pair[1] != background and pair not in pairs:
            pairs.append(pair)
    relation = _choose(rng, tuple(RELATIONS)) if objects > 1 else None
    while True:  # three large objects do not fit: sample other sizes
        sizes = tuple(_choose(rng, tuple(SIZES)) for _ in pairs)
        places = placements(sizes, relation)
        if len(places):
            centres = places[rng.integers(len(places))]
            items = (Item(*p, s, float(x), float(y), SIZES[s]) for p, s, (x, y) in zip(pairs, sizes, centres))
            return Scene(background, tuple(items), relation)


def describe(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """Caption a scene: completely, or with attributes omitted at random if `rng` is given."""

    def included(probability: float) -> bool:
        return rng is None or rng.random() < probability

    def phrase(item: Item) -> str:
        words = [item.size] if included(0.5) else []
        words += [item.colour] if included(0.9) else []
        return " ".join(["a", *words, item.shape])

    phrases = [phrase(item) for item in scene.items]
    text = phrases[0]
    if len(phrases) > 1:
        text += f" {scene.relation} {phrases[1]}" if included(0.7) else f" and {phrases[1]}"
    for more in phrases[2:]:
        text += f" and {more}"
    return f"{text} on a {scene.background} background" if included(0.5) else text


class ShapesDataset:
    """Dataset of scenes; an item is {"image": (64, 64, 3) float32 in [-1, 1], "caption": str}.

    Args:
        size: Number of scenes.
        seed: Determines all scenes and captions.
        object_weights: Fractions of scenes with one, two and three objects.
        held_out: Only the pairs that training never sees.
        complete: Fraction of complete captions; the others omit attributes at random.
    """

    def __init__(
        self,
        size: int = 40_000,
        seed: int = 0,
        object_weights: Sequence[float] = (0.35, 0.65),
        held_out: bool = False,
        complete: float = 0.5,
    ) -> None:
        if not 1 <= len(object_weights) <= 3 or min(object_weights) < 0 or sum(object_weights) <= 0:
            raise ValueError(f"object_weights must be 1 to 3 numbers >= 0 that are not all 0, got {object_weights}")
        self.size = size
        self.seed = seed
        self.fractions = np.asarray(object_weights, float) / sum(object_weights)
        self.held_out = held_out
        self.complete = complete

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> Scene:
        """Return the scene at `index`."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is outside 0..{self.size - 1}")
        rng = np.random.default_rng((self.seed, index))
        return random_scene(rng, 1 + int(rng.choice(len(self.fractions), p=self.fractions)), self.held_out)

    def describe(self) -> dict[str, Any]:
        """Return what determines the images, to check that a cache belongs to them."""
        fractions = [round(float(fraction), 6) for fraction in self.fractions]
        return {"size": self.size, "seed": self.seed, "object_weights": fractions, "held_out": self.held_out}

    def caption(self, index: int, rng: np.random.Generator) -> str:
        """Caption scene `index`; `rng` chooses what to omit."""
        return describe(self.scene(index), None if rng.random() < self.complete else rng)

    def get(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray | str]:
        """Return item `index` with a caption by `rng`."""
        image = render(self.scene(index)).astype(np.float32) / 127.5 - 1
        return {"image": image, "caption": self.caption(index, rng)}

    def __getitem__(self, index: int) -> dict[str, np.ndarray | str]:
        return self.get(index, np.random.default_rng((self.seed, index)))


class ShapesCaptions(ShapesDataset):
    """Captions without images; an item is {"caption": str, "attributes": (8,) int64}.

    The attributes are size, colour and shape of the first object, the same of the second, relation and background,
    numbered from 1, with 0 for what the caption omits. `ATTRIBUTE_CLASSES` has the number of values of each.
    """

    def get(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray | str]:
        """Return item `index` with a caption by `rng`."""
        caption = self.caption(index, rng)
        return {"caption": caption, "attributes": attributes(caption)}


# ---- parsing captions ----


@dataclass(frozen=True)
class Wanted:
    """One object of a caption; None for attributes that it omits."""

    shape: str
    colour: str | None = None
    size: str | None = None

    def matches(self, item: Item) -> bool:
        """Whether an object detected in an image fits."""
        return item.shape == self.shape and self.colour in (None, item.colour) and self.size in (None, item.size)


def parse(caption: str) -> tuple[list[Wanted], str | None, str | None]:
    """Parse a caption to its objects, relation and background. ValueError for text outside the grammar."""
    text, _, ground = caption.strip().partition(" on a ")
    background = ground.removesuffix(" background") or None
    if background not in (None, *BACKGROUNDS):
        raise ValueError(f"{caption!r} names no known background ({', '.join(BACKGROUNDS)})")
    joints = "|".join(f" {name} " for name in (*RELATIONS, "and"))
    phrases = re.split(joints, text)
    relation = next((name for name in RELATIONS if f" {name} " in text), None)
    wanted = []
    for phrase in phrases:
        words = phrase.split()
        if not words or words[0] != "a" or words[-1] not in SHAPES:
            raise ValueError(f"{caption!r}: {phrase!r} is not of the form 'a [size] [colour] shape'")
        size = next((word for word in words[1:-1] if word in SIZES), None)
        colour = next((word for word in words[1:-1] if word in COLOURS), None)
        if len(words) != 2 + (size is not None) + (colour is not None):
            raise ValueError(f"{caption!r}: {phrase!r} has words that are no size and no colour")
        wanted.append(Wanted(words[-1], colour, size))
    return wanted, relation, background


_OBJECT_VALUES = (tuple(SIZES), tuple(COLOURS), SHAPES)
ATTRIBUTE_CLASSES: tuple[int, ...] = tuple(
    1 + len(values) for values in (*_OBJECT_VALUES, *_OBJECT_VALUES, RELATIONS, BACKGROUNDS)
)


def attributes(caption: str) -> np.ndarray:
    """Return a caption's attributes (8,) int64 as `ShapesCaptions` numbers them."""

    def number(value: str | None, values: Sequence[str]) -> int:
        return 0 if value is None else 1 + list(values).index(value)

    wanted, relation, background = parse(caption)
    if len(wanted) > 2:
        raise ValueError(f"{caption!r} has more than two objects")
    numbers = []
    for item in [*wanted, None][:2]:
        given = (item.size, item.colour, item.shape) if item else (None, None, None)
        numbers += [number(value, values) for value, values in zip(given, _OBJECT_VALUES)]
    return np.array([*numbers, number(relation, tuple(RELATIONS)), number(background, tuple(BACKGROUNDS))])
