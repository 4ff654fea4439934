"""Folders of images with captions, as fine-tuning projects name them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ldm.data.base import check_folder
from ldm.data.folder import ImageFolder
from ldm.data.image_transforms import build_transforms, to_array
from ldm.images import load_image
from ldm.util import instantiate_from_config


class FolderData(Dataset):
    """The images in a folder, with captions from a file.

    Args:
        root_dir: the folder.
        caption_file: a .json file, a list of {"file_name", "text"} or a mapping of names to texts, or a .jsonl file of
            such entries; relative to `root_dir`. Only the images that it names count.
        image_transforms: configs of transforms, such as torchvision.transforms.Resize.
        ext: suffix, or suffixes, of the images.
        default_caption: the caption of images that have none.
        postprocess: config of a callable that is given each item.
        return_paths: add `path` to the items.

    Items are {"image": float32 (H, W, 3) in [-1, 1], "txt": str}.
    """

    def __init__(
        self,
        root_dir: str,
        caption_file: str | None = None,
        image_transforms: Any = (),
        ext: str | Sequence[str] = "jpg",
        default_caption: str = "",
        postprocess: Any = None,
        return_paths: bool = False,
    ) -> None:
        self.root_dir = check_folder(root_dir, "the images")
        self.default_caption = default_caption
        self.return_paths = return_paths
        self.postprocess = _build(postprocess)
        self.tform = build_transforms(image_transforms)
        self.captions = read_captions(self.root_dir / caption_file) if caption_file is not None else None
        suffixes = {"." + suffix.lower().lstrip(".") for suffix in ([ext] if isinstance(ext, str) else ext)}
        found = (path for path in sorted(self.root_dir.rglob("*")) if path.suffix.lower() in suffixes)
        self.paths = list(found) if self.captions is None else [self.root_dir / name for name in self.captions]
        if not self.paths:
            raise ValueError(f"there are no images in {self.root_dir}: files that end in {', '.join(suffixes)} count")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        item: dict[str, Any] = {"image": self.process_im(load_image(path))}
        captions = self.captions or {}
        item["txt"] = captions.get(path.relative_to(self.root_dir).as_posix()) or self.default_caption
        if self.return_paths:
            item["path"] = str(path)
        return self.postprocess(item) if self.postprocess else item

    def process_im(self, im: Any) -> Any:
        """Transform an image, and convert it to float32 (H, W, 3) in [-1, 1]."""
        return to_array(self.tform(im))


def read_captions(path: Path) -> dict[str, str]:
    """Captions by file name, from a .json or .jsonl file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a file of another type, or other content.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no caption_file {path}: put it there, or leave caption_file out")
    text = path.read_text(encoding="utf-8-sig")
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        elif path.suffix == ".jsonl":
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            raise ValueError(f"caption_file {path} ends in {path.suffix}, not in .json or .jsonl")
        if isinstance(content, Mapping):
            return {str(name): str(caption) for name, caption in content.items()}
        return {str(entry["file_name"]): str(entry["text"]) for entry in content}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} must hold entries such as {{"file_name": "a.jpg", "text": "..."}}: {error!r}'
        ) from None


class hf_dataset(Dataset):
    """A Hugging Face data set on the disk, as `datasets.save_to_disk` writes it. The package `datasets` is needed.

    Args:
        name: the folder.
        image_transforms: configs of transforms.
        image_column, text_column: columns to read.
        split: which part of a data set that has several.
        image_key, caption_key: names of the entries of the items.
    """

    def __init__(
        self,
        name: str,
        image_transforms: Any = (),
        image_column: str = "image",
        text_column: str = "text",
        split: str = "train",
        image_key: str = "image",
        caption_key: str = "txt",
    ) -> None:
        folder = check_folder(name, "a data set saved by datasets' save_to_disk (nothing is downloaded)")
        try:
            from datasets import DatasetDict, load_from_disk  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise ImportError("ldm.data.simple.hf_dataset needs the package datasets: pip install datasets") from None
        data = load_from_disk(str(folder))
        self.data = data[split] if isinstance(data, DatasetDict) else data
        self.tform = build_transforms(image_transforms)
        self.columns = {"image": image_column, "text": text_column}
        self.keys = {"image": image_key, "text": caption_key}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.data[int(index)]
        image = self.tform(row[self.columns["image"]].convert("RGB"))
        return {self.keys["image"]: to_array(image), self.keys["text"]: row[self.columns["text"]]}


class PreviewsTrain(ImageFolder):
    """A folder of images with captions: `image` and `caption`. root: by default data/previews/train."""

    def __init__(self, size: int = 256, root: str = os.path.join("data", "previews", "train"), **kwargs: Any) -> None:
        super().__init__(root, size, **{"crop": "random", **kwargs})


class PreviewsValidation(ImageFolder):
    """The same for validation, cropped at the centre. root: by default data/previews/validation."""

    def __init__(
        self, size: int = 256, root: str = os.path.join("data", "previews", "validation"), **kwargs: Any
    ) -> None:
        super().__init__(root, size, **kwargs)


def _build(config: Any) -> Callable[[Any], Any] | None:
    return config if config is None or callable(config) else instantiate_from_config(config)
