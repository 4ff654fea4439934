"""Dataset of a folder of images, with captions from sidecar files, a metadata file or class folders."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ldm.images import load_image

logger = logging.getLogger(__name__)

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CAPTIONS = ("auto", "sidecar", "metadata", "classes", "none")
METADATA = "metadata.jsonl"
METADATA_TEXTS = ("text", "caption")
SIDECARS = (".txt", ".caption")  # the first wins
UNREAD = (".csv", ".json", ".jsonl", ".parquet", ".tsv", ".xml", *SIDECARS)  # may hold captions in other formats

# errors of the file itself; others mean the disk, or this process
_FILE_ERRORS = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR)


CROPS = ("random", "center", "none")
INTERPOLATIONS = ("bicubic", "lanczos", "bilinear", "box", "nearest")


class SquareTransform:
    """Crop to a square, resize to `size` pixels per side, flip at random.

    Args:
        size: Pixels per side.
        crop: "random" or "center" crops the largest square; "none" resizes without keeping the aspect ratio.
        flip: Probability of a horizontal flip.
        interpolation: One of `INTERPOLATIONS`, with antialiasing.

    Raises:
        ValueError: For other options.
    """

    def __init__(self, size: int, crop: str = "center", flip: float = 0.0, interpolation: str = "bicubic") -> None:
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size is the side of the images in pixels, an integer from 1, not {size!r}")
        if crop not in CROPS:
            raise ValueError(f"crop {crop!r} is not one of {', '.join(CROPS)}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip is a probability from 0 to 1, not {flip!r}")
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation {interpolation!r} is not one of {', '.join(INTERPOLATIONS)}")
        self.size = size
        self.crop = crop
        self.flip = flip
        self.interpolation = interpolation

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> np.ndarray:
        """Transform an RGB image to float32 (size, size, 3) in [-1, 1]. Always takes three numbers from `rng`."""
        across, down, mirror = rng.random(3)
        left, top, width, height = 0, 0, image.width, image.height
        if self.crop != "none":
            side = width = height = min(image.size)
            left, top = image.width - side, image.height - side  # integers: an image that fits is not resampled
            if self.crop == "center":
                left, top = left // 2, top // 2
            else:
                left, top = int(across * (left + 1)), int(down * (top + 1))
        image = image.resize(
            (self.size, self.size),
            Image.Resampling[self.interpolation.upper()],
            box=(left, top, left + width, top + height),
            reducing_gap=3.0 if self.interpolation != "nearest" else None,
        )
        pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1.0  # (H, W, 3)
        return pixels[:, ::-1].copy() if mirror < self.flip else pixels

    def describe(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return dict(vars(self))


class ImageFolder:
    """Images in a folder; an item is {"image": (size, size, 3) float32 in [-1, 1], caption_key: str, class_key: int}.

    Args:
        root: The folder. Names that start with a dot are skipped.
        size: As in `SquareTransform`, like `crop`, `flip` and `interpolation`.
        captions: Source of captions:
            "metadata": root/metadata.jsonl, lines of {"file_name": ..., "text": ...}; or "caption", or a list of texts.
            "sidecar": a .txt or .caption file beside each image; of several lines one is chosen at random.
            "classes": the folders in root: items have a label, in alphabetical order from 0, and `template` with the
            folder's name.
            "auto": the first of these that exists.
            "none": no captions.
        caption_key: Name of the caption in items.
        class_key: Name of the label in items.
        default_caption: Caption of images without one; by default these are an error.
        template: Caption of class folders.
        part: Fraction of the images to use, such as [0, 0.95] and [0.95, 1] for training and validation, in a shuffled
            order that depends on the names only.
        min_size: Skip images with a smaller side; reads the head of every file.
        recursive: Include subfolders.
        broken: "skip" logs unreadable files once and uses the next image instead; "stop" raises ValueError.
        seed: Seed of crops, flips and captions.

    Raises:
        FileNotFoundError: If there is no folder or no metadata file.
        ValueError: If there are no images, or captions are missing or do not fit.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int,
        crop: str = "center",
        flip: float = 0.0,
        interpolation: str = "bicubic",
        captions: str = "auto",
        caption_key: str = "caption",
        class_key: str = "class_label",
        default_caption: str | None = None,
        template: str = "a photo of a {}",
        part: Sequence[float] = (0.0, 1.0),
        min_size: int = 0,
        recursive: bool = True,
        broken: str = "skip",
        seed: int = 0,
    ) -> None:
        _check_options(captions, template, part, broken)
        self.root = Path(root).expanduser()
        self.transform = SquareTransform(size, crop, flip, interpolation)
        self.caption_key = caption_key
        self.class_key = class_key
        self.default_caption = default_caption
        self.template = template
        self.stop = broken == "stop"
        self.seed = seed

        found = _scan(self.root, recursive)
        names = found.images
        self.captions = _caption_source(self.root, found) if captions == "auto" else captions
        self.classes = sorted({_class_of(name) for name in names} - {""}) if self.captions == "classes" else []
        self._texts = self._find_captions(found)
        if captions == "auto" and self.captions in ("classes", "none") and found.unread:
            logger.warning("%s", _unread(self.root, found))
        if tuple(part) != (0.0, 1.0):
            mixed = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
            names = sorted(mixed[int(part[0] * len(mixed)) : int(part[1] * len(mixed))])
        if min_size:
            bar = tqdm(names, desc=f"Sizes of {self.root.name}", delay=2)
            names = [name for name in bar if _at_least(self.root / name, min_size)]
        if not names:
            raise ValueError(f"no image in {self.root} is left with part={list(part)} and min_size={min_size}")
        self.names = names
        # shared with the loader's workers, so that each file is logged once
        self._broken = torch.zeros(len(names), dtype=torch.bool).share_memory_()
        self._enlarged = torch.zeros(1, dtype=torch.bool).share_memory_()
        kind = f"captions: {self.captions}" + (f", {len(self.classes)} classes" if self.classes else "")
        logger.info("%s: %d images (%s)", self.root, len(names), kind)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.get(i, np.random.default_rng((self.seed, i)))

    def get(self, i: int, rng: np.random.Generator) -> dict[str, Any]:
        """Return item `i`, with crop, flip and caption chosen by `rng`.

        Raises:
            IndexError: Outside 0..len-1.
            ValueError: For an unreadable image with `broken="stop"`, or if all are unreadable.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} is outside 0..{len(self) - 1}")
        i, image, texts = self._first_readable(i)
        item: dict[str, Any] = {"image": self.transform(image, rng)}
        if self.captions != "none":
            item[self.caption_key] = texts[int(rng.integers(len(texts)))]
        if self.captions == "classes":
            item[self.class_key] = self.classes.index(_class_of(self.names[i]))
        return item

    def caption(self, i: int, rng: np.random.Generator) -> str:
        """Return a caption of image `i` without reading the image."""
        texts = self._read_captions(self.names[i])
        return texts[int(rng.integers(len(texts)))]

    def resolve(self, i: int) -> int:
        """Return the index of the image that item `i` uses: `i`, or the next one not known to be unreadable."""
        return next(k for k in chain(range(i, len(self)), range(i)) if not self._broken[k])

    def describe(self) -> dict[str, Any]:
        """Return what determines the items, as plain values, to check that a cache belongs to them."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0{(self.root / name).stat().st_size}\n".encode())
        texts = {"captions": self.captions, "template": self.template, "default_caption": self.default_caption}
        files = {"root": str(self.root), "number": len(self), "files": digest.hexdigest()}
        return files | self.transform.describe() | texts

    # ---- images ----

    def _first_readable(self, i: int) -> tuple[int, Image.Image, Sequence[str]]:
        """Return index, image and captions of the first readable item from `i` on."""
        for k in chain(range(i, len(self)), range(i)):
            if self._broken[k]:
                continue
            path = self.root / self.names[k]
            try:
                image = load_image(path, shrink_to=2 * self.transform.size)
                texts = self._read_captions(self.names[k])
            except (ValueError, OSError) as error:
                cause = error if isinstance(error, OSError) else error.__cause__
                if getattr(cause, "errno", None) not in _FILE_ERRORS:
                    raise
                if self.stop:
                    raise ValueError(f"{error} (broken: skip would skip it)") from error
                self._broken[k] = True
                logger.warning("%s; skipped (%d of %d so far)", error, int(self._broken.sum()), len(self))
                continue
            if min(image.size) < self.transform.size and not self._enlarged:
                self._enlarged[:] = True
                logger.warning(
                    "%s has only %dx%d pixels and is enlarged to size=%d, as others may be (min_size skips them)",
                    *(path, *image.size, self.transform.size),
                )
            return k, image, texts
        raise ValueError(f"none of the {len(self)} images in {self.root} can be read")

    # ---- captions ----

    def _find_captions(self, found: _Files) -> dict[str, Sequence[str]]:
        """Return captions by image; for sidecars the names of the files, for class folders nothing."""
        texts: dict[str, Sequence[str]] = {}
        names, hint = found.images, ""
        if self.captions == "none":
            return texts
        if self.captions == "classes":
            missing, advice = [name for name in names if not _class_of(name)], "move them into class folders"
        elif self.captions == "sidecar":
            stems = ((name, os.path.splitext(name)[0]) for name in names)
            texts = {name: (found.sidecars[stem],) for name, stem in stems if stem in found.sidecars}
            missing, advice = [name for name in names if name not in texts], "write a .txt file beside each"
            hint = f". {_unread(self.root, found)}" if found.unread else ""
        else:
            texts = _read_metadata(self.root / METADATA, set(names))
            missing, advice = [name for name in names if name not in texts], f"add them to {METADATA}"
        if missing and (self.default_caption is None or self.captions == "classes"):
            also = "" if self.captions == "classes" else ", set default_caption,"
            raise ValueError(
                f"{len(missing)} of {len(names)} images in {self.root} have no "
                f"{'class' if self.captions == 'classes' else 'caption'} ({_few(missing)}): "
                f"{advice}{also} or set captions: none{hint}"
            )
        return texts

    def _read_captions(self, name: str) -> Sequence[str]:
        """Return all captions of an image. ValueError if its sidecar file is not UTF-8 text."""
        if self.captions == "none":
            return ()
        if self.captions == "classes":
            return (self.template.replace("{}", _class_of(name).replace("_", " ")),)
        if name not in self._texts:
            return (self.default_caption or "",)
        if self.captions == "metadata":
            return self._texts[name]
        lines = [line.strip() for line in _read_text(self.root / self._texts[name][0]).split("\n")]
        return [line for line in lines if line] or ("",)  # an empty file means no caption, on purpose


