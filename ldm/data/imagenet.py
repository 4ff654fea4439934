"""ImageNet (ILSVRC2012), for class-conditional models and for super-resolution."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch.utils.data import Dataset, Subset

from ldm.data.base import ImagePaths, check_folder
from ldm.data.image_transforms import square_box, to_array
from ldm.images import load_image
from ldm.modules.image_degradation import degradation_fn_bsr, degradation_fn_bsr_light, resize

logger = logging.getLogger(__name__)

BROKEN = "n06596364_9591.JPEG"  # not an image of its class


def synset2idx(path_to_yaml: str = "data/index_synset.yaml") -> dict[str, int]:
    """Published class index of each synset, from a YAML file of lines such as `0: n01440764`."""
    with open(path_to_yaml, encoding="utf-8") as file:
        return {synset: int(index) for index, synset in yaml.safe_load(file).items()}


class ImageNetBase(Dataset):
    """ImageNet by a folder of the layout `data/<synset>/*.JPEG`.

    Args:
        config: `size` (256), `sub_indices` ("0-9, 20" or synsets: these classes only) and `keep_orig_class_label`
            (False: labels count the synsets present, sorted; True: the published indices, by index_synset.yaml).
        root: the folder; by default `NAME` in `data_root`, or in $XDG_CACHE_HOME/autoencoders/data.

    Items are `image` (float32 (size, size, 3) in [-1, 1]; not with `process_images=False`), `file_path_`, `relpath`,
    `synsets`, `class_label` and `human_label`.
    """

    NAME = "ILSVRC2012_train"
    process_images: bool = True
    data_root: str | None = None
    random_crop: bool = False

    def __init__(self, config: Mapping[str, Any] | None = None, root: str | None = None) -> None:
        self.config: Mapping[str, Any] = config or {}
        self.root_given = root
        self.keep_orig_class_label = self.config.get("keep_orig_class_label", False)
        self._prepare()
        self._prepare_synset_to_human()
        self._prepare_idx_to_synset()
        self._prepare_human_to_integer_label()
        self._load()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.data[i]

    def _prepare(self) -> None:
        """Find the folder, and list its files in filelist.txt unless that is done."""
        cache = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        base = self.data_root or os.path.join(cache, "autoencoders", "data")
        self.root = str(self.root_given or os.path.join(base, self.NAME))
        self.datadir = os.path.join(self.root, "data")
        self.txt_filelist = os.path.join(self.root, "filelist.txt")
        self.human_dict = os.path.join(self.root, "synset_human.txt")
        self.idx2syn = os.path.join(self.root, "index_synset.yaml")
        self.human2integer = os.path.join(self.root, "imagenet1000_clsidx_to_labels.txt")
        if os.path.isfile(self.txt_filelist):
            self.relpaths = Path(self.txt_filelist).read_text(encoding="utf-8").split("\n")
            self.relpaths = [name for name in self.relpaths if name]
            return
        folder = check_folder(self.datadir, f"the images of {self.NAME}, a folder of .JPEG files for each synset,")
        self.relpaths = sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*.JPEG"))
        if not self.relpaths:
            raise FileNotFoundError(f"{self.datadir} has no images: <synset>/*.JPEG are looked for")
        with contextlib.suppress(OSError):  # of a folder that is read only
            Path(self.txt_filelist).write_text("\n".join(self.relpaths) + "\n", encoding="utf-8")
            Path(self.root, ".ready").touch()

    def _filter_relpaths(self, relpaths: list[str]) -> list[str]:
        """Leave out the broken file, and the classes that `sub_indices` does not name."""
        relpaths = [path for path in relpaths if path.rpartition("/")[2] != BROKEN]
        if (wanted := self.config.get("sub_indices")) is None:
            return relpaths
        chosen = self._chosen_synsets(str(wanted))
        return [path for path in relpaths if path.partition("/")[0] in chosen]

    def _chosen_synsets(self, text: str) -> set[str]:
        """Synsets of a list such as "0-9, 20" or "n01440764, n01443537"."""
        chosen: set[str] = set()
        synsets: dict[int, str] = {}
        for entry in filter(None, (entry.strip() for entry in text.split(","))):
            if entry.startswith("n"):
                chosen.add(entry)
                continue
            synsets = synsets or {index: synset for synset, index in self._published_indices().items()}
            try:
                first, _, last = entry.partition("-")
                chosen |= {synsets[index] for index in range(int(first), int(last or first) + 1)}
            except (ValueError, KeyError):
                raise ValueError(f"sub_indices {text!r}: {entry!r} is no class of {self.idx2syn}") from None
        return chosen

    def _published_indices(self) -> dict[str, int]:
        if not os.path.isfile(self.idx2syn):
            raise FileNotFoundError(
                f"there is no {self.idx2syn}, which keep_orig_class_label and sub_indices need: put ImageNet's "
                "index_synset.yaml there, of lines such as `0: n01440764`"
            )
        return synset2idx(self.idx2syn)

    def _prepare_synset_to_human(self) -> None:
        """Read the classes' names; without the file, synsets are their names."""
        self.synset_names: dict[str, str] = {}
        if not os.path.isfile(self.human_dict):
            logger.warning("there is no %s: human_label is the synset", self.human_dict)
            return
        for line in Path(self.human_dict).read_text(encoding="utf-8").splitlines():
            synset, _, name = line.strip().partition(" ")
            self.synset_names[synset] = name.strip()

    def _prepare_idx_to_synset(self) -> None:
        """Read the published indices, if labels are to be these."""
        self.synset2idx = self._published_indices() if self.keep_orig_class_label else None

    def _prepare_human_to_integer_label(self) -> None:
        """Read the published indices by name, from lines such as `0: 'tench, Tinca tinca',`."""
        self.human2integer_dict: dict[str, int] = {}
        if os.path.isfile(self.human2integer):
            for line in Path(self.human2integer).read_text(encoding="utf-8").splitlines():
                index, colon, name = line.strip(" {},").partition(":")
                if colon:
                    self.human2integer_dict[name.strip(" ,'\"")] = int(index)

    def _load(self) -> None:
        """Make the labels, and the data set of images."""
        self.relpaths = self._filter_relpaths(self.relpaths)
        if not self.relpaths:
            raise ValueError(f"{self.root} has no images of sub_indices={self.config.get('sub_indices')!r}")
        self.synsets = [path.partition("/")[0] for path in self.relpaths]
        self.abspaths = [os.path.join(self.datadir, path) for path in self.relpaths]
        indices = self.synset2idx or {synset: index for index, synset in enumerate(sorted(set(self.synsets)))}
        if missing := sorted(set(self.synsets) - indices.keys()):
            raise ValueError(f"{self.idx2syn} has no index of {', '.join(missing[:3])}")
        self.class_labels = [indices[synset] for synset in self.synsets]
        self.human_labels = [self.synset_names.get(synset, synset) for synset in self.synsets]
        labels: dict[str, Any] = {
            "relpath": self.relpaths,
            "synsets": self.synsets,
            "class_label": self.class_labels,
            "human_label": self.human_labels,
        }
        self.size = self.config.get("size", 256)
        kind = ImagePaths if self.process_images else _Paths
        self.data = kind(self.abspaths, size=self.size, random_crop=self.random_crop, labels=labels)


