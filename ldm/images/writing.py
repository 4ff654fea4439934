"""Pictures to files: PNG and animations, whole or not there, under names that nobody else has."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.files import atomic_write, write_exclusive


def next_free_index(folder: str | Path, pattern: str) -> int:
    """One more than the highest number among the files of `folder` that `pattern`, such as "{:05}.png", names."""
    before, after = re.split(r"\{.*?\}", pattern)
    number = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    matches = (number.fullmatch(name) for name in os.listdir(folder))
    return max((int(match[1]) for match in matches if match), default=-1) + 1


def save_png(
    image: Image.Image,
    folder: str | Path,
    pattern: str,
    metadata: Mapping[str, str] | None = None,
    index: int | None = None,
    before: Callable[[Path], None] | None = None,
) -> Path:
    """Write `image` to `folder` under the next free name of `pattern`, such as "{:05}.png"; returns its path.

    `metadata` goes into PNG text chunks. `index` is the number to use, or the first to try if that is taken; None goes
    on after the highest there. A file that exists is never replaced, even when several processes write to
    the folder at once, and no name ever belongs to a half-written file, not even after a power cut. Raises OSError if
    the folder is not writable. before: called with the whole file, just before that gets its name.
    """
    folder = Path(folder)
    return write_exclusive(folder, _numbered(folder, pattern, index), _png(image, metadata), before)


def save_png_named(
    image: Image.Image, folder: str | Path, name: str, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write `image` to folder/NAME.png, or where that is taken NAME-1.png, NAME-2.png ...; otherwise as `save_png`."""
    folder = Path(folder)
    names = (folder / f"{name}{tail}.png" for tail in itertools.chain([""], (f"-{n}" for n in itertools.count(1))))
    return write_exclusive(folder, names, _png(image, metadata))


def replace_png(image: Image.Image, path: str | Path) -> None:
    """Write `image` to `path` in place of what is there, whole at any time: for previews and reports."""
    with atomic_write(path) as partial, partial.open("wb") as file:
        _png(image)(file)


def save_animation(images: Sequence[Image.Image], folder: str | Path, pattern: str, fps: float) -> Path:
    """Write pictures of one size as one that moves, `fps` of them a second, for ever; returns its path.

    `pattern`, such as "{:04}.gif", says which kind: GIF (256 colours a picture, times in hundredths of a second) or
    WebP. Its number is the next free one, as in `save_png`. ValueError for no pictures, or another kind.
    """
    kind = Path(pattern).suffix.lower()
    kinds: dict[str, dict[str, Any]] = {
        ".gif": {"format": "GIF", "disposal": 1},
        ".webp": {"format": "WEBP", "quality": 90},
    }
    if not images or kind not in kinds:
        raise ValueError(f"an animation is a .gif or .webp of at least one picture, not {kind} of {len(images)}")
    first, *others = images
    # the times when pictures change are rounded, not how long one lasts: no error adds up
    unit = 10 if kind == ".gif" else 1  # in milliseconds
    changes = [round(1000 * number / fps / unit) * unit for number in range(len(images) + 1)]
    durations = [after - before for before, after in zip(changes, changes[1:])]

    def write(file: BinaryIO) -> None:
        first.save(file, save_all=True, append_images=others, duration=durations, loop=0, **kinds[kind])

    folder = Path(folder)
    return write_exclusive(folder, _numbered(folder, pattern, None), write)


def _numbered(folder: Path, pattern: str, index: int | None) -> Iterator[Path]:
    first = next_free_index(folder, pattern) if index is None else index  # when the first name is asked for
    yield from (folder / pattern.format(number) for number in itertools.count(first))


def _png(image: Image.Image, metadata: Mapping[str, str] | None = None) -> Callable[[BinaryIO], None]:
    text = PngInfo()
    for key, value in (metadata or {}).items():
        text.add_text(key, value.encode("utf-8", "backslashreplace").decode())  # of names that are no UTF-8
    return lambda file: image.save(file, format="PNG", pnginfo=text)
