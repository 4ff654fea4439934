"""Web data sets: tar files of images with captions and what is known of them, as LAION's are kept.

The tars are local files; nothing is downloaded. Each sample is KEY.jpg, KEY.txt and KEY.json, one after the other.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ldm.data.image_transforms import build_transforms, to_array
from ldm.data.masks import random_mask
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
FORMATS = ("JPEG", "PNG", "WEBP")
_REMOTE = re.compile(r"(pipe:|\w+://)")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]+)\}")

Sample = dict[str, Any]


class WebDataset(IterableDataset):
    """Samples of tar files.

    Processes and their loading workers take different tars, in a random order in training. Samples that `keep` does not
    accept, and images that cannot be read, are left out.

    Args:
        shards: paths of the tars.
        image_key: the entry that becomes float32 (H, W, 3) in [-1, 1], the suffix of its file.
        image_transforms: configs of transforms of the image.
        postprocess: config of a callable that is given each sample.
        shuffle: how many samples are mixed; 0 keeps the order of tars and samples.
        filters: what `accepts` takes.
        rank, world: number of this process, and of all of them.
        seed: of the order.

    Samples are {image_key: image, "txt": str, "json": dict, "__key__", "__url__"}, and what `postprocess` adds.
    """

    def __init__(
        self,
        shards: Sequence[str],
        image_key: str = "jpg",
        image_transforms: Any = None,
        postprocess: Any = None,
        shuffle: int = 0,
        filters: Mapping[str, Any] | None = None,
        rank: int = 0,
        world: int = 1,
        seed: int = 23,
    ) -> None:
        super().__init__()
        self.shards = list(shards)
        self.image_key = image_key
        self.transform = build_transforms(image_transforms)
        self.postprocess = None if postprocess is None else instantiate_from_config(postprocess)
        self.shuffle = shuffle
        self.filters = dict(filters or {})
        self.rank, self.world, self.seed = rank, world, seed
        self.epoch = 0

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        place, places = self.rank * workers + number, self.world * workers
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.shards)) if self.shuffle else np.arange(len(self.shards))
        rng = np.random.default_rng((self.seed, self.epoch, place))
        np.random.seed(rng.integers(2**32, size=4, dtype=np.uint32))  # what transforms draw from
        samples: Iterator[dict[str, bytes]]
        if len(self.shards) < places:  # too few to divide: every place reads all, and takes its samples
            samples = itertools.islice(self._raw_samples(order), place, None, places)
        else:
            samples = self._raw_samples(order[place::places])
        for raw in _shuffled(samples, self.shuffle, rng):
            sample = self._decode(raw)
            if sample is not None:
                yield self.postprocess(sample) if self.postprocess else sample

    def _raw_samples(self, order: np.ndarray) -> Iterator[dict[str, bytes]]:
        return itertools.chain.from_iterable(read_tar(self.shards[k]) for k in order)

    def _decode(self, raw: dict[str, bytes]) -> Sample | None:
        """A sample with its image and texts decoded; None for one to leave out."""
        sample: Sample = {"__key__": raw["__key__"].decode(), "__url__": raw["__url__"].decode()}
        try:
            sample["json"] = json.loads(raw.get("json", b"{}"))
            sample["txt"] = raw.get("txt", b"").decode("utf-8")
            if self.image_key not in raw or not accepts(sample, **self.filters):
                return None
            image = _decode_image(raw[self.image_key])
        except (ValueError, OSError) as error:
            logger.warning("%s of %s is left out: %s", sample["__key__"], sample["__url__"], error)
            return None
        sample[self.image_key] = to_array(self.transform(image))
        return sample


def _decode_image(content: bytes) -> Image.Image:
    """Decode an image as RGB. Raises OSError or ValueError for one that is damaged or too large."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def accepts(
    sample: Mapping[str, Any],
    min_size: int | None = None,
    max_pwatermark: float = 1.0,
    p_unsafe_threshold: float | None = None,
    words: Sequence[str] = (),
) -> bool:
    """Whether a sample is large, free of watermarks and safe enough, and its caption has none of `words`.

    Entries that `json` lacks accept the sample only where the filter is off, as is `max_pwatermark` of 1.
    """
    facts = sample["json"]
    if min_size is not None and min(facts.get("original_width", 0), facts.get("original_height", 0)) < min_size:
        return False
    if max_pwatermark < 1 and not (facts.get("pwatermark") is not None and facts["pwatermark"] <= max_pwatermark):
        return False
    unsafe = facts.get("punsafe")
    if p_unsafe_threshold is not None and not (unsafe is not None and unsafe <= p_unsafe_threshold):
        return False
    caption = sample["txt"].lower()
    return not any(re.search(rf"\b{re.escape(word.lower())}\b", caption) for word in words)