class _Paths(ImagePaths):
    """The entries of images, without these."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {key: values[i] for key, values in self.labels.items()}


class ImageNetTrain(ImageNetBase):
    """Training images. process_images: read the images; data_root: the folder that ILSVRC2012_train is in."""

    NAME = "ILSVRC2012_train"

    def __init__(self, process_images: bool = True, data_root: str | None = None, **kwargs: Any) -> None:
        self.process_images = process_images
        self.data_root = data_root
        super().__init__(**kwargs)

    def _prepare(self) -> None:
        self.random_crop = self.config.get("ImageNetTrain/random_crop", True)
        super()._prepare()


class ImageNetValidation(ImageNetBase):
    """Validation images. process_images: read the images; data_root: the folder that ILSVRC2012_validation is in."""

    NAME = "ILSVRC2012_validation"

    def __init__(self, process_images: bool = True, data_root: str | None = None, **kwargs: Any) -> None:
        self.process_images = process_images
        self.data_root = data_root
        super().__init__(**kwargs)

    def _prepare(self) -> None:
        self.random_crop = self.config.get("ImageNetValidation/random_crop", False)
        super()._prepare()


# ----------------------------------------------------------------------------------------------------- super-resolution


class DegradedImages(Dataset):
    """Random squares of images, and their degraded, smaller versions.

    Args:
        size: side of `image`.
        degradation: "bsrgan", "bsrgan_light", "cv_" and nearest, bilinear, bicubic, area or lanczos (without
            antialiasing, as OpenCV), or "pil_" and nearest, bilinear, bicubic, box, hamming or lanczos.
        downscale_f: how many times smaller `LR_image` is.
        min_crop_f, max_crop_f: side of the squares, relative to the image's shorter side.
        random_crop: random squares; otherwise those in the middle.

    Items are those of `base`, with `image` (size, size, 3) and `LR_image` (size / f, size / f, 3), float32 in [-1, 1].
    """

    def __init__(
        self,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
    ) -> None:
        if size is None or size < downscale_f:
            raise ValueError(f"size is the side of the images in pixels, at least downscale_f={downscale_f}")
        if not 0 < min_crop_f <= max_crop_f <= 1:
            raise ValueError(f"0 < min_crop_f={min_crop_f} <= max_crop_f={max_crop_f} <= 1 does not hold")
        self.size = size
        self.LR_size = int(size / downscale_f)
        self.min_crop_f = min_crop_f
        self.max_crop_f = max_crop_f
        self.center_crop = not random_crop
        self.degradation_process = degradation_of(degradation, downscale_f)
        self.base = self.get_base()

    def get_base(self) -> Any:
        """The data set whose items have the `file_path_` of images."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, i: int) -> dict[str, Any]:
        example = dict(self.base[i])
        image = load_image(example["file_path_"])
        side = max(1, int(np.random.uniform(self.min_crop_f, self.max_crop_f) * min(image.size)))
        pixels = np.asarray(image.crop(square_box(image.size, side, random=not self.center_crop)))
        pixels = _to_uint8(resize(pixels, (self.size, self.size), "area"))
        example["image"] = (pixels / 127.5 - 1.0).astype(np.float32)
        example["LR_image"] = to_array(Image.fromarray(self.degradation_process(pixels)))
        return example