class _Files(NamedTuple):
    """Files under a folder, by paths relative to it: images, sidecars by stem, and other files that may hold text."""

    images: list[str]
    sidecars: dict[str, str]
    unread: list[str]


def scan(root: Path, recursive: bool = True) -> tuple[list[str], dict[str, str]]:
    """List the images under `root` as sorted relative paths with "/", and text files by their path without suffix.

    Only names are read. Links to folders are followed, but no folder is entered twice.

    Raises:
        FileNotFoundError: If there is no folder.
        NotADirectoryError: If it is a file.
        ValueError: If there are no images.
    """
    found = _scan(root, recursive)
    return found.images, found.sidecars


def _scan(root: Path, recursive: bool) -> _Files:
    if not root.exists():
        raise FileNotFoundError(f"there is no folder {root} (root of the dataset): check the path")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file: root of the dataset must be a folder of images")
    images: list[str] = []
    texts: list[str] = []
    seen: set[tuple[int, int]] = set()
    for folder, below, files in os.walk(root, followlinks=True, onerror=_raise):
        below[:] = sorted(name for name in below if recursive and not name.startswith("."))
        place = os.stat(folder)
        if (place.st_dev, place.st_ino) in seen:
            below.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        prefix = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and suffix in SUFFIXES:
                images.append(prefix + name)
            elif not name.startswith(".") and suffix in UNREAD and prefix + name != METADATA:
                texts.append(prefix + name)
    if not images:
        raise ValueError(f"no images in {root}: supported files end in {', '.join(SUFFIXES)}")
    sidecars: dict[str, str] = {}
    for suffix in reversed(SIDECARS):
        sidecars |= {stem: stem + end for stem, end in map(os.path.splitext, sorted(texts)) if end.lower() == suffix}
    stems = {os.path.splitext(name)[0] for name in images}
    used = {name for stem, name in sidecars.items() if stem in stems}
    return _Files(sorted(images), sidecars, sorted(set(texts) - used))


