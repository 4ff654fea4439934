"""Landscapes with segmentation maps, for semantic synthesis."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.base import check_folder
from ldm.data.folder import scan
from ldm.data.image_transforms import Resize, square_box, to_array
from ldm.data.segmentation import one_hot_map, read_segmentation
from ldm.images import load_image

ROOT = os.path.join("data", "landscapes")
CLASSES = 182  # of COCO-Stuff


class _Landscapes(Dataset):
    """Images and segmentation maps, cropped alike.

    The root has train/ and validation/, or neither; in it images/ and segmentation/ have files of equal names but for
    the suffix. The maps are images whose levels or palette indices are the classes, or .npy arrays of these.

    Args:
        size: resize the shorter side to so many pixels.
        crop_size: side of the square to cut out, random in training; `size` by default.
        segmentation_to_float32: planes of 0 and 1 in float32 instead of bool.

    Items are {"image": float32 (H, W, 3) in [-1, 1], "segmentation": (H, W, 182), "file_path_": str}.
    """

    part = "train"

    def __init__(
        self,
        size: int | None = None,
        crop_size: int | None = None,
        segmentation_to_float32: bool = False,
        root: str = ROOT,
    ) -> None:
        inner = os.path.join(root, self.part)
        root = inner if os.path.isdir(inner) else root
        images = check_folder(os.path.join(root, "images"), "images")
        maps = check_folder(os.path.join(root, "segmentation"), "their segmentation maps, under the same names,")
        found = {path.stem: path for path in sorted(maps.iterdir()) if path.suffix.lower() in (".png", ".npy", ".bmp")}
        self.pairs = []
        for name in scan(images)[0]:
            if (stem := os.path.splitext(name)[0]) not in found:
                raise FileNotFoundError(f"{maps} has no segmentation map of {name}: put {stem}.png there")
            self.pairs.append((images / name, found[stem]))
        self.size = size
        self.crop_size = crop_size or size
        self.dtype = torch.float32 if segmentation_to_float32 else torch.bool

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict[str, Any]:
        path, map_path = self.pairs[i]
        image, ids = load_image(path), read_segmentation(map_path)
        if image.size != (ids.shape[1], ids.shape[0]):
            raise ValueError(
                f"{path} has {image.width}x{image.height} pixels and {map_path} {ids.shape[1]}x{ids.shape[0]}"
            )
        shorter = max(self.size or min(image.size), self.crop_size or 1)
        classes = Image.fromarray(ids.numpy().astype(np.int32))
        image, classes = Resize(shorter, "bicubic")(image), Resize(shorter, "nearest")(classes)
        if self.crop_size is not None:
            box = square_box(image.size, self.crop_size, random=self.part == "train")
            image, classes = image.crop(box), classes.crop(box)
        planes = one_hot_map(torch.from_numpy(np.asarray(classes).astype(np.int64)), CLASSES)[0]
        return {
            "image": to_array(image),
            "segmentation": planes.movedim(0, -1).to(self.dtype).numpy(),
            "file_path_": str(path),
        }


class RFWTrain(_Landscapes):
    """Training images with a random crop."""


class RFWValidation(_Landscapes):
    """Validation images with a centre crop."""

    part = "validation"