def degradation_of(name: str | None, factor: int) -> Callable[[np.ndarray], np.ndarray]:
    """The degradation that makes an image (H, W, 3) of uint8 `factor` times smaller.

    Raises:
        ValueError: For a name that is none.
    """
    if name == "bsrgan":
        return lambda image: degradation_fn_bsr(image=image, sf=factor)["image"]
    if name == "bsrgan_light":
        return lambda image: degradation_fn_bsr_light(image=image, sf=factor)["image"]
    library, _, method = str(name).partition("_")
    if library == "cv" and method in ("nearest", "bilinear", "bicubic", "area", "lanczos"):
        return partial(_shrink, factor=factor, method=method)
    if library == "pil" and method.upper() in Image.Resampling.__members__:
        return partial(_shrink_by_pil, factor=factor, method=Image.Resampling[method.upper()])
    raise ValueError(f"degradation {name!r} is not one of bsrgan, bsrgan_light, cv_... or pil_...")


def _shrink(image: np.ndarray, factor: int, method: str) -> np.ndarray:
    return _to_uint8(resize(image, (image.shape[0] // factor, image.shape[1] // factor), method))


def _shrink_by_pil(image: np.ndarray, factor: int, method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((image.shape[1] // factor, image.shape[0] // factor), method))


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


class ImageNetSR(DegradedImages):
    """ImageNet's large images for super-resolution, see `DegradedImages`.

    Args:
        root: the folder of ImageNet, as for `ImageNetBase`.
        indices: a pickled list of the images to use; without such a file, all of them.
    """

    def __init__(
        self,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        root: str | None = None,
        indices: str | None = None,
    ) -> None:
        self.root = root
        self.indices = indices
        super().__init__(size, degradation, downscale_f, min_crop_f, max_crop_f, random_crop)


class ImageNetSRTrain(ImageNetSR):
    """Training images for super-resolution."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def get_base(self) -> Any:
        """The images that data/imagenet_train_hr_indices.p lists."""
        dataset = ImageNetTrain(process_images=False, root=self.root)
        return subset(dataset, self.indices or "data/imagenet_train_hr_indices.p")


class ImageNetSRValidation(ImageNetSR):
    """Validation images for super-resolution."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def get_base(self) -> Any:
        """The images that data/imagenet_val_hr_indices.p lists."""
        dataset = ImageNetValidation(process_images=False, root=self.root)
        return subset(dataset, self.indices or "data/imagenet_val_hr_indices.p")


def subset(dataset: Dataset, path: str) -> Dataset:
    """The items of a data set that a pickled list numbers; all of them, if there is no such file."""
    if not os.path.isfile(path):
        logger.info("there is no %s: all images are used", path)
        return dataset
    with open(path, "rb") as file:
        try:
            indices = _PlainUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is not a pickled list of numbers: {error}") from None
    if not isinstance(indices, list) or not all(isinstance(index, int) for index in indices):
        raise ValueError(f"{path} is not a pickled list of numbers")
    return Subset(dataset, indices)


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts and lists; a pickle that names code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