def read_tar(path: str) -> Iterator[dict[str, bytes]]:
    """The samples of a tar: {"__key__", "__url__", suffix: content}, files of one key being neighbours."""
    sample: dict[str, bytes] = {}
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            name = member.name.rpartition("/")[2]
            if not member.isfile() or name.startswith("."):
                continue
            key, _, suffix = name.partition(".")
            key = member.name[: len(member.name) - len(name)] + key
            if sample and sample["__key__"] != key.encode():
                yield sample
                sample = {}
            content = tar.extractfile(member)
            assert content is not None
            sample |= {"__key__": key.encode(), "__url__": str(path).encode(), suffix.lower(): content.read()}
    if sample:
        yield sample


def _shuffled(samples: Iterator[Any], size: int, rng: np.random.Generator) -> Iterator[Any]:
    """Mix a stream: keep `size` items, and give a random one of them for each that comes."""
    if size <= 1:
        yield from samples
        return
    kept: list[Any] = []
    for sample in samples:
        kept.append(sample)
        if len(kept) >= size:
            k = int(rng.integers(len(kept)))
            kept[k], kept[-1] = kept[-1], kept[k]
            yield kept.pop()
    yield from (kept[k] for k in rng.permutation(len(kept)))


def expand_shards(shards: str | Sequence[str], base: str | None = None) -> list[str]:
    """The tars that "{000..123}.tar", a glob, or a list of these names, in the folder `base`.

    Raises:
        ValueError: For addresses and commands, since nothing is downloaded.
        FileNotFoundError: For tars that are not there.
    """
    texts = [shards] if isinstance(shards, str) else list(shards)
    found: list[str] = []
    for text in texts:
        name = text.strip().removesuffix(" -")
        if _REMOTE.match(name) or (base is not None and _REMOTE.match(base)):
            raise ValueError(
                f"shards {text!r} are elsewhere, and nothing is downloaded: put the tars into a folder, and set "
                'data.params.tar_base=FOLDER \'data.params.train.shards="{00000..00099}.tar"\' (or "*.tar"), and the '
                "same for validation"
            )
        pattern = os.path.join(os.path.expanduser(base or ""), name)
        for path in _expand_braces(pattern):
            matches = sorted(glob.glob(path)) if glob.has_magic(path) else [path] * os.path.isfile(path)
            if not matches:
                raise FileNotFoundError(f"there is no tar {path} (of shards {text!r}): put it there, or change shards")
            found += matches
    return found


def _expand_braces(pattern: str) -> list[str]:
    """The names that "{00..02}" and "{a,b}" stand for."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    if match[1] is not None:
        low, high = int(match[1]), int(match[2])
        choices = [str(number).zfill(len(match[1])) for number in range(low, high + 1)]
    else:
        choices = match[3].split(",")
    tails = _expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + tail for choice in choices for tail in tails]


class WebDataModuleFromConfig(pl.LightningDataModule):
    """Loaders of web data sets.

    Args:
        tar_base: the folder of the tars; None if shards are whole paths.
        batch_size: of each process.
        train, validation, test: each {shards, shuffle, image_key, image_transforms, postprocess}.
        num_workers: loading processes of each loader.
        multinode: divide the tars among the processes; otherwise each reads all of them.
        min_size: leave out images with a side that was shorter.
        max_pwatermark: leave out what is a watermark with more probability than this.
        p_unsafe_threshold: leave out what is unsafe with more probability than this.
        filter_word_list: a YAML list of words; captions with one of them are left out.
        seed: of the order.

    Batches have `jpg` (B, H, W, 3) in [-1, 1], `txt` and `json` as lists, and what `postprocess` adds.
    """

    def __init__(
        self,
        tar_base: str | None,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        num_workers: int = 4,
        multinode: bool = True,
        min_size: int | None = None,
        max_pwatermark: float = 1.0,
        p_unsafe_threshold: float | None = None,
        filter_word_list: str | None = None,
        seed: int = 23,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs:
            logger.info("%s: no use is made of %s", type(self).__name__, ", ".join(sorted(kwargs)))
        self.tar_base = tar_base
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.multinode = multinode
        self.seed = seed
        self.filters = {
            "min_size": min_size,
            "max_pwatermark": max_pwatermark,
            "p_unsafe_threshold": p_unsafe_threshold,
            "words": read_words(filter_word_list) if filter_word_list else (),
        }
        configs = dict(zip(SPLITS, (train, validation, test)))
        self.dataset_configs = {name: config for name, config in configs.items() if config is not None}
        self.datasets: dict[str, WebDataset] = {}
        self._epoch = 0
        if validation is not None:  # Lightning asks a data module without the method for none
            self.val_dataloader = lambda: self._loader("validation")  # type: ignore[method-assign]
        if test is not None:
            self.test_dataloader = lambda: self._loader("test")  # type: ignore[method-assign]

    def setup(self, stage: str | None = None) -> None:
        """Find the tars, and build the data sets, once."""
        for name, config in self.dataset_configs.items():
            if name not in self.datasets:
                options = {key: config[key] for key in ("image_transforms", "postprocess") if key in config}
                self.datasets[name] = WebDataset(
                    expand_shards(config["shards"], self.tar_base),
                    config.get("image_key", "jpg"),
                    shuffle=config.get("shuffle", 0),
                    filters=self.filters,
                    seed=self.seed,
                    **options,
                )

    def check_batch_size(self, world: int) -> None:
        """Accept any batch size: the number of samples is not known."""

    def start_at(self, epoch: int, batch: int) -> None:
        """Let training begin with this epoch. Within it, it begins anew: what was seen is not known."""
        self._epoch = epoch
        if batch:
            logger.warning("a web data set begins its epoch anew: %d batches are seen again, in another order", batch)

    def train_dataloader(self) -> DataLoader:
        """The training loader."""
        return self._loader("train")

    def _loader(self, name: str) -> DataLoader:
        dataset, trainer = self.datasets[name], self.trainer
        if self.multinode and trainer is not None:
            dataset.rank, dataset.world = trainer.global_rank, trainer.world_size
        dataset.epoch = self._epoch if name == "train" else 0
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=min(self.num_workers, len(dataset.shards)),
            collate_fn=collate,
            drop_last=name == "train",
        )


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """A batch: arrays and numbers as tensors, everything else as lists."""
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if isinstance(values[0], np.ndarray | Tensor):
            batch[key] = torch.stack([torch.as_tensor(np.ascontiguousarray(value)) for value in values])
        elif isinstance(values[0], int | float) and not isinstance(values[0], bool):
            batch[key] = torch.tensor(values)
        else:
            batch[key] = values
    return batch


def read_words(path: str) -> list[str]:
    """The words of a YAML file: a list, or lists by name. Raises FileNotFoundError or ValueError if it is none."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"there is no filter_word_list {path} (in {os.getcwd()}): put a YAML list of words there, or set "
            "data.params.filter_word_list=null to filter no captions"
        )
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    lists = content.values() if isinstance(content, Mapping) else [content]
    words = [word for entry in lists if isinstance(entry, list) for word in entry]
    if not words:
        raise ValueError(f"{path} is not a YAML list of words")
    return [str(word) for word in words]


