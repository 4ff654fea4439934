"""LSUN: scenes and objects, as lists of JPEG files.

The lists and folders of each class are in `root`, by default data/lsun in the working directory:
church_outdoor_train.txt lists files in churches/, and so on.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ldm.data.base import check_folder, read_list
from ldm.data.image_transforms import RandomHorizontalFlip, resampling, to_array
from ldm.images import load_image

ROOT = os.path.join("data", "lsun")


class LSUNBase(Dataset):
    """The images of a list.

    Args:
        txt_file: the list, names relative to `data_root`.
        data_root: the folder of the images.
        size: side of the images; None keeps the largest centre square as it is.
        interpolation: linear, bilinear, bicubic or lanczos.
        flip_p: probability of mirroring.

    Items are {"image": float32 (size, size, 3) in [-1, 1], "relative_file_path_", "file_path_"}.
    """

    def __init__(
        self,
        txt_file: str,
        data_root: str,
        size: int | None = None,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
    ) -> None:
        self.data_paths = txt_file
        self.data_root = str(check_folder(data_root, "the images of LSUN"))
        self.image_paths = read_list(txt_file)
        self._length = len(self.image_paths)
        self.labels = {
            "relative_file_path_": list(self.image_paths),
            "file_path_": [os.path.join(data_root, name) for name in self.image_paths],
        }
        self.size = size
        self.interpolation = resampling(interpolation)
        self.flip = RandomHorizontalFlip(flip_p)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, Any]:
        item: dict[str, Any] = {key: values[i] for key, values in self.labels.items()}
        image = load_image(item["file_path_"], shrink_to=self.size)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if self.size is not None:
            image = image.resize((self.size, self.size), self.interpolation)
        item["image"] = np.ascontiguousarray(to_array(self.flip(image)))
        return item


class _Train(LSUNBase):
    kind, folder = "", ""  # names of the lists and of the folder of images

    def __init__(self, root: str = ROOT, **kwargs: Any) -> None:
        super().__init__(**{**_places(self, "train", root), **kwargs})


class _Validation(_Train):
    def __init__(self, flip_p: float = 0.0, root: str = ROOT, **kwargs: Any) -> None:
        super().__init__(**{**_places(self, "val", root), "flip_p": flip_p, **kwargs})


def _places(dataset: _Train, part: str, root: str) -> dict[str, str]:
    txt_file = os.path.join(root, f"{dataset.kind}_{part}.txt")
    return {"txt_file": txt_file, "data_root": os.path.join(root, dataset.folder)}


class LSUNChurchesTrain(_Train):
    """Outdoor churches."""

    kind, folder = "church_outdoor", "churches"


class LSUNChurchesValidation(_Validation):
    """Outdoor churches, for validation: not flipped."""

    kind, folder = "church_outdoor", "churches"


class LSUNBedroomsTrain(_Train):
    """Bedrooms."""

    kind, folder = "bedrooms", "bedrooms"


class LSUNBedroomsValidation(_Validation):
    """Bedrooms, for validation: not flipped."""

    kind, folder = "bedrooms", "bedrooms"


class LSUNCatsTrain(_Train):
    """Cats."""

    kind, folder = "cat", "cats"


class LSUNCatsValidation(_Validation):
    """Cats, for validation: not flipped."""

    kind, folder = "cat", "cats"
