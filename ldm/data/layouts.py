"""Layouts, boxes of classes in a picture, as the tokens that layout-to-image models read.

A layout is a sequence: for every object its class, the cell of its top left corner and that of its bottom right one;
"none" in the places that are left; at the end the two corners of the part of the picture that is shown. This is the
conditioning of the published model for OpenImages (Rombach et al. 2022, section 4.3.1; the tokens are those of
taming-transformers), whose 92 tokens are 30 objects and the crop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SLACK = 1e-6  # what a box may lie outside of the picture by, from rounding


class Box(NamedTuple):
    """An object: its class, and left, top, width and height as shares of the picture's sides."""

    label: int
    x: float
    y: float
    width: float
    height: float


WHOLE = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class LayoutTokens:
    """The tokens of layouts. vocab_size: how many ids there are, "none" the last. length: tokens of a layout."""

    vocab_size: int = 8192
    length: int = 92

    def __post_init__(self) -> None:
        if self.length < 5 or self.length % 3 != 2:
            raise ValueError(
                f"a layout has 3 tokens for each object and 2 for its crop, which does not make {self.length}"
            )

    @property
    def max_objects(self) -> int:
        """Objects that a layout has room for."""
        return (self.length - 2) // 3

    @property
    def none(self) -> int:
        """The id that stands where there is no object."""
        return self.vocab_size - 1

    @property
    def cells(self) -> int:
        """Cells along each side: as many as can be numbered."""
        return math.isqrt(self.vocab_size)

    def encode(self, layout: Sequence[Box], crop: Sequence[float] = WHOLE) -> list[int]:
        """The tokens of one layout. crop: the part (x, y, width, height) of the picture to draw.

        Raises ValueError for too many objects, classes that there is no token for and boxes outside of the picture.
        """
        if len(layout) > self.max_objects:
            raise ValueError(f"a layout holds at most {self.max_objects} objects, not {len(layout)}: leave some out")
        tokens: list[int] = []
        for label, *box in layout:
            if not 0 <= label < self.none:
                raise ValueError(f"classes in a layout must be 0 to {self.none - 1}, not {label}")
            tokens += [label, *self.corners(box)]
        tokens += [self.none] * (self.length - 2 - len(tokens))
        return [*tokens, *self.corners(crop)]

    def corners(self, box: Sequence[float]) -> tuple[int, int]:
        """The cells of the top left and the bottom right corner of (x, y, width, height)."""
        x, y, width, height = box
        if not (min(x, y) >= -SLACK and min(width, height) > 0 and max(x + width, y + height) <= 1 + SLACK):
            raise ValueError(
                f"the box {list(box)} is not inside of the picture: it must be [x, y, width, height], "
                "left, top and size as shares (0 to 1) of the picture's sides"
            )
        return self._cell(x, y), self._cell(x + width, y + height)

    def _cell(self, x: float, y: float) -> int:
        column, row = (round(min(max(place, 0.0), 1.0) * (self.cells - 1)) for place in (x, y))
        return row * self.cells + column

    def tensor(self, layouts: Sequence[Sequence[Box]]) -> Tensor:
        """Tokens (B, length) int64 of B layouts."""
        return torch.tensor([self.encode(layout) for layout in layouts])


def read_layouts(path: str | Path, categories: str | Path | None = None) -> list[list[Box]]:
    """The layouts in a JSON file: one, a list of {"class": ..., "box": [x, y, width, height]}, or a list of such.

    Boxes are in shares of the picture's sides. categories: a text file of class names, the first line for class 0;
    without it classes are numbers. Raises FileNotFoundError or ValueError for files that hold anything else.
    """
    names = read_categories(categories) if categories is not None else None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} holds no layout: it must be a list such as {_EXAMPLE}")
    layouts = content if all(isinstance(layout, list) for layout in content) else [content]
    return [[_box(entry, names, path) for entry in layout] for layout in layouts]


_EXAMPLE = '[{"class": 3, "box": [0.1, 0.2, 0.5, 0.6]}]'


def read_categories(path: str | Path) -> dict[str, int]:
    """Class names and their numbers from a text file of one name a line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    return {name.strip(): number for number, name in enumerate(lines) if name.strip()}


def _box(entry: Any, names: dict[str, int] | None, path: str | Path) -> Box:
    try:
        label, (x, y, width, height) = entry["class"], map(float, entry["box"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: {json.dumps(entry)} is no object of a layout, such as {_EXAMPLE[1:-1]}") from None
    if isinstance(label, str):
        if names is None:
            raise ValueError(f"{path} names the class {label!r}: give the list of names with --categories, or numbers")
        if label not in names:
            raise ValueError(f"{path} names the class {label!r}, which is not among the {len(names)} categories")
        label = names[label]
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError(f"{path}: the class {label!r} is neither a whole number nor a name")
    return Box(label, x, y, width, height)