# ------------------------------------------------------------------------------------------------------- postprocessing


class AddMask:
    """Add a random `mask` (H, W, 1) of 0 and 1, and `masked_image`, the image with zeros where the mask is 1.

    Args:
        mode: a name such as "512train"; with "-large" at its end masks cover more.
        p_drop: probability of a mask of ones.
    """

    def __init__(self, mode: str = "512train", p_drop: float = 0.0) -> None:
        if not re.fullmatch(r"\d+[a-z]+(-large)?", mode):
            raise ValueError(f"mode {mode!r} is not a name such as 512train or 512train-large")
        self.large = mode.endswith("-large")
        self.p_drop = p_drop

    def __call__(self, sample: MutableMapping[str, Any], image_key: str = "jpg") -> MutableMapping[str, Any]:
        image = np.asarray(sample[image_key])  # (H, W, 3)
        height, width = image.shape[:2]
        rng = np.random.default_rng(np.random.randint(2**32, size=4, dtype=np.uint32))
        mask = random_mask(height, width, rng, full=self.p_drop)
        if self.large:
            mask = np.maximum(mask, random_mask(height, width, rng, full=0.0))
        sample["mask"] = mask
        sample["masked_image"] = image * (mask < 0.5)
        return sample


class AddLR:
    """Add `lr`, the image made `factor` times smaller and resized to `output_size`, both bicubic.

    Args:
        factor: how many times smaller.
        output_size: side of `lr`.
        initial_size: resize the image to this side before.
        image_key: the image's entry.
    """

    def __init__(
        self, factor: float, output_size: int, initial_size: int | None = None, image_key: str = "jpg"
    ) -> None:
        self.factor = factor
        self.output_size = output_size
        self.initial_size = initial_size
        self.image_key = image_key

    def __call__(self, sample: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        x = torch.as_tensor(np.asarray(sample[self.image_key])).movedim(-1, 0)[None]
        if self.initial_size is not None:
            x = _resized(x, (self.initial_size, self.initial_size))
        x = _resized(x, tuple(max(1, int(side / self.factor)) for side in x.shape[2:]))
        x = _resized(x, (self.output_size, self.output_size))
        sample["lr"] = x[0].movedim(0, -1).clamp(-1, 1).numpy()
        return sample


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bicubic", align_corners=False, antialias=True)


class AddBW:
    """Add `lr`, the image in black and white, with three equal channels. image_key: the image's entry."""

    def __init__(self, image_key: str = "jpg") -> None:
        self.image_key = image_key

    def __call__(self, sample: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        image = np.asarray(sample[self.image_key])
        gray = image @ np.array([0.299, 0.587, 0.114], dtype=image.dtype)  # ITU-R BT.601
        sample["lr"] = np.repeat(gray[..., None], 3, axis=-1)
        return sample
