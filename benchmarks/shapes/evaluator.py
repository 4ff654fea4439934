"""Evaluator of synthetic scenes: detects the shape, colour, size and position of the objects in an image.

Pixels unlike the background form connected parts. A part's colour is the palette colour that most of its pixels are
nearest to, its shape the one whose rendering overlaps it best.
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
_MIN_IOU = 0.65  # rendered shapes reach 0.9, blots stay below
UNKNOWN = "unknown"  # shape of a part that fits none
_MARGIN = 8  # pixels around a part, since fitted shapes reach beyond it
_SIZE_LIMIT = sum(SIZES.values()) / 2
_COLOUR_NAMES = tuple(COLOURS)
_COLOUR_VALUES = np.array(list(COLOURS.values()), np.float32)
_BACKGROUND_NAMES = tuple(BACKGROUNDS)
_BACKGROUND_VALUES = np.array(list(BACKGROUNDS.values()), np.float32)


def _nearest(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Return the index (...) of the nearest colour of a palette (P, 3) for pixels (..., 3)."""
    return ((pixels[..., None, :] - palette) ** 2).sum(-1).argmin(-1)


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask (H, W) into 8-connected parts, ordered by their last pixels."""
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
    """Dilate a mask by one pixel, to include the rim of an antialiased part."""
    height, width = mask.shape
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :width] | rows[:, 1:-1] | rows[:, 2:]


def _span(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the bounding box (top, bottom, left, right) of a mask, bottom and right exclusive."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _window(part: np.ndarray) -> tuple[slice, slice]:
    """Return the smallest square around a part (H, W) with a margin, clipped to the image."""
    top, bottom, left, right = _span(part)
    side = min(max(bottom - top, right - left) + 2 * _MARGIN, SIDE)
    starts = (min(max((low + high - side) // 2, 0), SIDE - side) for low, high in ((top, bottom), (left, right)))
    down, across = (slice(start, start + side) for start in starts)
    return down, across


@cache
def _extent(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounding box of a shape of radius 1: least and greatest (x, y)."""
    return outline(shape).min(0), outline(shape).max(0)


def _fit(alpha: np.ndarray) -> tuple[float, str, float, float, float]:
    """Fit shapes to the coverage map (S, S) of one object: the best (IoU, shape, x, y, radius)."""
    top, bottom, left, right = _span(alpha > 0.5)
    best = (0.0, "", 0.0, 0.0, 0.0)
    for shape in SHAPES:
        low, high = _extent(shape)
        radius = ((right - left) + (bottom - top)) / (high - low).sum()
        x = (left + right) / 2 - radius * (low + high)[0] / 2
        y = (top + bottom) / 2 - radius * (low + high)[1] / 2
        rendered = coverage(shape, x, y, radius, len(alpha))
        iou = float(np.minimum(alpha, rendered).sum() / np.maximum(alpha, rendered).sum())
        best = max(best, (iou, shape, float(x), float(y), float(radius)))
    return best


def _detect_item(pixels: np.ndarray, part: np.ndarray, far: np.ndarray, ground: np.ndarray) -> Item | None:
    """Detect the object of a part (S, S) in a window, with window coordinates; None for debris.

    `far` is the distance of the colours `pixels` (S, S, 3) from the background colour `ground`.
    """
    solid = part & (far > 0.7 * np.median(far[part]))
    if solid.sum() < _MIN_PIXELS:
        return None
    # pixels whose four neighbours are inside too have no antialiasing
    inner = solid & np.roll(solid, 1, 0) & np.roll(solid, -1, 0) & np.roll(solid, 1, 1) & np.roll(solid, -1, 1)
    sample = pixels[inner] if inner.sum() >= 5 else pixels[solid]
    colour = int(np.bincount(_nearest(sample, _COLOUR_VALUES)).argmax())
    line = np.median(sample, 0) - ground
    alpha = np.clip((pixels - ground) @ line / max(float(line @ line), 1.0), 0, 1) * _grow(part)
    iou, shape, x, y, radius = _fit(alpha) if (alpha > 0.5).any() else (0.0, "", 0.0, 0.0, 0.0)
    size = "small" if radius < _SIZE_LIMIT else "large"
    return Item(shape if iou >= _MIN_IOU else UNKNOWN, _COLOUR_NAMES[colour], size, x, y, radius)


def detect_scene(image: np.ndarray) -> Scene:
    """Detect the scene of an image (64, 64, 3) uint8; objects sorted by x, `UNKNOWN` where no shape fits."""
    if image.shape != (SIDE, SIDE, 3):
        raise ValueError(f"the evaluator needs images of {SIDE}x{SIDE}x3, not {'x'.join(map(str, image.shape))}")
    pixels = image.astype(np.float32)
    edge = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    edge = np.concatenate([edge, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    back = int(np.bincount(_nearest(edge, _BACKGROUND_VALUES)).argmax())
    ground = _BACKGROUND_VALUES[back]
    # halfway to the nearest object colour counts as object, so that antialiased edges stay in place
    far = np.sqrt(((pixels - ground) ** 2).sum(-1))
    items = []
    for part in _parts(far > 45):
        if part.sum() < _MIN_PIXELS:
            continue
        window = _window(part)
        item = _detect_item(pixels[window], part[window], far[window], ground)
        if item is not None:
            items.append(replace(item, x=item.x + window[1].start, y=item.y + window[0].start))
    return Scene(_BACKGROUND_NAMES[back], tuple(sorted(items, key=lambda item: item.x)))


# ---- comparison with a prompt ----


@dataclass(frozen=True)
class Match:
    """Which parts of a prompt an image shows. `objects`: exactly the prompt's objects, by shape and colour."""

    objects: bool
    sizes: bool
    background: bool
    relation: bool

    @property
    def all(self) -> bool:
        """Whether all parts match."""
        return self.objects and self.sizes and self.background and self.relation


def _pairing(wanted: list[Wanted], found: list[Item]) -> list[Item] | None:
    """Return the detected objects in the order of the wanted ones, or None if they differ."""
    if not wanted:
        return [] if not found else None
    for i, item in enumerate(found):
        if wanted[0].matches(item):
            rest = _pairing(wanted[1:], found[:i] + found[i + 1 :])
            if rest is not None:
                return [item, *rest]
    return None


def evaluate(image: np.ndarray, prompt: str) -> Match:
    """Compare an image (64, 64, 3) uint8 with a prompt of the captions' grammar."""
    wanted, relation, background = parse(prompt)
    scene = detect_scene(image)
    found = list(scene.items)
    exact = _pairing(wanted, found)
    loose = exact or _pairing([Wanted(w.shape, w.colour) for w in wanted], found)
    placed = relation is None
    if loose and relation is not None:
        dx, dy = RELATIONS[relation]
        step = (loose[0].x - loose[1].x, loose[0].y - loose[1].y)
        along = step[0] * dx + step[1] * dy
        placed = along > 0 and along >= max(abs(step[0]), abs(step[1])) - 1
    return Match(
        objects=loose is not None,
        sizes=exact is not None,
        background=background in (None, scene.background),
        relation=placed,
    )
