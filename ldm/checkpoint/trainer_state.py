"""The state of a training run, read back exactly: plain values, tensors, and arrays of numpy.

`reading` takes the weights of a file and passes over the rest. To go on with a run, the rest counts as well:
optimisers, schedules, callbacks, random states. So here nothing is passed over: what a file names is built if it is one
of a few kinds without any code of their own, and otherwise the file is refused.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage

from ldm.checkpoint.formats.allowlist import DICT_NAMES, DTYPES, PARAMETER_NAMES, STORAGE_NAMES, TENSOR_NAMES
from ldm.checkpoint.formats.containers import BadFile, Fetch, open_zip, read_legacy, read_zip
from ldm.checkpoint.formats.pickles import (
    MAX_STEPS,
    BadPickle,
    Machine,
    Name,
    Stored,
    StoredTensor,
    UnsafePickle,
    stored_tensor,
)
from ldm.checkpoint.formats.storages import MAX_PRODUCT, Ranges, may_map, note_mapped, tensor_of
from ldm.checkpoint.reading import MAX_TENSORS, CheckpointError, cut_short, kind_of_file, shown

MAX_DEPTH = 100  # of dictionaries and lists in each other; those who use a state go through it by recursion
MAX_MADE = 64 * 2**20  # bytes that are made of what a file holds once, and might ask for again and again
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:(0|[1-9][0-9]?))?")
_ORDER = {"little": "<", "big": ">"}[sys.byteorder]
_NUMBERS = re.compile(r"[biufc]\d{1,2}")  # numpy's names of plain kinds of numbers


def read_state(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """All that a file of `torch.save` holds, as it was saved, memory-mapped where that is safe, on the CPU.

    Dictionaries of any class come back as plain ones. Raises FileNotFoundError if there is no such file, and
    CheckpointError if it is damaged, is none of torch >= 1.6, or holds anything but plain values, tensors and arrays.
    """
    path = Path(path)
    if kind_of_file(path) != "zip":
        raise CheckpointError(f"{path} holds weights at most, not the state of a run")
    storages: dict[str, UntypedStorage] = {}

    def machine(fetch: Fetch) -> _Exact:
        def storage(stored: Stored) -> UntypedStorage:
            if stored.key not in storages:
                storages[stored.key] = fetch(stored)
            return storages[stored.key]

        return _Exact(storage)

    try:
        with path.open("rb") as file:
            ranges = Ranges(file, mapped=may_map(path))
            if ranges.mapped:
                note_mapped(path)
            with open_zip(file) as archive:
                state, _ = read_zip(archive, ranges, machine)
        _check_plain(state)
    except UnsafePickle as error:
        raise CheckpointError(
            f"{path} is refused because it asks for more than the state of a run ({', '.join(error.names[:10])})"
        ) from error
    except BadPickle as error:
        raise CheckpointError(f"{path} is damaged, or holds what no run writes ({error})") from error
    except BadFile as error:
        refused = CheckpointError(f"{path} is refused: {error}")
        raise (cut_short(path, str(error)) if error.damaged else refused) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the state of a run")
    return state


def read_tensors(path: str | os.PathLike[str]) -> list[Tensor]:
    """The tensors of a file that holds nothing but a tuple or list of them. Raises ValueError for any other."""
    path = Path(path)
    kind = kind_of_file(path)
    with path.open("rb") as file:
        ranges = Ranges(file, mapped=False)
        if kind == "zip":
            with open_zip(file) as archive:
                return _row(path, *read_zip(archive, ranges))
        if kind == "pickle":
            return _row(path, *read_legacy(file, ranges))
    raise CheckpointError(f"{path} is no file of torch.save")


def _row(path: Path, data: Any, fetch: Fetch) -> list[Tensor]:
    if not isinstance(data, (tuple, list)) or not all(isinstance(value, StoredTensor) for value in data):
        raise CheckpointError(f"{path} holds something else than tensors in a row")
    return [tensor_of(value, fetch(value.storage)) for value in data]


class _Exact(Machine):
    """A machine that makes every value, or refuses it."""

    known = (
        frozenset(
            (
                *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
                *("numpy.ndarray", "numpy.dtype", "_codecs.encode", "torch.Size", "torch.device"),
                *(f"builtins.{name}" for name in ("bytearray", "bytes", "complex", "set")),
                *(f"torch.{name}" for name in DTYPES),
            )
        )
        | TENSOR_NAMES
        | PARAMETER_NAMES
        | DICT_NAMES
        | STORAGE_NAMES.keys()
    )

    def __init__(self, fetch: Fetch) -> None:
        super().__init__({})
        self._fetch = fetch
        self._tensors = 0
        self._room = MAX_MADE

    def _name(self, argument: str) -> Any:
        name = super()._name(argument)
        kind = name.path.removeprefix("torch.")
        return getattr(torch, kind) if kind in DTYPES and name.path != kind else name

    def _made(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Name) and isinstance(arguments, tuple):
            if function.path in TENSOR_NAMES:
                return self._tensor(function.path, arguments)
            if make := _MAKERS.get(function.path):
                return make(self, *arguments)
        return super()._made(function, arguments)

    def _fill(self, target: dict[Any, Any], items: Iterable[Any]) -> None:
        super()._fill(target, map(_pair, items))

    def _check_key(self, key: Any) -> None:
        super()._check_key(key.decode("latin-1") if type(key) is bytes else key)  # hashed as text is

    def _tensor(self, path: str, arguments: tuple[Any, ...]) -> Tensor:
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise BadPickle("it holds more tensors than any run")
        kinds, marks = (arguments[6:7], arguments[7:8]) if path.endswith("_v3") else ((), arguments[6:7])
        if not all(isinstance(kind, (torch.dtype, Name)) for kind in kinds):
            raise BadPickle("it has a tensor of no dtype")
        if not all(map(_is_nothing, marks)):
            raise BadPickle("it has a tensor that is conjugated or negated on reading")
        stored = stored_tensor(path, arguments)
        if not isinstance(stored, StoredTensor):
            raise BadPickle("it has a tensor without a storage")
        try:
            return tensor_of(stored, self._fetch(stored.storage))
        except ValueError as error:
            raise BadPickle(f"of a tensor, {error}") from error

    def _count(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise BadPickle("it holds more beside tensors than any run")

    def _bytes(self, text: Any = "", encoding: Any = "latin1") -> bytes:
        """Bytes, which the protocol that torch writes has no word for."""
        if not isinstance(text, str) or not isinstance(encoding, str) or encoding not in ("latin1", "latin-1"):
            raise BadPickle("it encodes what is no bytes")
        self._count(len(text))
        return text.encode("latin-1")

    def _byte_array(self, given: Any = b"", *encoding: Any) -> bytearray:
        content = given if isinstance(given, bytes) else self._bytes(given, *encoding)
        self._count(len(content))
        return bytearray(content)

    def _complex(self, real: Any, imaginary: Any) -> complex:
        if type(real) is not float or type(imaginary) is not float:
            raise BadPickle("it has a complex number of what are no numbers")
        return complex(real, imaginary)

    def _set(self, given: Any = ()) -> set[Any]:
        if not isinstance(given, (list, tuple)):
            raise BadPickle("it has a set of what is no list")
        made: dict[Any, Any] = {}
        self._fill(made, ((key, None) for key in given))
        return set(made)

    def _size(self, given: Any = ()) -> torch.Size:
        if not isinstance(given, tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in given):
            raise BadPickle("it has an impossible shape")
        self._count(8 * len(given))
        return torch.Size(given)

    def _device(self, kind: Any, number: Any = None) -> torch.device:
        name = f"{kind}:{number}" if isinstance(kind, str) and type(number) is int else kind
        if not isinstance(name, str) or not _DEVICE.fullmatch(name):
            raise BadPickle("it names a device that is none")
        return torch.device(name)

    def _array(self, kind: Any, shape: Any, letter: Any) -> np.ndarray[Any, Any]:
        """An empty array; `_build` brings its content."""
        if not isinstance(kind, Name) or kind != Name("numpy.ndarray"):
            raise BadPickle("it has an array of a class of its own")
        self._count(128)
        return np.empty(0, np.uint8)

    def _kind(self, name: Any, *_: Any) -> np.dtype[Any]:
        try:
            if isinstance(name, str) and _NUMBERS.fullmatch(name):
                return np.dtype(name)
        except TypeError:  # there is no number of that size
            pass
        raise BadPickle("it has an array of what are no numbers")

    def _build(self) -> None:
        given, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.dtype):
            order = given[1] if isinstance(given, tuple) and len(given) > 1 else None
            if not isinstance(order, str) or order not in ("|", "=", _ORDER):
                raise BadPickle("it has an array of another byte order")
        elif isinstance(target, np.ndarray):
            if not isinstance(given, tuple):
                raise BadPickle("it has an array of what are no numbers")
            self._fill_array(target, *given)
        elif isinstance(target, (Tensor, list, tuple)) or (isinstance(target, dict) and not _is_nothing(given)):
            raise BadPickle("it gives attributes to what has none")

    def _fill_array(self, target: np.ndarray[Any, Any], _: Any, shape: Any, kind: Any, turned: Any, raw: Any) -> None:
        if not isinstance(kind, np.dtype) or not isinstance(raw, bytes):
            raise BadPickle("it has an array of what are no numbers")
        if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
            raise BadPickle("it has an array of an impossible shape")
        if math.prod(filter(None, shape)) * kind.itemsize >= MAX_PRODUCT:
            raise BadPickle("it has an array of an impossible shape")
        if math.prod(shape) * kind.itemsize != len(raw):
            raise BadPickle(f"it has an array of shape {shape}, and {len(raw)} bytes for it")
        state: Any = (
            1,
            shape,
            kind,
            turned is True,
            raw,
        )  # numpy's types ask for its own bool
        target.__setstate__(state)


def _pair(given: Any) -> Any:
    """An entry of a dictionary; whatever is no pair might take for ever, or all memory, to be gone through as one."""
    if not isinstance(given, (tuple, list)):
        raise BadPickle("it has a dictionary of what are no pairs")
    return given


def _is_nothing(given: Any) -> bool:
    """Whether it says nothing. Tensors and arrays, whose truth may be an error, say something."""
    return given is None or (isinstance(given, (dict, list, tuple)) and not given)


_MAKERS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _Exact._bytes,
    "builtins.bytes": _Exact._bytes,
    "builtins.bytearray": _Exact._byte_array,
    "builtins.complex": _Exact._complex,
    "builtins.set": _Exact._set,
    "torch.Size": _Exact._size,
    "torch.device": _Exact._device,
    "numpy.core.multiarray._reconstruct": _Exact._array,
    "numpy._core.multiarray._reconstruct": _Exact._array,
    "numpy.dtype": _Exact._kind,
}
_BASE = MAX_DEPTH + 2
_LEAF = _BASE  # one thing, of no depth
_KEYS = (str, bytes, int, float, type(None))
_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, set),
    *(Tensor, np.ndarray, torch.dtype, torch.device, torch.Size),
)


def _check_plain(root: Any) -> None:
    """BadPickle unless `root` is made of plain values only, in a tree that a reader comes to the end of.

    Lists that hold themselves have no end, and thirty lists that hold the one before twice have a billion entries.
    """
    seen: dict[int, int] = {}  # by id, entries of what has been gone through, and below them the depth; 0: not yet done
    todo = [root]
    while todo:
        value = todo[-1]
        if not _holds(value) or seen.get(id(value)):
            todo.pop()
            continue
        inner = value.values() if isinstance(value, dict) else value
        if id(value) not in seen:
            seen[id(value)] = 0
            _check_keys(value if isinstance(value, dict) else ())
            new = [entry for entry in inner if _holds(entry) and not seen.get(id(entry))]
            if any(id(entry) in seen for entry in new):
                raise BadPickle("it holds a list in itself")
            todo.extend(new)
        else:
            todo.pop()
            found = [divmod(seen.get(id(entry), _LEAF), _BASE) for entry in inner]
            size, depth = 1 + sum(size for size, _ in found), 1 + max(depth for _, depth in found)
            if size > MAX_STEPS or depth > MAX_DEPTH:
                raise BadPickle("it holds too many things, or too many in each other")
            seen[id(value)] = size * _BASE + depth


def _holds(value: Any) -> bool:
    """Whether a value holds others; BadPickle if it is not plain."""
    if isinstance(value, set):
        _check_keys(value)
    if isinstance(value, _LEAVES):
        return False
    if isinstance(value, (dict, list, tuple)):
        return len(value) > 0
    raise BadPickle(f"it holds {shown(value)}, which is no plain value")


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        if not all(isinstance(part, _KEYS) for part in (key if isinstance(key, tuple) else (key,))):
            raise BadPickle(f"it has a key that is no plain value, {shown(key)}")
