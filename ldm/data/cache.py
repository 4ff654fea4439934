"""Caches of latents and text embeddings: `build_cache` writes them, `CachedDataset` reads them as a data set.

For every image a cache holds the first stage's output before `scale_factor`, in one or several variants: `moments`, the
mean and log variance of a KL posterior, so that training still samples, or `latents` where there is no posterior.

A cache is a folder of `shard-00000.safetensors` ... and `index.json`, with the sha256 of every shard, the fingerprints
of the models and a description of the data set. Until the cache is complete, `unfinished.json` is there instead. Files
are written atomically.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import hashlib
import inspect
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ldm.checkpoint import fingerprint
from ldm.checkpoint.formats.storages import may_map, note_mapped
from ldm.data.loading import SeededItems
from ldm.files import atomic_write, sync_folder
from ldm.util import get_obj_from_str, instantiate_from_config

__all__ = ["CacheError", "CachedDataset", "build_cache", "ensure_caches", "is_finished"]

logger = logging.getLogger(__name__)

FORMAT = "ldm-latent-cache"
VERSION = 1
INDEX = "index.json"
UNFINISHED = "unfinished.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16}
NOT_ENCODING = ("loss.", "model_ema.")  # parts of a first stage that take no part in encoding
_LOCK = ".lock"
_NOT_COMPARED = ("root",)  # a data set may move


class CacheError(ValueError):
    """A cache that cannot be used; the message says what to do."""


def is_finished(folder: Path) -> bool:
    """Whether there is a complete cache in `folder`."""
    return (folder / INDEX).exists()


# ------------------------------------------------------------------------------------------------------------ reading


class CachedDataset:
    """The items of a finished cache: `moments` or `latents` (float32), captions and labels, and `context` if cached.

    Args:
        folder: Folder of the cache.
        dataset: The data set that was cached, or its config; captions are then taken from its `caption(i, rng)`, unless
            the cache holds their embeddings.
        verify: Compare the shards with their checksums, which reads all of them.
        make_if_missing: See `ensure_caches`.
        seed: Seed of the choice of variants, where items are taken by `[i]`.

    Raises:
        FileNotFoundError: There is no cache.
        CacheError: It is unfinished, damaged or of another data set.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        dataset: Any = None,
        verify: bool = True,
        make_if_missing: bool | Mapping[str, Any] = False,
        seed: int = 0,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.seed = seed
        self.index = _read_index(self.folder)
        self.dataset = instantiate_from_config(dataset) if isinstance(dataset, Mapping) else dataset
        if self.dataset is not None:
            _check_same_dataset(self.folder, self.index["dataset"], _describe(self.dataset))
        _check_shards(self.folder, self.index["shards"], verify)
        self._starts = np.cumsum([0, *(shard["items"] for shard in self.index["shards"])]).tolist()
        self._shards: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return self.index["items"]

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.get(i, np.random.default_rng((self.seed, i)))

    def get(self, i: int, rng: np.random.Generator) -> dict[str, Any]:
        """Item `i`; `rng` chooses its variant, and its caption if that is not cached."""
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} is outside 0..{len(self) - 1}")
        number = bisect.bisect_right(self._starts, i) - 1
        if number not in self._shards:
            self._shards[number] = _Shard(self.folder / self.index["shards"][number]["file"])
        shard, row = self._shards[number], i - self._starts[number]

        mirrors = 1 + self.index["flips"]
        variant = int(rng.integers(self.index["variants"] * mirrors))
        kind = self.index["kind"]
        item: dict[str, Any] = {kind: _float_copy(shard.tensors[kind][row, variant])}  # (C, h, w)
        for key in self.index["labels"]:
            item[key] = int(shard.tensors[key][row])
        for key in self.index["texts"]:
            item[key] = shard.texts[key][row][variant // mirrors]
        if self.index["context"]:
            item["context"] = _float_copy(shard.tensors["context"][row, variant // mirrors])  # (L, D)
        elif hasattr(self.dataset, "caption"):
            key = getattr(self.dataset, "caption_key", "caption")
            item[key] = self.dataset.caption(int(shard.tensors["source"][row]), rng)
        return item

    def check(self, model: Any) -> None:
        """Raise CacheError unless this `LatentDiffusion` would produce the same cache."""
        if not hasattr(model, "first_stage_model"):
            raise CacheError(
                f"the cache {self.folder} holds latents, but {type(model).__name__} trains on images: give it the data "
                "set itself"
            )
        if fingerprint(model.first_stage_model, NOT_ENCODING) != self.index["first_stage"]:
            raise CacheError(
                f"the cache {self.folder} was made by another first stage than this model's: delete it and make it "
                "again, or load the first stage that made it"
            )
        if not self.index["context"]:
            return
        if model.cond_stage_trainable:
            raise CacheError(
                f"the cache {self.folder} holds text embeddings, but this model trains its text encoder: make a cache "
                "without text, or set cond_stage_trainable: false"
            )
        if fingerprint(model.cond_stage_model) != self.index["text_encoder"] or not self._same_context(model):
            raise CacheError(
                f"the text embeddings in the cache {self.folder} were made by another text encoder than this model's: "
                "delete the cache and make it again"
            )

    @torch.no_grad()
    def _same_context(self, model: Any) -> bool:
        """Whether the model embeds the first caption as in the cache: its layer or its tokens may have changed."""
        item = self[0]
        found = model.get_learned_conditioning([item[model.cond_stage_key]])[0].float().cpu()
        return found.shape == item["context"].shape and torch.allclose(found, item["context"], rtol=0.02, atol=0.02)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # another process maps the files itself


class _Shard:
    """One file, memory-mapped where that is safe, and the texts in its header."""

    tensors: Mapping[str, Tensor | _Rows]

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            mapped = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.texts: dict[str, list[list[str]]] = json.loads(file.metadata()["texts"])
        if may_map(path):
            self.tensors = mapped
            note_mapped(path)
            return
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))  # which safe_open has checked
        self.tensors = {
            key: _Rows(path, 8 + length + header[key]["data_offsets"][0], like) for key, like in mapped.items()
        }


class _Rows:
    """A tensor in a file, of which single rows are read.

    The file is opened for each: a cache may have more shards than a process may hold open.
    """

    def __init__(self, path: Path, offset: int, like: Tensor) -> None:
        self._path, self._offset, self._dtype, self._shape = path, offset, like.dtype, like.shape
        self._bytes = path.stat().st_size

    def __getitem__(self, index: int | tuple[int, ...]) -> Tensor:
        row, index = 0, index if isinstance(index, tuple) else (index,)
        for size, i in zip(self._shape, index):
            row = row * size + i
        shape = self._shape[len(index) :]
        content = bytearray(math.prod(shape) * self._dtype.itemsize)
        with self._path.open("rb", buffering=0) as file:
            unchanged = os.fstat(file.fileno()).st_size == self._bytes
            file.seek(self._offset + row * len(content))
            if not unchanged or file.readinto(content) < len(content):
                raise CacheError(f"{self._path} was cut short or changed while it was in use: make the cache again")
        return torch.frombuffer(content, dtype=self._dtype).view(shape)


def _float_copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True)


