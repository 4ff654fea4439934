"""An automatic judge of drawn scenes: which objects, of which shape, colour, size and place, does a picture show?

Pixels unlike the background form connected parts; a part's colour is the palette colour most of its pixels are
nearest to, its shape the one whose drawing overlaps it best.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from ldm.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIDE,
    SIZES,
    Item,
    Scene,
    Wanted,
    coverage,
    outline,
    parse,
)

_MIN_PIXELS = 20  # a smaller part is debris, not an object
_MIN_IOU = 0.65  # true drawings reach 0.9, blots stay below
UNKNOWN = "unknown"  # the shape of a part that looks like none: it spoils a picture
_MARGIN = 8  # pixels around a part that are looked at: fitted shapes reach beyond it
_SIZE_LIMIT = sum(SIZES.values()) / 2
_COLOUR_NAMES = tuple(COLOURS)
_COLOUR_VALUES = np.array(list(COLOURS.values()), np.float32)
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_BACKGROUND_VALUES = np.array(list(BACKGROUNDS.values()), np.float32)


def _nearest(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index of the nearest palette colour of each pixel: (..., 3) and (P, 3) to (...)."""
    return ((pixels[..., None, :] - palette) ** 2).sum(-1).argmin(-1)


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts (eight neighbours) of a mask (H, W), each as a mask, in the order of their last pixels."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)  # runs of pixels, from start to before stop, row by row
    stops = np.nonzero(edges == -1)[1]
    touch = (np.abs(rows[:, None] - rows) == 1) & (starts[:, None] <= stops) & (starts <= stops[:, None])
    left, parts = set(range(len(rows))), []
    while left:
        part, border = [], [left.pop()]
        while border:
            part.append(border.pop())
            near = left.intersection(np.flatnonzero(touch[part[-1]]).tolist())
            left -= near
            border += near
        parts.append(part)
    masks = np.zeros((len(parts), *mask.shape), bool)
    for one, part in zip(masks, sorted(parts, key=max)):
        for run in part:
            one[rows[run], starts[run] : stops[run]] = True
    return list(masks)


def _grow(mask: np.ndarray) -> np.ndarray:
    """A mask and its eight neighbours: the faint rim of an antialiased part included."""
    height, width = mask.shape
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :width] | rows[:, 1:-1] | rows[:, 2:]