def _unread(root: Path, found: _Files) -> str:
    """Name text files that are not read as captions."""
    return (
        f"text files in {root} that are not read: {_few(found.unread)} (captions of NAME.png are read from NAME.txt or "
        f"NAME.caption beside it, or from {METADATA})"
    )


def _raise(error: OSError) -> None:
    raise error


def _check_options(captions: str, template: str, part: Sequence[float], broken: str) -> None:
    if captions not in CAPTIONS:
        raise ValueError(f"captions {captions!r} is not one of {', '.join(CAPTIONS)}")
    if broken not in ("skip", "stop"):
        raise ValueError(f"broken {broken!r} is not one of skip, stop")
    if len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
        raise ValueError(f"part must be two increasing numbers from 0 to 1, not {list(part)}")
    if "{}" not in template:
        raise ValueError(f"template {template!r} has no {{}} for the name of the class")


def _caption_source(root: Path, found: _Files) -> str:
    """Resolve "auto"."""
    if (root / METADATA).exists():
        return "metadata"
    if any(os.path.splitext(name)[0] in found.sidecars for name in found.images):
        return "sidecar"
    return "classes" if all("/" in name for name in found.images) else "none"


def _read_metadata(path: Path, names: set[str]) -> dict[str, Sequence[str]]:
    """Read captions by image from a metadata.jsonl. ValueError, with the line, for invalid entries."""
    if not path.exists():
        raise FileNotFoundError(f"captions: metadata needs {path}, which does not exist")
    texts: dict[str, Sequence[str]] = {}
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise ValueError(f'{path}, line {number} has no "file_name"')
        text = next((entry[key] for key in METADATA_TEXTS if entry.get(key) is not None), None)
        text = [text] if isinstance(text, str) else text
        if not isinstance(text, list) or not text or not all(isinstance(one, str) for one in text):
            raise ValueError(f'{path}, line {number} has no "text" or "caption" that is a string or a list of strings')
        texts[entry["file_name"].removeprefix("./")] = text
    unknown = [name for name in texts if name not in names]
    if unknown:
        raise ValueError(f"{path} names {len(unknown)} images that do not exist ({_few(unknown)}): remove these lines")
    return texts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def _class_of(name: str) -> str:
    """Return the folder in root that an image is in, "" for none."""
    return name.partition("/")[0] if "/" in name else ""


def _at_least(path: Path, side: int) -> bool:
    """Whether no side of an image is below `side` pixels; True for unreadable files, which are reported later."""
    try:
        with Image.open(path) as image:
            return min(image.size) >= side
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True


def _few(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
