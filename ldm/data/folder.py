"""A folder of one's own pictures as a data set, with captions from side-car files, a list or class folders."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ldm.data.transforms import SquareTransform
from ldm.images import load_image

logger = logging.getLogger(__name__)

SUFFIXES = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CAPTIONS = ("auto", "sidecar", "metadata", "classes", "none")
METADATA = "metadata.jsonl"
METADATA_TEXTS = ("text", "caption")

# A file that answers with one of these is at fault itself; other numbers mean the disk, or this process.
_FAULTS_OF_THE_FILE = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR)


class ImageFolder:
    """The pictures under a folder. Item: {`image`: float32 (size, size, 3) in -1..1, caption_key: str, class_key: int}.

    root: the folder; folders in it count too, unless `recursive` is off. Names that start with a dot do not.
    size, crop, flip, interpolation: as in `SquareTransform`.
    captions: where they come from, if not "none":
        "metadata"  root/metadata.jsonl, lines of {"file_name": ..., "text": ...}; or "caption", or a list of texts
        "sidecar"   a .txt file beside each picture; of several lines one is chosen at random
        "classes"   the folders in root: items have a label, by the alphabet from 0, and `template` with the name
        "auto"      the first of these that is there
    default_caption: for pictures that have none; by default these are an error.
    part: the share of the pictures to take, such as [0, 0.95] and [0.95, 1] for training and validation, in an order
        that mixes them but depends on their names alone.
    min_size: leave out pictures with a side of fewer pixels (this reads the head of every file).
    broken: "skip" names files that cannot be read, once each, and gives the next good picture in their place;
        "stop" raises ValueError.

    Raises FileNotFoundError or ValueError if there is no folder, no picture, or captions are missing or astray.
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

        names, sidecars = scan(self.root, recursive)
        self.captions = _caption_source(self.root, names, sidecars) if captions == "auto" else captions
        self.classes = sorted({_class_of(name) for name in names} - {""}) if self.captions == "classes" else []
        self._texts = self._find_captions(names, sidecars)
        if tuple(part) != (0.0, 1.0):
            mixed = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
            names = sorted(mixed[int(part[0] * len(mixed)) : int(part[1] * len(mixed))])
        if min_size:
            bar = tqdm(names, desc=f"sizes of {self.root.name}", delay=2)
            names = [name for name in bar if _at_least(self.root / name, min_size)]
        if not names:
            raise ValueError(f"no picture in {self.root} is left with part={list(part)} and min_size={min_size}")
        self.names = names
        # shared with the loader's workers, so that each file is named once by all of them
        self._broken = torch.zeros(len(names), dtype=torch.bool).share_memory_()
        self._enlarged = torch.zeros(1, dtype=torch.bool).share_memory_()
        kind = f"captions: {self.captions}" + (f", {len(self.classes)} classes" if self.classes else "")
        logger.info("%s: %d pictures (%s)", self.root, len(names), kind)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.get(i, np.random.default_rng((self.seed, i)))

    def get(self, i: int, rng: np.random.Generator) -> dict[str, Any]:
        """Item `i`, with crop, flip and caption chosen by `rng`.

        Raises IndexError outside 0..len-1, ValueError for a broken picture (`broken="stop"`), or if all are broken.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} is outside 0..{len(self) - 1}")
        i, image, texts = self._first_good(i)
        item: dict[str, Any] = {"image": self.transform(image, rng)}
        if self.captions != "none":
            item[self.caption_key] = texts[int(rng.integers(len(texts)))]
        if self.captions == "classes":
            item[self.class_key] = self.classes.index(_class_of(self.names[i]))
        return item

    def caption(self, i: int, rng: np.random.Generator) -> str:
        """A caption of picture `i`, without reading the picture."""
        texts = self._read_captions(self.names[i])
        return texts[int(rng.integers(len(texts)))]

    def resolve(self, i: int) -> int:
        """The picture that item `i` shows: `i` itself, or the next one that has not turned out to be broken."""
        return next(k for k in chain(range(i, len(self)), range(i)) if not self._broken[k])

    def describe(self) -> dict[str, Any]:
        """What the items depend on, as plain values: what a cache of them is compared by."""
        digest = hashlib.sha256()
        for name in self.names:
            digest.update(f"{name}\0{(self.root / name).stat().st_size}\n".encode())
        texts = {"captions": self.captions, "template": self.template, "default_caption": self.default_caption}
        pictures = {"root": str(self.root), "number": len(self), "files": digest.hexdigest()}
        return pictures | self.transform.describe() | texts

    # ---- pictures ----

    def _first_good(self, i: int) -> tuple[int, Image.Image, Sequence[str]]:
        """The number, the picture and the captions of the first item from `i` on that can be read."""
        for k in chain(range(i, len(self)), range(i)):
            if self._broken[k]:
                continue
            path = self.root / self.names[k]
            try:
                image = load_image(path, shrink_to=2 * self.transform.size)
                texts = self._read_captions(self.names[k])
            except (ValueError, OSError) as error:
                cause = error if isinstance(error, OSError) else error.__cause__
                if getattr(cause, "errno", None) not in _FAULTS_OF_THE_FILE:
                    raise
                if self.stop:
                    raise ValueError(f"{error} (broken: skip would pass over it)") from error
                self._broken[k] = True
                logger.warning("%s; skipped (%d of %d so far)", error, int(self._broken.sum()), len(self))
                continue
            if min(image.size) < self.transform.size and not self._enlarged:
                self._enlarged[:] = True
                logger.warning(
                    "%s has only %dx%d pixels and is enlarged to size=%d, as others may be (min_size leaves such out)",
                    *(path, *image.size, self.transform.size),
                )
            return k, image, texts
        raise ValueError(f"none of the {len(self)} pictures in {self.root} can be read")

    # ---- captions ----

    def _find_captions(self, names: Sequence[str], sidecars: set[str]) -> dict[str, Sequence[str]]:
        """Captions by picture: all of them from a list; where they lie in files or follow from names, nothing yet."""
        texts: dict[str, Sequence[str]] = {}
        if self.captions == "none":
            return texts
        if self.captions == "classes":
            missing, way_out = [name for name in names if not _class_of(name)], "move them into class folders"
        elif self.captions == "sidecar":
            texts = {name: () for name in names if os.path.splitext(name)[0] in sidecars}
            missing, way_out = [name for name in names if name not in texts], "write a .txt file beside each"
        else:
            texts = _read_metadata(self.root / METADATA, set(names))
            missing, way_out = [name for name in names if name not in texts], f"add them to {METADATA}"
        if missing and (self.default_caption is None or self.captions == "classes"):
            also = "" if self.captions == "classes" else ", set default_caption,"
            raise ValueError(
                f"{len(missing)} of {len(names)} pictures in {self.root} have no "
                f"{'class' if self.captions == 'classes' else 'caption'} ({_few(missing)}): "
                f"{way_out}{also} or set captions: none"
            )
        return texts

    def _read_captions(self, name: str) -> Sequence[str]:
        """All captions of a picture. Raises ValueError if its side-car file is not UTF-8 text."""
        if self.captions == "none":
            return ()
        if self.captions == "classes":
            return (self.template.replace("{}", _class_of(name).replace("_", " ")),)
        if name not in self._texts:
            return (self.default_caption or "",)
        if self.captions == "metadata":
            return self._texts[name]
        lines = [line.strip() for line in _read_text((self.root / name).with_suffix(".txt")).split("\n")]
        return [line for line in lines if line] or ("",)  # an empty file says: no caption, on purpose


def scan(root: Path, recursive: bool = True) -> tuple[list[str], set[str]]:
    """The pictures under `root`, as sorted paths relative to it with "/", and the .txt files, without their suffix.

    Only names are read. Links to folders are followed, but no folder is entered twice.
    Raises FileNotFoundError or NotADirectoryError for no folder, ValueError for one without pictures.
    """
    if not root.exists():
        raise FileNotFoundError(f"there is no folder {root} (root of the data set): check the path")
    if not root.is_dir():
        raise NotADirectoryError(f"{root} is a file: root of the data set is a folder of pictures")
    names: list[str] = []
    sidecars: set[str] = set()
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
            stem, suffix = os.path.splitext(name)
            if name.startswith("."):
                continue
            if suffix.lower() in SUFFIXES:
                names.append(prefix + name)
            elif suffix == ".txt":
                sidecars.add(prefix + stem)
    if not names:
        raise ValueError(f"no images in {root}: supported files end in {', '.join(SUFFIXES)}")
    return sorted(names), sidecars


def _raise(error: OSError) -> None:
    raise error


def _check_options(captions: str, template: str, part: Sequence[float], broken: str) -> None:
    if captions not in CAPTIONS:
        raise ValueError(f"captions {captions!r} is not one of {', '.join(CAPTIONS)}")
    if broken not in ("skip", "stop"):
        raise ValueError(f"broken {broken!r} is not one of skip, stop")
    if len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
        raise ValueError(f"part is two numbers from 0 to 1, the first the smaller, not {list(part)}")
    if "{}" not in template:
        raise ValueError(f"template {template!r} has no {{}} where the name of the class goes")


def _caption_source(root: Path, names: Sequence[str], sidecars: set[str]) -> str:
    """What "auto" means for a folder."""
    if (root / METADATA).exists():
        return "metadata"
    if any(os.path.splitext(name)[0] in sidecars for name in names):
        return "sidecar"
    return "classes" if all("/" in name for name in names) else "none"


def _read_metadata(path: Path, names: set[str]) -> dict[str, Sequence[str]]:
    """Captions by picture from a metadata.jsonl. Raises ValueError, with the line, for what cannot be used."""
    if not path.exists():
        raise FileNotFoundError(f"captions: metadata needs {path}, which is not there")
    texts: dict[str, Sequence[str]] = {}
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
            raise ValueError(f'{path}, line {number} has no "file_name"')
        text = next((entry[key] for key in METADATA_TEXTS if entry.get(key) is not None), None)
        text = [text] if isinstance(text, str) else text
        if not isinstance(text, list) or not text or not all(isinstance(one, str) for one in text):
            raise ValueError(f'{path}, line {number} has no "text" or "caption" that is a string or a list of strings')
        texts[entry["file_name"].removeprefix("./")] = text
    astray = [name for name in texts if name not in names]
    if astray:
        raise ValueError(f"{path} names {len(astray)} pictures that are not there ({_few(astray)}): remove these lines")
    return texts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text: save it as UTF-8") from None


def _class_of(name: str) -> str:
    """The folder of the root that a picture lies in, "" for none."""
    return name.partition("/")[0] if "/" in name else ""


def _at_least(path: Path, side: int) -> bool:
    """Whether a picture has no side below `side` pixels; a file that does not say is left for later."""
    try:
        with Image.open(path) as image:
            return min(image.size) >= side
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return True


def _few(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
