"""Latents and text embeddings computed once: `build_cache` writes them, `CachedDataset` reads them as a data set.

For every picture a cache holds the first stage's answer before `scale_factor`, in one or several variants: `moments`,
the mean and log variance of a KL posterior, so that training still samples, or `latents` where there is no posterior.
The layout of the files is in `ldm.data.cache_files`.
"""

from __future__ import annotations

import bisect
import inspect
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ldm.checkpoint import fingerprint
from ldm.checkpoint.formats.storages import may_map, note_mapped
from ldm.data.cache_building import NOT_ENCODING, build_cache
from ldm.data.cache_files import CacheError, check_same_dataset, check_shards, describe, is_finished, read_index
from ldm.util import get_obj_from_str, instantiate_from_config

__all__ = ["CacheError", "CachedDataset", "build_cache", "ensure_caches", "is_finished"]

logger = logging.getLogger(__name__)


class CachedDataset:
    """The items of a finished cache: `moments` or `latents` (float32), captions and labels, and `context` if cached.

    folder: as `build_cache` wrote it. dataset: the data set that it was made of, or its config; captions then come
    anew from its `caption(i, rng)`, unless the cache holds their embeddings. verify: compare the shards with their
    checksums, which reads all of them. make_if_missing: for `ensure_caches`, which builds what is not there.

    Raises FileNotFoundError if there is no cache, CacheError if it is unfinished, damaged or of another data set.
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
        self.index = read_index(self.folder)
        self.dataset = instantiate_from_config(dataset) if isinstance(dataset, Mapping) else dataset
        if self.dataset is not None:
            check_same_dataset(self.folder, self.index["dataset"], describe(self.dataset))
        check_shards(self.folder, self.index["shards"], verify)
        self._starts = np.cumsum([0, *(shard["items"] for shard in self.index["shards"])]).tolist()
        self._shards: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return self.index["items"]

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.get(i, np.random.default_rng((self.seed, i)))

    def get(self, i: int, rng: np.random.Generator) -> dict[str, Any]:
        """Item `i`; its variant, and its caption if that is not stored, chosen by `rng`."""
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
        """Raise CacheError unless this `LatentDiffusion` would have made the same cache."""
        if not hasattr(model, "first_stage_model"):
            raise CacheError(
                f"the cache {self.folder} holds latents, and {type(model).__name__} learns from pictures: "
                "give it the data set itself"
            )
        if fingerprint(model.first_stage_model, NOT_ENCODING) != self.index["first_stage"]:
            raise CacheError(
                f"the cache {self.folder} was made by another first stage than this model's: "
                "delete it and make it again, or load the first stage that it was made with"
            )
        if not self.index["context"]:
            return
        if model.cond_stage_trainable:
            raise CacheError(
                f"the cache {self.folder} holds text embeddings, and this model trains its text encoder: "
                "make a cache without text, or set cond_stage_trainable: false"
            )
        if fingerprint(model.cond_stage_model) != self.index["text_encoder"] or not self._same_context(model):
            raise CacheError(
                f"the text embeddings in the cache {self.folder} were made by another text encoder than this model's: "
                "delete the cache and make it again"
            )

    @torch.no_grad()
    def _same_context(self, model: Any) -> bool:
        """Whether the model embeds the first caption as the cache does: its layer or its tokens may have changed."""
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
            header = json.loads(stream.read(length))  # of which the library has made sure
        self.tensors = {
            key: _Rows(path, 8 + length + header[key]["data_offsets"][0], like) for key, like in mapped.items()
        }


class _Rows:
    """A tensor in a file, of which rows are read when they are asked for.

    The file is only open meanwhile: a cache has more of them than a process may hold open.
    """

    def __init__(self, path: Path, start: int, like: Tensor) -> None:
        self._path, self._start, self._dtype, self._shape = path, start, like.dtype, like.shape
        self._bytes = path.stat().st_size

    def __getitem__(self, index: int | tuple[int, ...]) -> Tensor:
        place, index = 0, index if isinstance(index, tuple) else (index,)
        for size, i in zip(self._shape, index):
            place = place * size + i
        left = self._shape[len(index) :]
        content = bytearray(math.prod(left) * self._dtype.itemsize)
        with self._path.open("rb", buffering=0) as file:
            same = os.fstat(file.fileno()).st_size == self._bytes
            file.seek(self._start + place * len(content))
            if not same or file.readinto(content) < len(content):
                raise CacheError(f"{self._path} was cut short or changed while it was in use: make the cache again")
        return torch.frombuffer(content, dtype=self._dtype).view(left)


def _float_copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True)


def ensure_caches(model: nn.Module, data_section: Any, device: str | torch.device = "cpu") -> None:
    """Build every cache that a config's data section wants by `make_if_missing` and that is not finished yet.

    make_if_missing: true, or a mapping of options of `build_cache`. Of several processes on a machine one builds and
    the others wait for it.
    """
    for params in _wanted(data_section):
        if is_finished(Path(params["folder"]).expanduser()):
            continue
        if not params.get("dataset"):
            raise ValueError(f"the cache {params['folder']} cannot be made: its section has no `dataset` to make it of")
        options = params["make_if_missing"] if isinstance(params["make_if_missing"], Mapping) else {}
        known = set(inspect.signature(build_cache).parameters) - {"model", "dataset", "folder", "device"}
        if strange := sorted(set(options) - known):
            raise ValueError(
                f"make_if_missing of the cache {params['folder']} has an unknown option {strange[0]!r}: "
                f"there are {', '.join(sorted(known))}"
            )
        logger.info("making the cache %s, which is not there", params["folder"])
        build_cache(model, instantiate_from_config(params["dataset"]), params["folder"], device=device, **options)


def _wanted(section: Any) -> Iterator[Mapping[str, Any]]:
    """The params of all sections of `CachedDataset` with `make_if_missing`, at any depth."""
    if isinstance(section, Mapping):
        params = section.get("params")
        makes = section.get("target") and isinstance(params, Mapping) and params.get("make_if_missing")
        if makes and params is not None and get_obj_from_str(section["target"]) is CachedDataset:
            yield params
            return
        for value in section.values():
            yield from _wanted(value)
    elif isinstance(section, Sequence) and not isinstance(section, str):
        for value in section:
            yield from _wanted(value)
