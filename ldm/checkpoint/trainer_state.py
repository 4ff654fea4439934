"""Read the state of a training run exactly: plain values, tensors and numpy arrays.

`reading` takes the weights of a file and ignores the rest. To resume a run, the rest counts too: optimizers, schedules,
callbacks, random states. So nothing is ignored here: values of a few kinds without code of their own are built, and
files with anything else are refused.
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

from ldm.checkpoint.formats import BadFile, BadPickle, UnsafePickle
from ldm.checkpoint.formats.allowlist import DICT_NAMES, DTYPES, PARAMETER_NAMES, STORAGE_NAMES, TENSOR_NAMES
from ldm.checkpoint.formats.containers import Fetch, open_zip, read_legacy, read_zip
from ldm.checkpoint.formats.safetensors import MAX_TENSORS
from ldm.checkpoint.formats.storages import MAX_PRODUCT, Ranges, may_map, note_mapped, tensor_of
from ldm.checkpoint.formats.unpickler import MAX_STEPS, Name, RestrictedUnpickler, StorageRef, TensorRef, tensor_ref
from ldm.checkpoint.reading import CheckpointError, kind_of_file, shown, unusable

MAX_DEPTH = 100  # of nested dictionaries and lists; code that uses a state recurses
MAX_BYTES = 64 * 2**20  # of values that a pickle can repeat without storing them again
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:(0|[1-9][0-9]?))?")
_ORDER = {"little": "<", "big": ">"}[sys.byteorder]
_NUMBERS = re.compile(r"[biufc]\d{1,2}")  # numpy's names of plain dtypes
_NOT_NUMBERS = "it has an array of something other than numbers"
_NO_SHAPE = "it has an array of an impossible shape"


def read_state(path: str | os.PathLike[str]) -> dict[Any, Any]:
    """Return everything that a file of `torch.save` holds, on the CPU, memory-mapped where that is safe.

    Dictionaries of any class become plain ones.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, older than torch 1.6, or holds more than plain values, tensors and arrays.
    """
    path = Path(path)
    if kind_of_file(path) != "zip":
        raise CheckpointError(f"{path} holds weights at most, not the state of a run")
    storages: dict[str, UntypedStorage] = {}

    def make_unpickler(fetch: Fetch) -> _StateUnpickler:
        def storage(ref: StorageRef) -> UntypedStorage:
            if ref.key not in storages:
                storages[ref.key] = fetch(ref)
            return storages[ref.key]

        return _StateUnpickler(storage)

    try:
        with path.open("rb") as file:
            ranges = Ranges(file, mapped=may_map(path))
            if ranges.mapped:
                note_mapped(path)
            with open_zip(file) as archive:
                state, _ = read_zip(archive, ranges, make_unpickler)
        _check_plain(state)
    except UnsafePickle as error:
        names = ", ".join(error.names[:10])
        raise CheckpointError(
            f"{path} is refused: unsafe pickle: it references names outside the allowlist ({names})"
        ) from error
    except BadPickle as error:
        raise CheckpointError(f"{path} is damaged, or holds what no run writes ({error})") from error
    except BadFile as error:
        raise unusable(path, error) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the state of a run")
    return state


def read_tensors(path: str | os.PathLike[str]) -> list[Tensor]:
    """Read a file that holds only a tuple or list of tensors. Raises ValueError for any other."""
    path = Path(path)
    kind = kind_of_file(path)
    with path.open("rb") as file:
        ranges = Ranges(file, mapped=False)
        if kind == "zip":
            with open_zip(file) as archive:
                return _tensor_list(path, *read_zip(archive, ranges))
        if kind == "pickle":
            return _tensor_list(path, *read_legacy(file, ranges))
    raise CheckpointError(f"{path} is not a file of torch.save")


def _tensor_list(path: Path, data: Any, fetch: Fetch) -> list[Tensor]:
    if not isinstance(data, (tuple, list)) or not all(isinstance(value, TensorRef) for value in data):
        raise CheckpointError(f"{path} holds something other than a list of tensors")
    return [tensor_of(value, fetch(value.storage)) for value in data]


class _StateUnpickler(RestrictedUnpickler):
    """A restricted unpickler that builds every value, or refuses it."""

    allowlist = frozenset(
        (
            *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
            *("numpy.ndarray", "numpy.dtype", "_codecs.encode", "torch.Size", "torch.device"),
            *(f"builtins.{name}" for name in ("bytearray", "bytes", "complex", "set")),
            *(f"torch.{name}" for name in DTYPES),
            *(*TENSOR_NAMES, *PARAMETER_NAMES, *DICT_NAMES, *STORAGE_NAMES),
        )
    )

    def __init__(self, fetch: Fetch) -> None:
        super().__init__({})
        self._fetch = fetch
        self._tensors = 0
        self._room = MAX_BYTES

    def _name(self, argument: str) -> Any:
        name = super()._name(argument)
        kind = name.path.removeprefix("torch.")
        return getattr(torch, kind) if kind in DTYPES and name.path != kind else name

    def _call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Name) and isinstance(arguments, tuple):
            if function.path in TENSOR_NAMES:
                return self._tensor(function.path, arguments)
            if build := _BUILDERS.get(function.path):
                return build(self, *arguments)
        return super()._call(function, arguments)

    def _fill(self, target: dict[Any, Any], items: Iterable[Any]) -> None:
        super()._fill(target, map(_pair, items))

    def _check_key(self, key: Any) -> None:
        super()._check_key(key.decode("latin-1") if type(key) is bytes else key)  # hashed like text

    def _tensor(self, path: str, arguments: tuple[Any, ...]) -> Tensor:
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise BadPickle("it holds more tensors than any run")
        kinds, marks = (arguments[6:7], arguments[7:8]) if path.endswith("_v3") else ((), arguments[6:7])
        if not all(isinstance(kind, (torch.dtype, Name)) for kind in kinds):
            raise BadPickle("it has a tensor without a dtype")
        if not all(map(_is_empty, marks)):
            raise BadPickle("it has a tensor that is conjugated or negated on reading")
        ref = tensor_ref(path, arguments)
        if not isinstance(ref, TensorRef):
            raise BadPickle("it has a tensor without a storage")
        try:
            return tensor_of(ref, self._fetch(ref.storage))
        except ValueError as error:
            raise BadPickle(f"in a tensor, {error}") from error

    def _count(self, size: int) -> None:
        self._room -= size
        if self._room < 0:
            raise BadPickle("it holds more beside tensors than any run")

    def _bytes(self, text: Any = "", encoding: Any = "latin1") -> bytes:
        """Build bytes, for which protocol 2 has no instruction."""
        if not isinstance(text, str) or not isinstance(encoding, str) or encoding not in ("latin1", "latin-1"):
            raise BadPickle("it encodes something other than bytes")
        self._count(len(text))
        return text.encode("latin-1")

    def _byte_array(self, given: Any = b"", *encoding: Any) -> bytearray:
        content = given if isinstance(given, bytes) else self._bytes(given, *encoding)
        self._count(len(content))
        return bytearray(content)

    def _complex(self, real: Any, imaginary: Any) -> complex:
        if type(real) is not float or type(imaginary) is not float:
            raise BadPickle("it has a complex number without numbers")
        return complex(real, imaginary)

    def _set(self, given: Any = ()) -> set[Any]:
        if not isinstance(given, (list, tuple)):
            raise BadPickle("it has a set of something other than a list")
        entries: dict[Any, Any] = {}
        self._fill(entries, ((key, None) for key in given))
        return set(entries)

    def _size(self, given: Any = ()) -> torch.Size:
        if not isinstance(given, tuple) or not all(type(n) is int and 0 <= n < 2**62 for n in given):
            raise BadPickle("it has an impossible shape")
        self._count(8 * len(given))
        return torch.Size(given)

    def _device(self, kind: Any, number: Any = None) -> torch.device:
        name = f"{kind}:{number}" if isinstance(kind, str) and type(number) is int else kind
        if not isinstance(name, str) or not _DEVICE.fullmatch(name):
            raise BadPickle("it names an unknown device")
        return torch.device(name)

    def _array(self, kind: Any, shape: Any, letter: Any) -> np.ndarray[Any, Any]:
        """Build an empty array; `_build` fills it."""
        if not isinstance(kind, Name) or kind != Name("numpy.ndarray"):
            raise BadPickle("it has an array of another class")
        self._count(128)
        return np.empty(0, np.uint8)

    def _dtype(self, name: Any, *_: Any) -> np.dtype[Any]:
        try:
            if isinstance(name, str) and _NUMBERS.fullmatch(name):
                return np.dtype(name)
        except TypeError:  # no such size
            pass
        raise BadPickle(_NOT_NUMBERS)

    def _build(self) -> None:
        given, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.dtype):
            order = given[1] if isinstance(given, tuple) and len(given) > 1 else None
            if not isinstance(order, str) or order not in ("|", "=", _ORDER):
                raise BadPickle("it has an array of another byte order")
        elif isinstance(target, np.ndarray):
            if not isinstance(given, tuple):
                raise BadPickle(_NOT_NUMBERS)
            self._fill_array(target, *given)
        elif isinstance(target, (Tensor, list, tuple)) or (isinstance(target, dict) and not _is_empty(given)):
            raise BadPickle("it sets attributes of a plain value")

    def _fill_array(self, target: np.ndarray[Any, Any], _: Any, shape: Any, kind: Any, fortran: Any, raw: Any) -> None:
        if not isinstance(kind, np.dtype) or not isinstance(raw, bytes):
            raise BadPickle(_NOT_NUMBERS)
        if not isinstance(shape, tuple) or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
            raise BadPickle(_NO_SHAPE)
        if math.prod(filter(None, shape)) * kind.itemsize >= MAX_PRODUCT:
            raise BadPickle(_NO_SHAPE)
        if math.prod(shape) * kind.itemsize != len(raw):
            raise BadPickle(f"it has an array of shape {shape}, and {len(raw)} bytes for it")
        state: Any = (1, shape, kind, fortran is True, raw)
        target.__setstate__(state)


def _pair(given: Any) -> Any:
    """Return an entry of a dictionary. Iterating over anything else might take forever, or all memory."""
    if not isinstance(given, (tuple, list)):
        raise BadPickle("it has a dictionary of something other than pairs")
    return given


def _is_empty(given: Any) -> bool:
    """Return whether a value is None or empty. Tensors and arrays, whose truth may be an error, are not."""
    return given is None or (isinstance(given, (dict, list, tuple)) and not given)


_BUILDERS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _StateUnpickler._bytes,
    "builtins.bytes": _StateUnpickler._bytes,
    "builtins.bytearray": _StateUnpickler._byte_array,
    "builtins.complex": _StateUnpickler._complex,
    "builtins.set": _StateUnpickler._set,
    "torch.Size": _StateUnpickler._size,
    "torch.device": _StateUnpickler._device,
    "numpy.core.multiarray._reconstruct": _StateUnpickler._array,
    "numpy._core.multiarray._reconstruct": _StateUnpickler._array,
    "numpy.dtype": _StateUnpickler._dtype,
}
_BASE = MAX_DEPTH + 2
_LEAF = _BASE  # one value, depth 0
_KEYS = (str, bytes, int, float, type(None))
_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, set),
    *(Tensor, np.ndarray, torch.dtype, torch.device, torch.Size),
)


def _check_plain(root: Any) -> None:
    """Raise BadPickle unless `root` is a finite tree of plain values.

    Lists may contain themselves, and thirty lists that contain the one before twice have a billion entries.
    """
    seen: dict[int, int] = {}  # by id: size * _BASE + depth, or 0 while in progress
    todo = [root]
    while todo:
        value = todo[-1]
        if not _has_entries(value) or seen.get(id(value)):
            todo.pop()
            continue
        inner = value.values() if isinstance(value, dict) else value
        if id(value) not in seen:
            seen[id(value)] = 0
            _check_keys(value if isinstance(value, dict) else ())
            new = [entry for entry in inner if _has_entries(entry) and not seen.get(id(entry))]
            if any(id(entry) in seen for entry in new):
                raise BadPickle("it holds a list that contains itself")
            todo.extend(new)
        else:
            todo.pop()
            found = [divmod(seen.get(id(entry), _LEAF), _BASE) for entry in inner]
            size, depth = 1 + sum(size for size, _ in found), 1 + max(depth for _, depth in found)
            if size > MAX_STEPS or depth > MAX_DEPTH:
                raise BadPickle("it holds too many values, or too deeply nested ones")
            seen[id(value)] = size * _BASE + depth


def _has_entries(value: Any) -> bool:
    """Return whether a value contains others. Raises BadPickle if it is not plain."""
    if isinstance(value, set):
        _check_keys(value)
    if isinstance(value, _LEAVES):
        return False
    if isinstance(value, (dict, list, tuple)):
        return len(value) > 0
    raise BadPickle(f"it holds {shown(value)}, which is not a plain value")


def _check_keys(keys: Iterable[Any]) -> None:
    for key in keys:
        if not all(isinstance(part, _KEYS) for part in (key if isinstance(key, tuple) else (key,))):
            raise BadPickle(f"it has a key that is not a plain value, {shown(key)}")