def _read_index(folder: Path) -> dict[str, Any]:
    if not is_finished(folder):
        if (folder / UNFINISHED).exists():
            raise CacheError(f"the cache {folder} is unfinished: repeat the command that makes it, which continues it")
        raise FileNotFoundError(f"there is no cache in {folder}: make it with scripts/cache_latents.py")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        found = (index["format"], index["version"])
    except (ValueError, KeyError, TypeError):
        raise CacheError(f"{folder / INDEX} is damaged: delete {folder} and make the cache again") from None
    if found != (FORMAT, VERSION):
        raise CacheError(f"{folder} is of another format ({found[0]} {found[1]}): delete it and make the cache again")
    return index


def _describe(dataset: Any) -> dict[str, Any]:
    """A data set's own `describe()`, or only its class and length."""
    named = {"class": f"{type(dataset).__module__}.{type(dataset).__qualname__}", "number": len(dataset)}
    return named | (dataset.describe() if hasattr(dataset, "describe") else {})


def _check_same_dataset(folder: Path, cached: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise CacheError if two descriptions of a data set differ in more than its path."""
    given = json.loads(json.dumps(given))
    differing = {key for key in cached.keys() | given.keys() if cached.get(key) != given.get(key)}
    if keys := sorted(differing - set(_NOT_COMPARED)):
        raise CacheError(
            f"the cache {folder} was made of another data set: {', '.join(keys)} differ ({keys[0]} was "
            f"{cached.get(keys[0])!r} and is {given.get(keys[0])!r}); delete the cache and make it again"
        )


def _check_shards(folder: Path, shards: Sequence[Mapping[str, Any]], verify: bool) -> None:
    """Raise CacheError if files are missing or differ in size, or, if `verify`, in their checksums."""
    for shard in shards:
        path = folder / shard["file"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            fault = "missing" if size is None else f"cut short or changed ({size} of {shard['bytes']} bytes)"
            raise _unusable(folder, shard, fault)
    if not verify:
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = pool.map(lambda shard: _sha256(folder / shard["file"]), shards)
        bar = tqdm(zip(shards, sums), desc=f"checking {folder.name}", total=len(shards), unit="shard", delay=5)
        for shard, found in bar:
            if found != shard["sha256"]:
                raise _unusable(folder, shard, "damaged (its checksum differs)")


def _unusable(folder: Path, shard: Mapping[str, Any], fault: str) -> CacheError:
    return CacheError(f"the cache {folder} cannot be used: {shard['file']} is {fault}; delete it and make it again")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------- building


def build_cache(
    model: nn.Module | Any,
    dataset: Any,
    folder: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    text: bool = False,
    variants: int = 1,
    flips: bool = False,
    dtype: str = "float32",
    num_workers: int = 0,
    seed: int = 0,
    shard_bytes: int = 256 * 2**20,
) -> Path:
    """Encode all images of a data set by a `LatentDiffusion`'s first stage into `folder`.

    Repeating the call continues a build that was stopped.

    Args:
        model: The `LatentDiffusion`.
        dataset: Map-style data set of images.
        folder: Folder of the cache.
        batch_size: Images to encode at once.
        device: Where to compute.
        text: Also embed the captions, one of each variant.
        variants: Number of the data set's own random crops, flips and captions to cache of every image.
        flips: Also cache each of them mirrored.
        dtype: "float32" or "float16".
        num_workers: Processes that read images.
        seed: Seed of the variants.
        shard_bytes: Approximate size of a file.

    Returns:
        The folder.

    Raises:
        FileExistsError: There is a finished cache.
        CacheError: The folder belongs to another cache, or to something else.
        ValueError: Options, data or model cannot be cached.
        OSError: The disk is full.
    """
    folder = Path(folder).expanduser()
    if not hasattr(model, "first_stage_model"):
        raise ValueError(f"{type(model).__name__} has no first stage, so there are no latents to cache")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if variants < 1:
        raise ValueError(f"variants must be at least 1, not {variants}")
    if is_finished(folder):
        raise FileExistsError(f"{folder} holds a finished cache: delete it first, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    items = _Variants(dataset, str(model.first_stage_key), variants, seed)
    with _locked(folder), _moved(model, device):
        if is_finished(folder):  # another process was quicker
            return folder
        encoder = _Encoder(model, torch.device(device), text, flips, DTYPES[dtype])
        plan = _plan(encoder, items, shard_bytes) | {"dtype": dtype, "seed": seed}
        shards = _finished_shards(folder, plan)
        _check_disk_space(folder, plan, sum(shard["items"] for shard in shards.values()))
        _write_shards(folder, plan, shards, encoder, items, batch_size, num_workers)
        os.replace(folder / UNFINISHED, folder / INDEX)
        sync_folder(folder)
    return folder


class _Variants(Dataset[Any]):
    """Random variants of all items: number n is variant n % variants of item n // variants."""

    def __init__(self, dataset: Any, image_key: str, variants: int, seed: int) -> None:
        self.dataset = dataset
        self.image_key = image_key
        self.variants = variants
        self.items = SeededItems(dataset, seed)  # a variant is that epoch's item

    def __len__(self) -> int:
        return len(self.dataset) * self.variants

    def __getitem__(self, n: int) -> tuple[np.ndarray, dict[str, str], dict[str, int], int]:
        """Image (H, W, 3), texts, labels, and the index of the image that the data set really used."""
        i, variant = divmod(n, self.variants)
        item = self.items[variant, i]
        if self.image_key not in item:
            raise ValueError(
                f"the data set has the entries {', '.join(item)}, but the model trains on {self.image_key!r}: set "
                "model.params.first_stage_key to the entry of the image"
            )
        texts = {key: value for key, value in item.items() if isinstance(value, str)}
        labels = {key: int(value) for key, value in item.items() if isinstance(value, (int, np.integer))}
        source = self.dataset.resolve(i) if hasattr(self.dataset, "resolve") else i
        return np.asarray(item[self.image_key], np.float32), texts, labels, source


def _collate(items: Sequence[tuple]) -> tuple[Tensor, list[dict[str, str]], list[dict[str, int]], list[int]]:
    images, texts, labels, sources = map(list, zip(*items))
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise ValueError(f"a cache needs images of one size, but there are {shapes[0]} and {shapes[1]}")
    return torch.from_numpy(np.stack(images)), texts, labels, sources


class _Encoder:
    """A model's encodings of images and captions, as CPU tensors of the cache's dtype."""

    def __init__(self, model: Any, device: torch.device, text: bool, flips: bool, dtype: torch.dtype) -> None:
        if text and (model.cond_stage_model is None or model.cond_stage_trainable):
            why = "has no text encoder" if model.cond_stage_model is None else "trains its text encoder"
            raise ValueError(f"text embeddings cannot be cached: the model {why}; leave text out")
        self.model = model
        self.device = device
        self.text = text
        self.flips = flips
        self.dtype = dtype

    @torch.no_grad()
    def images(self, images: Tensor) -> tuple[str, Tensor]:
        """Encode (B, H, W, 3) in [-1, 1] to "moments" or "latents" and (B, 1, or 2 with the mirrored one, C, h, w)."""
        x = images.to(self.device).movedim(-1, 1).contiguous()  # (B, 3, H, W)
        encoded = [self.model.encode_first_stage(x) for x in ((x, x.flip(-1)) if self.flips else (x,))]
        kind = "moments" if hasattr(encoded[0], "parameters") else "latents"
        latents = torch.stack([getattr(one, "parameters", one) for one in encoded], dim=1).to(self.dtype).cpu()
        if not latents.isfinite().all():
            raise ValueError(f"the first stage gives values that are not finite in {self.dtype}: check its weights")
        return kind, latents

    @torch.no_grad()
    def captions(self, texts: Sequence[Mapping[str, str]]) -> Tensor | None:
        """Embeddings (B, L, D) of the model's condition, None if they are not to be cached."""
        if not self.text:
            return None
        prompts = [text[self.model.cond_stage_key] for text in texts]
        return self.model.get_learned_conditioning(prompts).to(self.dtype).cpu()

    def check_condition(self, texts: Mapping[str, str], labels: Mapping[str, int]) -> None:
        """Raise ValueError if the model needs a condition that a cache does not hold."""
        key = self.model.cond_stage_key
        if self.model.model.conditioning_key is not None and key not in (texts if self.text else {**texts, **labels}):
            raise ValueError(
                f"the model is conditioned on {key!r}, which is not a {'text' if self.text else 'text or a label'} of "
                f"the data set (its texts and labels: {', '.join([*texts, *labels]) or 'none'}): configure its "
                "captions, or train from the data set itself"
            )


def _plan(encoder: _Encoder, items: _Variants, shard_bytes: int) -> dict[str, Any]:
    """The index without its shards; the first item is encoded for its shapes."""
    image, texts, labels, _ = items[0]
    encoder.check_condition(texts, labels)
    kind, latents = encoder.images(torch.from_numpy(image)[None])
    context = encoder.captions([texts])
    size = items.variants * (latents.nbytes + (0 if context is None else context.nbytes))  # bytes of an item
    model = encoder.model
    return {
        "format": FORMAT,
        "version": VERSION,
        "items": len(items.dataset),
        "variants": items.variants,
        "flips": encoder.flips,
        "kind": kind,
        "shape": list(latents.shape[2:]),
        "context": None if context is None else list(context.shape[1:]),
        "texts": sorted(texts),
        "labels": sorted(labels),
        "bytes_per_item": size,
        "items_per_shard": max(1, shard_bytes // size),
        "first_stage": fingerprint(model.first_stage_model, NOT_ENCODING),
        "text_encoder": None if context is None else fingerprint(model.cond_stage_model),
        "dataset": _describe(items.dataset),
    }


def _finished_shards(folder: Path, plan: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The complete shards, by number, of an earlier build of the same plan.

    Raises CacheError if the folder holds an unfinished cache of another plan, or something else.
    """
    if not (folder / UNFINISHED).exists():
        if any(not name.startswith(".") for name in os.listdir(folder)):
            raise CacheError(f"{folder} is not empty and holds no cache: choose another folder")
        _write_progress(folder, plan, {})
        return {}
    earlier = json.loads((folder / UNFINISHED).read_text(encoding="utf-8"))
    shards = earlier.pop("shards")
    differing = [key for key, value in json.loads(json.dumps(plan)).items() if earlier.get(key) != value]
    if differing:
        raise CacheError(
            f"{folder} holds an unfinished cache with other settings ({', '.join(differing)}): delete it, or choose "
            "another folder"
        )
    return {int(Path(shard["file"]).stem.partition("-")[2]): shard for shard in shards if _is_complete(folder, shard)}


def _is_complete(folder: Path, shard: Mapping[str, Any]) -> bool:
    path = folder / shard["file"]
    return path.exists() and path.stat().st_size == shard["bytes"] and _sha256(path) == shard["sha256"]


def _check_disk_space(folder: Path, plan: Mapping[str, Any], finished: int) -> None:
    """Log the size of the cache; raise OSError if the disk has no room for it."""
    needed, free = (plan["items"] - finished) * plan["bytes_per_item"], shutil.disk_usage(folder).free
    logger.info("%s: %.3g GB for %d images", folder, plan["items"] * plan["bytes_per_item"] / 1e9, plan["items"])
    if needed > free:
        sizes = f"the cache needs {needed / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free"
        raise OSError(errno.ENOSPC, f"{sizes}: choose another disk, dtype float16 or fewer variants", str(folder))


def _write_shards(
    folder: Path,
    plan: Mapping[str, Any],
    shards: dict[int, dict[str, Any]],
    encoder: _Encoder,
    items: _Variants,
    batch_size: int,
    num_workers: int,
) -> None:
    """Write the shards that are not in `shards` yet."""
    total, each = plan["items"], plan["items_per_shard"]
    done = sum(shard["items"] for shard in shards.values())
    with tqdm(total=total, initial=done, desc=f"caching {folder.name}", unit="image") as bar:
        for number, start in enumerate(range(0, total, each)):
            if number in shards:
                continue
            stop = min(start + each, total)
            # a generator of its own: the global random state stays as it is
            generator = torch.Generator().manual_seed(0)
            loader: DataLoader[Any] = DataLoader(
                Subset(items, range(start * items.variants, stop * items.variants)),
                batch_size,
                num_workers=num_workers,
                collate_fn=_collate,
                generator=generator,
            )
            tensors, texts = _encode(loader, encoder, plan, bar)
            shards[number] = _write_shard(folder, number, tensors, texts) | {"items": stop - start}
            _write_progress(folder, plan, shards)


def _encode(
    loader: DataLoader, encoder: _Encoder, plan: Mapping[str, Any], bar: tqdm
) -> tuple[dict[str, Tensor], dict[str, list[list[str]]]]:
    """Tensors and texts of a shard: latents (n, variants, C, h, w), context (n, variants, L, D), labels (n)."""
    latents, contexts, texts, labels, sources = [], [], [], [], []
    for images, batch_texts, batch_labels, batch_sources in loader:
        latents.append(encoder.images(images)[1])
        if (context := encoder.captions(batch_texts)) is not None:
            contexts.append(context)
        texts += batch_texts
        labels += batch_labels
        sources += batch_sources
        bar.update(len(images) / plan["variants"])
    variants = plan["variants"]
    tensors = {plan["kind"]: torch.cat(latents).reshape(-1, variants * (1 + plan["flips"]), *plan["shape"])}
    if plan["context"]:
        tensors["context"] = torch.cat(contexts).reshape(-1, variants, *plan["context"])
    tensors |= {key: torch.tensor([one[key] for one in labels[::variants]]) for key in plan["labels"]}
    tensors["source"] = torch.tensor(sources[::variants])
    grouped = [texts[i : i + variants] for i in range(0, len(texts), variants)]
    return tensors, {key: [[one[key] for one in group] for group in grouped] for key in plan["texts"]}


def _write_shard(
    folder: Path, number: int, tensors: Mapping[str, Tensor], texts: Mapping[str, list[list[str]]]
) -> dict[str, Any]:
    """Write a shard, its texts in the header, and return its entry of the index."""
    data = save(dict(tensors), {"texts": json.dumps(texts, ensure_ascii=False)})
    name = f"shard-{number:05}.safetensors"
    _write(folder / name, data)
    return {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_progress(folder: Path, plan: Mapping[str, Any], shards: Mapping[int, Mapping[str, Any]]) -> None:
    finished = [shards[number] for number in sorted(shards)]
    _write(folder / UNFINISHED, json.dumps({**plan, "shards": finished}, indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    """Write a file atomically. OSError has its path."""
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def _moved(model: Any, device: str | torch.device) -> Iterator[None]:
    """Move the encoders to `device`, and back afterwards."""
    parts = [part for part in (model.first_stage_model, model.cond_stage_model) if part is not None]
    devices = [next((p.device for p in part.parameters()), torch.device("cpu")) for part in parts]
    try:
        for part in parts:
            part.to(device)
        yield
    finally:
        for part, before in zip(parts, devices):
            part.to(before)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Exclude other processes of this machine, which wait; without effect where there is no `fcntl` (Windows)."""
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -------------------------------------------------------------------------------------------------------- from configs


def ensure_caches(model: nn.Module, data_section: Any, device: str | torch.device = "cpu") -> None:
    """Build the unfinished caches of a config's data section that have `make_if_missing`.

    make_if_missing is true, or a mapping of options of `build_cache`. Of several processes on a machine one builds and
    the others wait.
    """
    for params in _caches_to_make(data_section):
        if is_finished(Path(params["folder"]).expanduser()):
            continue
        if not params.get("dataset"):
            raise ValueError(f"the cache {params['folder']} cannot be made: its section has no `dataset`")
        options = params["make_if_missing"] if isinstance(params["make_if_missing"], Mapping) else {}
        known = set(inspect.signature(build_cache).parameters) - {"model", "dataset", "folder", "device"}
        if unknown := sorted(set(options) - known):
            raise ValueError(
                f"make_if_missing of the cache {params['folder']} has an unknown option {unknown[0]!r}: "
                f"there are {', '.join(sorted(known))}"
            )
        logger.info("making the cache %s, which does not exist", params["folder"])
        build_cache(model, instantiate_from_config(params["dataset"]), params["folder"], device=device, **options)


def _caches_to_make(section: Any) -> Iterator[Mapping[str, Any]]:
    """The params of all sections of `CachedDataset` with `make_if_missing`, at any depth."""
    if isinstance(section, Mapping):
        params = section.get("params")
        makes = section.get("target") and isinstance(params, Mapping) and params.get("make_if_missing")
        if makes and params is not None and get_obj_from_str(section["target"]) is CachedDataset:
            yield params
            return
        for value in section.values():
            yield from _caches_to_make(value)
    elif isinstance(section, Sequence) and not isinstance(section, str):
        for value in section:
            yield from _caches_to_make(value)
