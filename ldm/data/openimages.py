"""Open Images: images, layouts of boxes, and super-resolution.

`root`, by default data/openimages in the working directory, has Open Images' own layout: train/ and validation/ with
files <ImageID>.jpg and, for boxes, train-annotations-bbox.csv, validation-annotations-bbox.csv and
class-descriptions-boxable.csv. Names with a version in front, such as oidv6-train-annotations-bbox.csv, count too.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.base import ImagePaths, WrappedPaths, check_folder
from ldm.data.folder import scan
from ldm.data.image_transforms import square_box, to_array
from ldm.data.imagenet import DegradedImages
from ldm.data.layouts import Box, LayoutTokens
from ldm.images import load_image

ROOT = os.path.join("data", "openimages")
_CORNERS = ("XMin", "YMin", "XMax", "YMax")


def _image_paths(root: str, part: str) -> list[Path]:
    folder = check_folder(os.path.join(root, part), "the images of Open Images (<ImageID>.jpg)")
    return [folder / name for name in scan(folder)[0]]


class _FullOpenImages(WrappedPaths):
    """Images without annotations.

    Args:
        size: resize the shorter side to so many pixels; None leaves it as it is.
        crop_size: side of the square to cut out; random in training.
    """

    part = "train"

    def __init__(self, size: int | None = None, crop_size: int | None = None, root: str = ROOT) -> None:
        self.data = ImagePaths(_image_paths(root, self.part), size, self.part == "train", crop_size=crop_size)


class FullOpenImagesTrain(_FullOpenImages):
    """Training images, randomly cropped."""


class FullOpenImagesValidation(_FullOpenImages):
    """Validation images, cropped at the centre."""

    part = "validation"


class _SuperresOpenImages(DegradedImages):
    """Open Images for super-resolution, see `DegradedImages`."""

    part = "train"

    def __init__(
        self,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        root: str = ROOT,
    ) -> None:
        self.root = root
        super().__init__(size, degradation, downscale_f, min_crop_f, max_crop_f, random_crop)

    def get_base(self) -> Any:
        """The paths of the images."""
        return [{"file_path_": str(path)} for path in _image_paths(self.root, self.part)]


class SuperresOpenImagesAdvancedTrain(_SuperresOpenImages):
    """Training images for super-resolution."""


class SuperresOpenImagesAdvancedValidation(_SuperresOpenImages):
    """Validation images for super-resolution."""

    part = "validation"


class _OpenImagesBBox(Dataset):
    """Images with their objects as the tokens of layout-to-image models, see `ldm.data.layouts`.

    Args:
        size: side of the images. Squares are random in training, in the middle in validation.
        tokens: numbers of the token sequence; the published ones by default.

    Items are {"image": float32 (size, size, 3) in [-1, 1], "coordinates_bbox": int64 (92,), "file_path_": str}. Of
    more objects than a layout holds, the largest count. Images without boxes are left out.
    """

    part = "train"

    def __init__(self, size: int = 256, root: str = ROOT, tokens: LayoutTokens | None = None) -> None:
        self.size = size
        self.tokens = tokens or LayoutTokens()
        paths = {path.stem: path for path in _image_paths(root, self.part)}
        self.categories = _read_categories(_file(root, "class-descriptions-boxable.csv"))
        self.boxes = _read_boxes(_file(root, f"{self.part}-annotations-bbox.csv"), set(paths), self.categories)
        self.paths = [path for name, path in paths.items() if name in self.boxes]
        if not self.paths:
            raise ValueError(f"none of the {len(paths)} images in {os.path.join(root, self.part)} has boxes")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path = self.paths[i]
        image = load_image(path)
        width, height = image.size
        side = min(width, height)
        left, top, right, bottom = square_box(image.size, side, random=self.part == "train")
        square = image.crop((left, top, right, bottom)).resize((self.size, self.size))
        crop = (left / width, top / height, side / width, side / height)
        tokens = self.tokens.encode(self.boxes[path.stem][: self.tokens.max_objects], crop)
        return {"image": to_array(square), "coordinates_bbox": np.array(tokens), "file_path_": str(path)}


class OpenImagesBBoxTrain(_OpenImagesBBox):
    """Training images with boxes."""


class OpenImagesBBoxValidation(_OpenImagesBBox):
    """Validation images with boxes."""

    part = "validation"


def _file(root: str, name: str) -> Path:
    found = sorted(Path(root).expanduser().glob(f"*{name}"))
    if not found:
        raise FileNotFoundError(f"there is no {os.path.join(root, name)}: put Open Images' file of this name there")
    return found[0]


def _read_categories(path: Path) -> dict[str, int]:
    """Numbers of the classes, by their codes such as /m/011k07, in the order of the file."""
    with path.open(encoding="utf-8", newline="") as file:
        codes = [row[0] for row in csv.reader(file) if row and row[0].startswith("/")]
    return {code: number for number, code in enumerate(codes)}


def _read_boxes(path: Path, names: set[str], categories: dict[str, int]) -> dict[str, list[Box]]:
    """The boxes of the images `names`, the largest first."""
    boxes: dict[str, list[Box]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        try:
            name_at, class_at, *at = (header.index(name) for name in ("ImageID", "LabelName", *_CORNERS))
        except ValueError:
            raise ValueError(f"{path} does not begin with a row of ImageID, LabelName, {', '.join(_CORNERS)}") from None
        for row in rows:
            if row[name_at] in names and row[class_at] in categories:
                left, top, right, bottom = (min(max(float(row[k]), 0.0), 1.0) for k in at)
                if right > left and bottom > top:
                    box = Box(categories[row[class_at]], left, top, right - left, bottom - top)
                    boxes.setdefault(row[name_at], []).append(box)
    return {name: sorted(entries, key=lambda box: -box.width * box.height) for name, entries in boxes.items()}
