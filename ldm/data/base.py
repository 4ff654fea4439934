"""Bases of the public data sets: lists of image files, and an iterable of prompts and images."""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ldm.data.image_transforms import CenterCrop, Compose, RandomCrop, Resize, to_array
from ldm.images import load_image

logger = logging.getLogger(__name__)


class Txt2ImgIterableBaseDataset(IterableDataset):
    """Interface of data sets that yield items in an order of their own.

    Args:
        num_records: the length.
        valid_ids: what `sample_ids` is at first; each loading process gets a part of it.
        size: side of the images.
    """

    def __init__(self, num_records: int = 0, valid_ids: Sequence[Any] | None = None, size: int = 256) -> None:
        super().__init__()
        self.num_records = num_records
        self.valid_ids = valid_ids
        self.sample_ids = valid_ids
        self.size = size
        logger.info("%s has %d examples", type(self).__name__, len(self))

    def __len__(self) -> int:
        return self.num_records

    def select_part(self, part: int, parts: int) -> None:
        """Set `sample_ids` to one of `parts` parts of `valid_ids`, for a loading process."""
        if self.valid_ids is not None:
            length = len(self.valid_ids)
            self.sample_ids = self.valid_ids[part * length // parts : (part + 1) * length // parts]

    @abstractmethod
    def __iter__(self) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


class ImagePaths(Dataset):
    """Images by their paths.

    Args:
        paths: the files.
        size: resize the shorter side to so many pixels; None leaves images as they are.
        random_crop: cut a square at random places instead of the centre.
        labels: lists as long as `paths`, whose entries go into the items.
        crop_size: side of the square, `size` by default. Without either, images keep their shape.

    Items are {"image": float32 (H, W, 3) in [-1, 1], "file_path_": str, ...} with the labels' entries.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        size: int | None = None,
        random_crop: bool = False,
        labels: Mapping[str, Sequence[Any]] | None = None,
        crop_size: int | None = None,
    ) -> None:
        self.size = size
        self.random_crop = random_crop
        self.labels: dict[str, Any] = dict(labels or {})
        self.labels["file_path_"] = [os.fspath(path) for path in paths]
        self.preprocessor = resize_and_crop(size, crop_size, random_crop)

    def __len__(self) -> int:
        return len(self.labels["file_path_"])

    def __getitem__(self, i: int) -> dict[str, Any]:
        entries = {key: values[i] for key, values in self.labels.items()}
        return {"image": self.preprocess_image(entries["file_path_"]), **entries}

    def preprocess_image(self, image_path: str) -> np.ndarray:
        """Read an image as float32 (H, W, 3) in [-1, 1], resized and cropped."""
        return to_array(self.preprocessor(self.read(image_path)))

    def read(self, path: str) -> Image.Image:
        """Read a file as an RGB image."""
        return load_image(path, shrink_to=self.size)


class NumpyPaths(ImagePaths):
    """Images that are arrays (1, 3, H, W) or (H, W, 3) of uint8 in .npy files."""

    def read(self, path: str) -> Image.Image:
        """Read a .npy file as an RGB image. Raises ValueError for an array that is none."""
        try:
            pixels = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is not an array of pixels: {error}") from None
        shape = pixels.shape
        if pixels.ndim == 4 and len(pixels) == 1:
            pixels = pixels[0]
        if pixels.ndim == 3 and pixels.shape[0] == 3:
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"{path} must hold uint8 (1, 3, H, W), not {pixels.dtype} {shape}")
        return Image.fromarray(np.ascontiguousarray(pixels))


class WrappedPaths(Dataset):
    """A data set whose items come from `data`, an `ImagePaths`; what is not in `keys` is left out of them."""

    data: Dataset
    keys: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # torch's type has no length

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = self.data[i]
        return item if not self.keys else {key: item[key] for key in self.keys}


class CustomTrain(WrappedPaths):
    """The images that a text file lists, a path a line, resized and cropped around the centre to `size`."""

    def __init__(self, size: int, training_images_list_file: str) -> None:
        self.data = ImagePaths(read_list(training_images_list_file), size)


class CustomTest(WrappedPaths):
    """The images that a text file lists, for validation."""

    def __init__(self, size: int, test_images_list_file: str) -> None:
        self.data = ImagePaths(read_list(test_images_list_file), size)


def resize_and_crop(size: int | None, crop_size: int | None = None, random_crop: bool = False) -> Compose:
    """Transform that resizes the shorter side to `size` and cuts a square of `crop_size` pixels."""
    crop_size = crop_size or size
    if crop_size is None:
        return Compose([])
    crop = RandomCrop(crop_size) if random_crop else CenterCrop(crop_size)
    return Compose([Resize(max(size, crop_size)) if size else AtLeast(crop_size), crop])


class AtLeast:
    """Enlarge an image whose shorter side has less than `size` pixels."""

    def __init__(self, size: int) -> None:
        self.resize = Resize(size)

    def __call__(self, image: Image.Image) -> Image.Image:
        size = self.resize.size
        return self.resize(image) if isinstance(size, int) and min(image.size) < size else image


def read_list(path: str | os.PathLike[str], root: str | os.PathLike[str] = "") -> list[str]:
    """Read a text file of paths, one a line, relative to `root`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it lists nothing.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"there is no list of images {path} (in {os.getcwd()}): put a text file there, with a path a line"
            + (f" relative to {root}" if root else "")
        )
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path} lists no images")
    return [os.path.join(root, name) for name in names]


def check_folder(path: str | os.PathLike[str], what: str) -> Path:
    """The folder `path`. Raises FileNotFoundError, saying what belongs there, if there is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} (in {os.getcwd()}): put {what} there, or set root")
    return folder
