"""What a config may ask for: refused in one sentence is what would fill the memory before it could fail.

A short text can say a long one, by YAML's aliases and by references, and one number can say a network that no machine
holds. `ldm.trust` is about what a config may call.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_FILE = 16 * 2**20  # bytes of a config
MAX_ENTRIES = 200_000  # of a config with all that it refers to; the largest public one has 200
MAX_TEXT = 100_000  # letters of one value
MAX_MODULES = 50_000  # of a network; the largest public one has 6,000

# Where references begin and end; after an odd number of backslashes it is mere text.
_TOKEN = re.compile(r"(?<!\\)(\\*)\$\{|\}")


def check_yaml(path: Path) -> None:
    """ValueError for a YAML file that is too large, or becomes so when its aliases are written out."""
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"config {path} is no config: it has {path.stat().st_size} bytes")
    text = path.read_bytes()
    if b"&" not in text:  # nothing that an alias could stand for
        return
    import yaml

    sizes, anchors = [0], [""]  # of what is open: entries so far, and the name that aliases call it by
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


def check_growth(config: Any, place: Any) -> None:
    """ValueError if a config, plain values with `${...}` in them, becomes too long when what it refers to is put in.

    What it refers to by other means (see `ldm.trust`) counts as nothing. place: the file, for the message.
    """
    try:
        _Growth(config).size((), config)
    except _TooLong as error:
        raise ValueError(f"config {place} is refused: {error}") from None
    except RecursionError:
        raise ValueError(f"config {place} is refused: it has too many references in a row") from None


class _TooLong(Exception):
    pass


_Found = tuple[tuple[Any, ...], Any] | None


class _Growth:
    """How large the values of a config are, each gone through once."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._texts: dict[tuple[Any, ...], str] = {}
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._open: set[tuple[Any, ...]] = set()
        self._followed: dict[tuple[Any, ...], _Found] = {}
        self._following: set[tuple[Any, ...]] = set()

    def size(self, path: tuple[Any, ...], value: Any) -> int:
        """Entries of a value with all that it refers to."""
        if path in self._sizes:
            return self._sizes[path]
        if path in self._open:
            raise _TooLong(f"{_shown(path)} refers to itself")
        self._open.add(path)
        if isinstance(value, str):
            size = 1 + self._text(path, value)[1]
        else:
            size = 1 + sum(self.size((*path, key), entry) for key, entry in _entries(value))
        if size > MAX_ENTRIES:
            raise _TooLong(f"{_shown(path)} becomes too long by what it refers to")
        self._open.remove(path)
        self._sizes[path] = size
        return size

    def _text(self, path: tuple[Any, ...], text: str) -> tuple[str, int]:
        """A text with what it refers to put in, and the entries of what is more than text."""
        if path in self._texts:
            return self._texts[path], 0
        text, more = self._put(path, text)
        self._texts[path] = text
        return text, more

    def _put(self, path: tuple[Any, ...], text: str, *, name: bool = False) -> tuple[str, int]:
        """As `_text`. name: only what the reference calls it that is the whole text, with what that refers to put in.

        What was put in is not gone through again, as references in it are mere text.
        """
        made: list[list[str]] = [[]]  # the pieces of what is open, the outermost first
        end, more, length = 0, 0, len(text)
        for found in _TOKEN.finditer(text):
            made[-1].append(text[end : found.start()])
            end, slashes = found.end(), found[1]
            if slashes is not None:
                made[-1].append("\\" * (len(slashes) // 2) + ("${" if len(slashes) % 2 else ""))
                if len(slashes) % 2 == 0:
                    made.append([])
            elif len(made) == 1:
                made[-1].append("}")
            else:
                inner = "".join(made.pop())
                if name and len(made) == 1:
                    return inner if text.startswith("${") and end == len(text) else "", more
                put, size = self._target(path, inner)
                made[-1].append(put)
                more, length = more + size, length + len(put)
                if length > max(MAX_TEXT, len(text)) or more > MAX_ENTRIES:
                    raise _TooLong(f"{_shown(path)} becomes too long by what it refers to")
        return "" if name else "${".join(map("".join, made)) + text[end:], more

    def _target(self, path: tuple[Any, ...], name: str) -> tuple[str, int]:
        """What a reference stands for: a text, or so many entries."""
        found = self._find(path, name)
        if found is None:
            return "", 0  # nothing, as will be said when it is needed
        place, value = found
        size = self.size(place, value)
        if isinstance(value, str):
            return self._text(place, value)[0], size
        return ("", size) if isinstance(value, (dict, list)) else (str(value)[:MAX_TEXT], 0)

    def _find(self, path: tuple[Any, ...], name: str) -> _Found:
        """The place in the config that a reference at `path` names, and what is there."""
        name = name.strip(" \t")
        up = len(name) - len(name.lstrip("."))
        place: tuple[Any, ...] = ()
        value = self._config
        if ":" in name or not name.strip("."):
            return None
        for part in (*(path[:-up] if up else ()), *re.findall(r"[^.\[\] \t]+", name)):
            if isinstance(value, str):
                followed = self._follow(place, value)
                if followed is None:
                    return None
                place, value = followed
            key = _key(value, part)
            if key is None:
                return None
            place, value = (*place, key), value[key]
        return place, value

    def _follow(self, place: tuple[Any, ...], text: str) -> _Found:
        """What a text stands for that is nothing but a reference, or one to such a text; None for any other."""
        if place in self._followed:
            return self._followed[place]
        if place in self._following:
            raise _TooLong(f"{_shown(place)} refers to itself")
        self._following.add(place)
        name = self._put(place, text, name=True)[0]
        found = self._find(place, name)
        if found is None and name and ":" not in name:  # better than to count as nothing what is looked for elsewhere
            raise _TooLong(f"{_shown(place)} refers to what the config does not hold, and others go through it")
        if found is not None and isinstance(found[1], str):
            found = self._follow(*found)
        self._following.remove(place)
        self._followed[place] = found
        return found


def _entries(value: Any) -> Any:
    if isinstance(value, dict):
        return value.items()
    return enumerate(value) if isinstance(value, list) else ()


def _key(value: Any, part: Any) -> Any:
    """The key by which a dictionary or a list holds what a reference calls `part`; None if it holds no such thing."""
    try:
        number = int(str(part))  # so OmegaConf takes it, be it `+1` or `1_0`
    except ValueError:
        number = -1
    if isinstance(value, dict):
        return next((key for key in (part, number) if key in value), None)
    return number if isinstance(value, list) and 0 <= number < len(value) else None


def _shown(path: tuple[Any, ...]) -> str:
    return ascii(".".join(map(str, path)))[1:-1][:100]


def check_number(number: int, name: str, most: int = MAX_MODULES) -> int:
    """`number`, of something that a list is made of before anything is built; ValueError if there are too many."""
    if number > most:
        raise ValueError(f"{name} is {number}, and at most {most}")
    return number


@contextlib.contextmanager
def building() -> Iterator[None]:
    """While a model is built, ValueError as soon as it has more parts, or larger ones, than a machine can hold.

    What has no memory (the meta device) may be of any size, and so may what is not in the memory of the CPU. What
    several parts share counts once, and what was given up, as on assigning other weights, no longer.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.nn.modules import module as hooks

    parts = size = 0
    room = _memory()
    held: dict[tuple[int, int], StorageWeakRef] = {}  # by address and bytes, what `size` is of

    def count(_: nn.Module, name: str, part: Any) -> None:
        nonlocal parts
        parts += 1
        if parts > MAX_MODULES:
            raise ValueError(f"the config describes a network of more than {MAX_MODULES} parts: make it smaller")

    def weigh(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal size
        if tensor is None or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return
        try:
            storage = tensor.untyped_storage()
            key = (storage.data_ptr(), storage.nbytes())
        except (RuntimeError, ValueError):  # of a class of its own, that has no memory yet or shows none
            return
        known = held.get(key)
        held[key] = StorageWeakRef(storage) if known is None or known.expired() else known
        size += key[1] if known is None else 0
        if size > room:
            for gone in [key for key, ref in held.items() if ref.expired()]:
                del held[gone]
            size = sum(nbytes for _, nbytes in held)
        if size > room:
            raise ValueError(
                f"the config describes a network that takes more than the {room / 2**30:.3g} GiB of memory there are "
                f"({name} alone is {'x'.join(map(str, tensor.shape))}): make it smaller"
            )

    handles = [
        hooks.register_module_module_registration_hook(count),
        hooks.register_module_parameter_registration_hook(weigh),
        hooks.register_module_buffer_registration_hook(weigh),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _memory() -> float:
    """Bytes of memory that this machine has, where it says so."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")
