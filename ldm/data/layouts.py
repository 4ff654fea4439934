"""Layouts, bounding boxes with classes, as the tokens of layout-to-image models.

A layout is a sequence: for every object its class, the grid cell of its top left corner and that of its bottom right
one; then "none" tokens as padding; at the end the two corners of the crop. This is the conditioning of the published
model for Open Images (Rombach et al. 2022, section 4.3.1; tokens as in taming-transformers), with 92 tokens for 30
objects and the crop.
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

SLACK = 1e-6  # tolerance for boxes outside of the image, from rounding


class Box(NamedTuple):
    """An object: class, and left, top, width and height as fractions of the image's sides."""

    label: int
    x: float
    y: float
    width: float
    height: float


NO_CROP = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class LayoutTokens:
    """Tokenizer of layouts.

    Args:
        vocab_size: Number of ids; the last is "none".
        length: Tokens per layout.
    """

    vocab_size: int = 8192
    length: int = 92

    def __post_init__(self) -> None:
        if self.length < 5 or self.length % 3 != 2:
            raise ValueError(f"length must be 3 tokens for each object and 2 for the crop, not {self.length}")

    @property
    def max_objects(self) -> int:
        """Most objects of a layout."""
        return (self.length - 2) // 3

    @property
    def none(self) -> int:
        """Padding id."""
        return self.vocab_size - 1

    @property
    def cells(self) -> int:
        """Grid cells per side: as many as ids can number."""
        return math.isqrt(self.vocab_size)

    def encode(self, layout: Sequence[Box], crop: Sequence[float] = NO_CROP) -> list[int]:
        """Encode a layout.

        Args:
            layout: The objects.
            crop: The part (x, y, width, height) of the image to generate.

        Raises:
            ValueError: For too many objects, unknown classes and boxes outside of the image.
        """
        if len(layout) > self.max_objects:
            raise ValueError(f"a layout has at most {self.max_objects} objects, not {len(layout)}: leave some out")
        tokens: list[int] = []
        for label, *box in layout:
            if not 0 <= label < self.none:
                raise ValueError(f"classes in a layout must be 0 to {self.none - 1}, not {label}")
            tokens += [label, *self.corners(box)]
        tokens += [self.none] * (self.length - 2 - len(tokens))
        return [*tokens, *self.corners(crop)]

    def corners(self, box: Sequence[float]) -> tuple[int, int]:
        """Return the cells of the top left and the bottom right corner of (x, y, width, height)."""
        x, y, width, height = box
        if not (min(x, y) >= -SLACK and min(width, height) > 0 and max(x + width, y + height) <= 1 + SLACK):
            raise ValueError(
                f"the box {list(box)} is not inside of the image: it must be [x, y, width, height], "
                "left, top and size as fractions (0 to 1) of the image's sides"
            )
        return self._cell(x, y), self._cell(x + width, y + height)

    def _cell(self, x: float, y: float) -> int:
        column, row = (round(min(max(place, 0.0), 1.0) * (self.cells - 1)) for place in (x, y))
        return row * self.cells + column

    def tensor(self, layouts: Sequence[Sequence[Box]]) -> Tensor:
        """Encode B layouts to (B, length) int64."""
        return torch.tensor([self.encode(layout) for layout in layouts])


def read_layouts(path: str | Path, categories: str | Path | None = None) -> list[list[Box]]:
    """Read layouts from a JSON file.

    Args:
        path: One layout, a list of {"class": ..., "box": [x, y, width, height]}, or a list of layouts. Boxes are
            fractions of the image's sides.
        categories: Text file of class names, the first line for class 0; without it classes are numbers.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If it holds anything else.
    """
    names = read_categories(categories) if categories is not None else None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} has no layout: it must be a list such as {_EXAMPLE}")
    layouts = content if all(isinstance(layout, list) for layout in content) else [content]
    return [[_box(entry, names, path) for entry in layout] for layout in layouts]


_EXAMPLE = '[{"class": 3, "box": [0.1, 0.2, 0.5, 0.6]}]'


def read_categories(path: str | Path) -> dict[str, int]:
    """Read class names and their numbers from a text file with one name per line."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from None
    return {name.strip(): number for number, name in enumerate(lines) if name.strip()}


def _box(entry: Any, names: dict[str, int] | None, path: str | Path) -> Box:
    label, box = (entry.get("class"), entry.get("box")) if isinstance(entry, dict) else (None, None)
    sides = box if isinstance(box, list) else []
    if label is None or len(sides) != 4 or not all(type(n) in (int, float) and math.isfinite(n) for n in sides):
        shown = json.dumps(entry)[:200]
        raise ValueError(f"{path}: {shown} is no object of a layout, such as {_EXAMPLE[1:-1]}")
    if isinstance(label, str):
        if names is None:
            raise ValueError(
                f"{path} has the class {label!r}: pass the list of names with --categories, or use numbers"
            )
        if label not in names:
            raise ValueError(f"{path} has the class {label!r}, which is not among the {len(names)} categories")
        label = names[label]
    if not isinstance(label, int) or isinstance(label, bool):
        raise ValueError(f"{path}: the class {label!r} is neither an integer nor a name")
    return Box(label, *map(float, sides))
