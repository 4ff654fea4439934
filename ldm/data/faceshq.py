"""CelebA-HQ and FFHQ, as lists of files.

The lists and folders are in `root`, by default data in the working directory: celebahqtrain.txt lists .npy files in
celebahq/, ffhqtrain.txt images in ffhq/, and the same for validation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.base import ImagePaths, NumpyPaths, WrappedPaths, check_folder, read_list
from ldm.data.image_transforms import square_box

ROOT = "data"


class _Faces(WrappedPaths):
    """The images of a list.

    Args:
        size: resize the shorter side to so many pixels, and cut the centre square.
        keys: what the items hold of `image` and `file_path_`; by default both.
    """

    name, part, kind = "ffhq", "train", ImagePaths

    def __init__(self, size: int | None, keys: Sequence[str] | None = None, root: str = ROOT) -> None:
        folder = check_folder(os.path.join(root, self.name), f"the images of {type(self).__name__}")
        self.data = self.kind(read_list(os.path.join(root, f"{self.name}{self.part}.txt"), folder), size)
        self.keys = keys


class CelebAHQTrain(_Faces):
    """CelebA-HQ, of arrays (1, 3, 1024, 1024) of uint8 in .npy files."""

    name, kind = "celebahq", NumpyPaths


class CelebAHQValidation(CelebAHQTrain):
    """CelebA-HQ, for validation."""

    part = "validation"


class FFHQTrain(_Faces):
    """FFHQ, of image files."""


class FFHQValidation(FFHQTrain):
    """FFHQ, for validation."""

    part = "validation"


class _FacesHQ(Dataset):
    """CelebA-HQ (class 0) and FFHQ (class 1), one after the other.

    Args:
        size: resize the shorter side to so many pixels, and cut the centre square.
        keys: what the items hold of the images' entries.
        crop_size: side of a smaller square to cut out of it.
        coord: add `coord` (H, W, 1), each pixel's position in the uncropped square over the number of its pixels.
    """

    random_crop = False

    def __init__(
        self,
        size: int | None,
        keys: Sequence[str] | None = None,
        crop_size: int | None = None,
        coord: bool = False,
        root: str = ROOT,
    ) -> None:
        kinds = (CelebAHQTrain, FFHQTrain) if self.random_crop else (CelebAHQValidation, FFHQValidation)
        self.datasets = [kind(size, keys, root) for kind in kinds]
        self.crop_size = crop_size
        self.coord = coord

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def __getitem__(self, i: int) -> dict[str, Any]:
        kind = int(i >= len(self.datasets[0]))
        item = dict(self.datasets[kind][i - kind * len(self.datasets[0])])
        height, width = item["image"].shape[:2]
        if self.coord:
            places = np.arange(height * width, dtype=np.float32) / (height * width)
            item["coord"] = places.reshape(height, width, 1)
        if self.crop_size is not None:
            if self.crop_size > min(height, width):
                raise ValueError(f"crop_size={self.crop_size} is larger than the images, {width}x{height}: raise size")
            left, top, right, bottom = square_box((width, height), self.crop_size, random=self.random_crop)
            for key in ("image", "coord") if self.coord else ("image",):
                item[key] = item[key][top:bottom, left:right]
        return {**item, "class": kind}


class FacesHQTrain(_FacesHQ):
    """CelebA-HQ and FFHQ with a random crop."""

    random_crop = True


class FacesHQValidation(_FacesHQ):
    """CelebA-HQ and FFHQ with a centre crop."""
