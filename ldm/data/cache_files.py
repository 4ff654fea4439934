"""The files of a cache: shards, their checksums, the index, and what lies there while a cache is being made.

A cache is a folder of `shard-00000.safetensors` ... and `index.json`, which holds the sha256 of every shard, the
fingerprints of the models that made it and what the data set was. Until all is done there is `unfinished.json`
instead. Every file appears under its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from ldm.files import atomic_write, sync_folder

FORMAT = "ldm-latent-cache"
VERSION = 1
INDEX = "index.json"
UNFINISHED = "unfinished.json"
_LOCK = ".lock"
_NOT_COMPARED = ("root",)  # a data set may move


class CacheError(ValueError):
    """A cache that cannot be used; the message is one sentence that says what to do."""


def is_finished(folder: Path) -> bool:
    """Whether there is a whole cache in `folder`."""
    return (folder / INDEX).exists()


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a finished cache."""
    if not is_finished(folder):
        if (folder / UNFINISHED).exists():
            raise CacheError(f"the cache {folder} is unfinished: repeat the command that makes it, and it goes on")
        raise FileNotFoundError(f"there is no cache in {folder}: make it with scripts/cache_latents.py")
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        found = (index["format"], index["version"])
    except (ValueError, KeyError, TypeError):
        raise CacheError(f"{folder / INDEX} is damaged: delete {folder} and make the cache again") from None
    if found != (FORMAT, VERSION):
        raise CacheError(f"{folder} is of another format ({found[0]} {found[1]}): delete it and make the cache again")
    return index


def check_same_dataset(folder: Path, cached: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise CacheError if two descriptions of a data set differ in more than its place."""
    given = json.loads(json.dumps(given))
    unlike = [key for key in cached.keys() | given.keys() if cached.get(key) != given.get(key)]
    unlike = sorted(set(unlike) - set(_NOT_COMPARED))
    if unlike:
        key = unlike[0]
        raise CacheError(
            f"the cache {folder} was made of another data set: {', '.join(unlike)} differ "
            f"({key} was {cached.get(key)!r} and is {given.get(key)!r}); delete the cache and make it again"
        )


def check_shards(folder: Path, shards: Sequence[Mapping[str, Any]], verify: bool) -> None:
    """That the files are there and whole, by their sizes, and by their checksums if `verify`. Raises CacheError."""
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


def describe(dataset: Any) -> dict[str, Any]:
    """What a data set says of itself by its `describe()`, or only its class and length."""
    named = {"class": f"{type(dataset).__module__}.{type(dataset).__qualname__}", "number": len(dataset)}
    return named | (dataset.describe() if hasattr(dataset, "describe") else {})


# -------------------------------------------------------------------------------------------------------------- writing


def write_shard(
    folder: Path, number: int, tensors: Mapping[str, Tensor], texts: Mapping[str, list[list[str]]]
) -> dict[str, Any]:
    """Write a shard, its texts in the header, and return its entry for the index."""
    data = save(dict(tensors), {"texts": json.dumps(texts, ensure_ascii=False)})
    name = f"shard-{number:05}.safetensors"
    _write_whole(folder / name, data)
    return {"file": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def note_shard(folder: Path, plan: Mapping[str, Any], shards: Mapping[int, Mapping[str, Any]]) -> None:
    """Write down which shards are done."""
    listed = [shards[number] for number in sorted(shards)]
    _write_whole(folder / UNFINISHED, json.dumps({**plan, "shards": listed}, indent=1).encode())


def resume(folder: Path, plan: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The shards, by their numbers, that an earlier build of the same plan left whole.

    Raises CacheError if the folder holds an unfinished cache of another plan, or something else.
    """
    if not (folder / UNFINISHED).exists():
        if any(not name.startswith(".") for name in os.listdir(folder)):
            raise CacheError(f"{folder} is not empty and holds no cache: choose another folder")
        note_shard(folder, plan, {})
        return {}
    earlier = json.loads((folder / UNFINISHED).read_text(encoding="utf-8"))
    shards = earlier.pop("shards")
    unlike = [key for key, value in json.loads(json.dumps(plan)).items() if earlier.get(key) != value]
    if unlike:
        raise CacheError(
            f"{folder} holds an unfinished cache with other settings ({', '.join(unlike)}): "
            "delete it, or choose another folder"
        )
    whole = [shard for shard in shards if _is_whole(folder, shard)]
    return {int(Path(shard["file"]).stem.partition("-")[2]): shard for shard in whole}


def finish(folder: Path) -> None:
    """Make an unfinished cache whose shards are all there a finished one."""
    os.replace(folder / UNFINISHED, folder / INDEX)
    sync_folder(folder)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within it no other process of this machine is within it for the same folder; they wait. The system ends it
    with the process, however that ends. Where there are no such locks (Windows), nobody waits.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    with (folder / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_whole(folder: Path, shard: Mapping[str, Any]) -> bool:
    path = folder / shard["file"]
    return path.exists() and path.stat().st_size == shard["bytes"] and _sha256(path) == shard["sha256"]


def _write_whole(path: Path, data: bytes) -> None:
    """Write a file that is whole or not there. OSError names the path."""
    try:
        with atomic_write(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
