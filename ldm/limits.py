"""Limits on what a config may ask for, so that it is refused before it fills the memory.

A short text can describe a long one, by YAML aliases and by references, and one number a network that no machine holds.
What a config may call is the subject of `ldm.trust`.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_FILE = 16 * 2**20  # bytes of a config
MAX_ENTRIES = 200_000  # of a config with its references resolved; the largest public one has 200
MAX_TEXT = 100_000  # characters of one value
MAX_MODULES = 50_000  # of a network; the largest public one has 6,000

# Where references begin and end; after an odd number of backslashes "${" is literal.
_TOKEN = re.compile(r"(?<!\\)(\\*)\$\{|\}")
_SELF = "refers to itself"
_GROWS = "becomes too long with its references resolved"

Keys = tuple[Any, ...]  # keys from the top of a config down to a value


def check_yaml(path: Path) -> None:
    """Raise ValueError for a YAML file that is too large, or becomes so when its aliases are expanded."""
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"config {path} is too large: {path.stat().st_size} bytes, at most {MAX_FILE}")
    text = path.read_bytes()
    if b"&" not in text:  # no anchors, so no aliases
        return
    import yaml

    sizes, anchors = [0], [""]  # of the open collections
    named: dict[str, int] = {}
    for event in yaml.parse(text):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            sizes.append(1)
            anchors.append(event.anchor or "")
            continue
        if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            size, anchor = sizes.pop(), anchors.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size, anchor = 1 + len(event.value) // 100, event.anchor or ""
        elif isinstance(event, yaml.AliasEvent):
            size, anchor = named.get(event.anchor, 1), ""
        else:
            continue
        if anchor:
            named[anchor] = size
        sizes[-1] += size
        if sizes[-1] > MAX_ENTRIES:
            raise ValueError(f"config {path} is refused: its aliases make it too long")


def check_growth(config: Any, name: Any) -> None:
    """Raise ValueError if a config becomes too long with its references resolved.

    Resolvers (see `ldm.trust`) count as nothing.

    Args:
        config: plain values with `${...}` in them.
        name: the file, for the message.
    """
    try:
        _Growth(config).size((), config)
    except _TooLong as error:
        raise ValueError(f"config {name} is refused: {error}") from None
    except RecursionError:
        raise ValueError(f"config {name} is refused: its references are nested too deep") from None


class _TooLong(Exception):
    def __init__(self, path: Keys, reason: str) -> None:
        super().__init__(f"{ascii('.'.join(map(str, path)))[1:-1][:100]} {reason}")


class _Growth:
    """The sizes of a config's values with references resolved, each computed once."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._sizes: dict[Keys, int] = {}
        self._texts: dict[Keys, str] = {}
        self._targets: dict[Keys, tuple[Keys, Any] | None] = {}
        self._open: set[tuple[str, Keys]] = set()  # in progress, to find cycles

    @contextlib.contextmanager
    def _visiting(self, kind: str, path: Keys) -> Iterator[None]:
        if (kind, path) in self._open:
            raise _TooLong(path, _SELF)
        self._open.add((kind, path))
        yield
        self._open.remove((kind, path))

    def size(self, path: Keys, value: Any) -> int:
        """Return the number of entries of a value with everything it refers to."""
        if path not in self._sizes:
            with self._visiting("size", path):
                if isinstance(value, str):
                    size = 1 + self._expand(path, value)[1]
                else:
                    size = 1 + sum(self.size((*path, key), entry) for key, entry in _entries(value))
            if size > MAX_ENTRIES:
                raise _TooLong(path, _GROWS)
            self._sizes[path] = size
        return self._sizes[path]

    def _expand(self, path: Keys, text: str) -> tuple[str, int]:
        """Return a text with its references replaced, and the number of entries that are not text."""
        if path in self._texts:
            return self._texts[path], 0
        self._texts[path], entries = self._replace(path, text)
        return self._texts[path], entries

    def _replace(self, path: Keys, text: str, *, only_name: bool = False) -> tuple[str, int]:
        """Replace the references of a text, inner ones first; replacements are not searched again.

        only_name: return what the one reference that is the whole text names, or "" for any other text.
        """
        pieces: list[list[str]] = [[]]  # of the open references, the outermost first
        end, entries, length = 0, 0, len(text)
        for token in _TOKEN.finditer(text):
            pieces[-1].append(text[end : token.start()])
            end, slashes = token.end(), token[1]
            if slashes is not None:
                pieces[-1].append("\\" * (len(slashes) // 2) + ("${" if len(slashes) % 2 else ""))
                if len(slashes) % 2 == 0:
                    pieces.append([])
            elif len(pieces) == 1:
                pieces[-1].append("}")
            else:
                name = "".join(pieces.pop())
                if only_name and len(pieces) == 1:
                    return name if text.startswith("${") and end == len(text) else "", entries
                value, size = self._value(path, name)
                pieces[-1].append(value)
                entries, length = entries + size, length + len(value)
                if length > max(MAX_TEXT, len(text)) or entries > MAX_ENTRIES:
                    raise _TooLong(path, _GROWS)
        return "" if only_name else "${".join(map("".join, pieces)) + text[end:], entries

    def _value(self, path: Keys, name: str) -> tuple[str, int]:
        """Return what a reference stands for: a text, or a number of entries."""
        found = self._find(path, name)
        if found is None:
            return "", 0  # OmegaConf reports it when the value is needed
        place, value = found
        size = self.size(place, value)
        if isinstance(value, str):
            return self._expand(place, value)[0], size
        return ("", size) if isinstance(value, (dict, list)) else (str(value)[:MAX_TEXT], 0)

    def _find(self, path: Keys, name: str) -> tuple[Keys, Any] | None:
        """Return the place and value that a reference at `path` names."""
        name = name.strip(" \t")
        up = len(name) - len(name.lstrip("."))
        if ":" in name or not name.strip("."):
            return None
        found: tuple[Keys, Any] | None = ((), self._config)
        for part in (*(path[:-up] if up else ()), *re.findall(r"[^.\[\] \t]+", name)):
            if found and isinstance(found[1], str):
                found = self._follow(*found)
            key = _key(found[1], part) if found else None
            if found is None or key is None:
                return None
            found = (*found[0], key), found[1][key]
        return found

    def _follow(self, place: Keys, text: str) -> tuple[Keys, Any] | None:
        """Return what a text that is one reference leads to, through other such texts; None for any other text."""
        if place not in self._targets:
            with self._visiting("target", place):
                name = self._replace(place, text, only_name=True)[0]
                found = self._find(place, name)
                if found is None and name and ":" not in name:  # its size cannot be known
                    raise _TooLong(place, "refers to what the config does not hold, and other references go through it")
                if found is not None and isinstance(found[1], str):
                    found = self._follow(*found)
            self._targets[place] = found
        return self._targets[place]


def _entries(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def _key(value: Any, part: Any) -> Any:
    """Return the key under which a dictionary or list holds the `part` of a reference, or None."""
    try:
        number = int(str(part))  # as OmegaConf reads it, `+1` and `1_0` included
    except ValueError:
        number = -1
    if isinstance(value, dict):
        return next((key for key in (part, number) if key in value), None)
    return number if isinstance(value, list) and 0 <= number < len(value) else None


def check_number(number: int, name: str, most: int = MAX_MODULES) -> int:
    """Return `number`, the length of a list to build. Raises ValueError if it exceeds `most`."""
    if number > most:
        raise ValueError(f"{name} is {number}, and at most {most}")
    return number


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Limit the modules and the memory of models that are built inside the block.

    Tensors on the meta device and outside the CPU's memory do not count; shared storages count once, and those that
    were given up (by assigning other weights) no longer.

    Raises:
        ValueError: as soon as a model has too many modules or needs more memory than there is.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.nn.modules import module as hooks

    modules = size = 0
    limit = total_memory()
    storages: dict[tuple[int, int], StorageWeakRef] = {}  # counted in `size`, by address and bytes

    def count_module(_: nn.Module, name: str, module: Any) -> None:
        nonlocal modules
        modules += 1
        if modules > MAX_MODULES:
            raise ValueError(f"the config describes a network of more than {MAX_MODULES} modules: make it smaller")

    def count_memory(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal size
        if tensor is None or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return
        try:
            storage = tensor.untyped_storage()
            key = (storage.data_ptr(), storage.nbytes())
        except (RuntimeError, ValueError):  # lazy parameters and tensor subclasses without a storage
            return
        known = storages.get(key)
        storages[key] = StorageWeakRef(storage) if known is None or known.expired() else known
        size += key[1] if known is None else 0
        if size > limit:
            for freed in [key for key, ref in storages.items() if ref.expired()]:
                del storages[freed]
            size = sum(nbytes for _, nbytes in storages)
        if size > limit:
            raise ValueError(
                f"the config describes a network that needs more than the {limit / 2**30:.3g} GiB of memory here "
                f"({name} alone is {'x'.join(map(str, tensor.shape))}): make it smaller"
            )

    handles = [
        hooks.register_module_module_registration_hook(count_module),
        hooks.register_module_parameter_registration_hook(count_memory),
        hooks.register_module_buffer_registration_hook(count_memory),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def total_memory(root: Path = Path("/")) -> float:
    """Return the bytes of memory of this machine, or of its container (control group) if that has fewer.

    Infinity where the system does not tell. `root` is where /proc and /sys are.
    """
    sizes: list[float] = [float("inf")]
    with contextlib.suppress(AttributeError, ValueError, OSError):
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    groups: list[str] = []
    with contextlib.suppress(OSError):
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    for _, controllers, path in (line.split(":", 2) for line in groups if line.count(":") >= 2):
        if controllers == "":  # version 2
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        place = mount / path.lstrip("/")  # inside a container only `mount` may exist
        for folder in (place, *place.parents):
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                sizes.append(int((folder / name).read_text()))
    return min(sizes)