def _span(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of what is set in a mask, bottom and right one beyond."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _window(part: np.ndarray) -> tuple[slice, slice]:
    """The smallest square around a part (H, W) and a margin, or as much of it as the picture has."""
    top, bottom, left, right = _span(part)
    side = min(max(bottom - top, right - left) + 2 * _MARGIN, SIDE)
    starts = (min(max((low + high - side) // 2, 0), SIDE - side) for low, high in ((top, bottom), (left, right)))
    down, across = (slice(start, start + side) for start in starts)
    return down, across


@cache
def _extent(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest (x, y) of a shape of radius 1."""
    return outline(shape).min(0), outline(shape).max(0)


def _fit(alpha: np.ndarray) -> tuple[float, str, float, float, float]:
    """The best (IoU, shape, x, y, radius) for the coverage map (S, S) of one object."""
    top, bottom, left, right = _span(alpha > 0.5)
    best = (0.0, "", 0.0, 0.0, 0.0)
    for shape in SHAPES:
        low, high = _extent(shape)
        radius = ((right - left) + (bottom - top)) / (high - low).sum()
        x = (left + right) / 2 - radius * (low + high)[0] / 2
        y = (top + bottom) / 2 - radius * (low + high)[1] / 2
        drawn = coverage(shape, x, y, radius, len(alpha))
        iou = float(np.minimum(alpha, drawn).sum() / np.maximum(alpha, drawn).sum())
        best = max(best, (iou, shape, float(x), float(y), float(radius)))
    return best


def _read_item(pixels: np.ndarray, part: np.ndarray, far: np.ndarray, ground: np.ndarray) -> Item | None:
    """The object that a part (S, S) of a window shows, its place counted from the window; None for debris.

    `far` is how far the colours `pixels` (S, S, 3) are from the background's colour `ground`.
    """
    solid = part & (far > 0.7 * np.median(far[part]))
    if solid.sum() < _MIN_PIXELS:
        return None
    # A pixel that lies inside, with all four neighbours, is free of antialiasing.
    inner = solid & np.roll(solid, 1, 0) & np.roll(solid, -1, 0) & np.roll(solid, 1, 1) & np.roll(solid, -1, 1)
    sample = pixels[inner] if inner.sum() >= 5 else pixels[solid]
    colour = int(np.bincount(_nearest(sample, _COLOUR_VALUES)).argmax())
    line = np.median(sample, 0) - ground
    alpha = np.clip((pixels - ground) @ line / max(float(line @ line), 1.0), 0, 1) * _grow(part)
    iou, shape, x, y, radius = _fit(alpha) if (alpha > 0.5).any() else (0.0, "", 0.0, 0.0, 0.0)
    size = "small" if radius < _SIZE_LIMIT else "large"
    return Item(shape if iou >= _MIN_IOU else UNKNOWN, _COLOUR_NAMES[colour], size, x, y, radius)


def read_scene(picture: np.ndarray) -> Scene:
    """What a picture (64, 64, 3) uint8 shows; objects sorted by x, `UNKNOWN` where no shape fits."""
    if picture.shape != (SIDE, SIDE, 3):
        raise ValueError(f"the judge reads pictures of {SIDE}x{SIDE}x3, not {'x'.join(map(str, picture.shape))}")
    pixels = picture.astype(np.float32)
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    edge = np.concatenate([edge, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    back = int(np.bincount(_nearest(edge, _BACKGROUND_VALUES)).argmax())
    ground = _BACKGROUND_VALUES[back]
    # Halfway on the line to the nearest object colour counts as object: antialiased edges stay in place.
    far = np.sqrt(((pixels - ground) ** 2).sum(-1))
    items = []
    for part in _parts(far > 45):
        if part.sum() < _MIN_PIXELS:
            continue
        window = _window(part)
        item = _read_item(pixels[window], part[window], far[window], ground)
        if item is not None:
            items.append(replace(item, x=item.x + window[1].start, y=item.y + window[0].start))
    return Scene(_BACKGROUND_NAMES[back], tuple(sorted(items, key=lambda item: item.x)))


# ------------------------------------------------------------------------------------------------- against a prompt


@dataclass(frozen=True)
class Verdict:
    """What of a prompt a picture shows. `objects`: exactly the objects asked for, by shape and colour."""

    objects: bool
    sizes: bool
    background: bool
    relation: bool

    @property
    def all(self) -> bool:
        """Everything that the prompt says."""
        return self.objects and self.sizes and self.background and self.relation


def _pairing(wanted: list[Wanted], found: list[Item]) -> list[Item] | None:
    """The found objects in the order of the wanted ones, or None if they are not the same."""
    if not wanted:
        return [] if not found else None
    for i, item in enumerate(found):
        if wanted[0].matches(item):
            rest = _pairing(wanted[1:], found[:i] + found[i + 1 :])
            if rest is not None:
                return [item, *rest]
    return None


def judge(picture: np.ndarray, prompt: str) -> Verdict:
    """Does a picture (64, 64, 3) uint8 show what a prompt of the captions' grammar says, and nothing else?"""
    wanted, relation, background = parse(prompt)
    scene = read_scene(picture)
    found = list(scene.items)
    exact = _pairing(wanted, found)
    loose = exact or _pairing([Wanted(w.shape, w.colour) for w in wanted], found)
    placed = relation is None
    if loose and relation is not None:
        dx, dy = RELATIONS[relation]
        step = (loose[0].x - loose[1].x, loose[0].y - loose[1].y)
        along = step[0] * dx + step[1] * dy
        placed = along > 0 and along >= max(abs(step[0]), abs(step[1])) - 1
    return Verdict(
        objects=loose is not None,
        sizes=exact is not None,
        background=background in (None, scene.background),
        relation=placed,
    )
