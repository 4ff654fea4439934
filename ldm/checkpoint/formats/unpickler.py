"""A restricted unpickler that builds plain values, and calls and imports nothing.

Python's unpickler runs what a file names, and `torch.load(weights_only=True)` still calls its own list of functions
with a file's arguments: it can be made to crash (a key of a million nested tuples), to hang or to fill the memory.
Here a name stays a name and a tensor is a description of where its bytes lie. Everything else that checkpoints hold
beside weights (a callback class that Lightning 1.x used as a key, numpy scalars, omegaconf settings) becomes `IGNORED`.
Steps, keys and sizes are limited.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ldm.checkpoint.formats import BadPickle, UnsafePickle
from ldm.checkpoint.formats.allowlist import (
    DICT_NAMES,
    DTYPES,
    KNOWN_NAMES,
    OTHER_TENSORS,
    PARAMETER_NAMES,
    STORAGE_NAMES,
    SUBCLASS_NAME,
    TENSOR_NAMES,
)

MAX_STEPS = 4_000_000  # a v1 training checkpoint takes 200,000
MAX_TUPLE_KEYS = 10_000  # hashes of tuples and of huge integers can be made to collide, those of text cannot
MAX_INTEGER_KEY = 2**60
MAX_AXES = 16


@dataclass(frozen=True, slots=True)
class Name:
    """A dotted path in a pickle. It is never looked up."""

    path: str


class _Ignored:
    def __repr__(self) -> str:
        return "IGNORED"


IGNORED = _Ignored()  # stands for any value that is not needed


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage elsewhere in the file: its key, the dtype of its class, and its number of elements."""

    key: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.count * int(getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor within a `StorageRef`: offset, size and stride count elements of `dtype`."""

    storage: StorageRef
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OtherTensor:
    """A tensor that is not a plain array: sparse, quantized, without values ..."""

    kind: str


def read_pickle(
    file: BinaryIO | bytes | Any,
    storages: dict[str, StorageRef] | None = None,
    unpickler: RestrictedUnpickler | None = None,
) -> Any:
    """Read one pickle.

    Args:
        file: bytes, or a stream of which nothing after the pickle is read.
        storages: filled with the storages that the pickle refers to, by key.
        unpickler: what interprets it, by default a `RestrictedUnpickler` on `storages`.

    Returns:
        Dictionaries, lists, tuples, texts, numbers and the classes of this module.

    Raises:
        UnsafePickle: the pickle asks for names that are not allowed.
        BadPickle: it is damaged or uses what no checkpoint does.
    """
    unpickler = unpickler or RestrictedUnpickler({} if storages is None else storages)
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if step == MAX_STEPS:
                raise BadPickle("it holds too many values for a checkpoint")
            unpickler.step(opcode.name, argument)
    except BadPickle:
        raise
    except (LookupError, TypeError, AttributeError) as error:
        raise BadPickle("it refers to values that are not there") from error
    except (ValueError, ArithmeticError) as error:  # from pickletools
        raise BadPickle(" ".join(ascii(str(error))[1:-1].split())[:120]) from error
    if unpickler.unknown:
        raise UnsafePickle(sorted(unpickler.unknown))
    return unpickler.result


class RestrictedUnpickler:
    """The stack and memo of a pickle. All values are plain, so that no step runs code that a file chooses."""

    allowlist = KNOWN_NAMES

    def __init__(self, storages: dict[str, StorageRef]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.unknown: set[str] = set()
        self.keys = self.tuple_keys = 0
        self.result: Any = None

    def step(self, opcode: str, argument: Any) -> None:
        """Interpret one instruction. Raises BadPickle for one that `torch.save` does not use."""
        run = _OPCODES.get(opcode)
        if run is None:
            raise BadPickle(f"it uses the instruction {opcode}")
        run(self, argument)

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("too few values on the stack")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def _memoize(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def _stop(self) -> None:
        self.result = self.stack.pop()

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _name(self, argument: str) -> Any:
        path = argument.replace(" ", ".")
        if path.startswith("__builtin__."):  # the name of Python 2, which protocol 2 uses
            plain = path.removeprefix("__builtin__.")
            path = "builtins." + {"long": "int", "unicode": "str"}.get(plain, plain)
        if path not in self.allowlist:
            self.unknown.add(ascii(path.removeprefix("builtins."))[1:-1][:80])
        return Name(path)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif target is not IGNORED:
            raise BadPickle("it appends to something other than a list")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            self._fill(target, zip(items[::2], items[1::2], strict=True))
        elif target is not IGNORED:
            raise BadPickle("it sets items of something other than a dictionary")

    def _fill(self, target: dict[Any, Any], items: Any) -> None:
        for key, value in items:
            self._check_key(key)
            target[key] = value

    def _check_key(self, key: Any) -> None:
        """Accept keys that are quick to hash and compare. Nested tuples could take forever, or the whole stack."""
        self.keys += 1
        if self.keys > MAX_STEPS:
            raise BadPickle("it holds too many values for a checkpoint")
        if type(key) is tuple and len(key) <= MAX_AXES and self.tuple_keys < MAX_TUPLE_KEYS:
            self.tuple_keys += 1
            parts: tuple[Any, ...] = key
        else:
            parts = (key,)
        for part in parts:
            if isinstance(part, int) and abs(part) > MAX_INTEGER_KEY:
                raise BadPickle("it has a huge number for a key")
            if part is not None and part is not IGNORED and not isinstance(part, (str, int, float, Name)):
                raise BadPickle(f"it has a key of type {type(part).__name__}")

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return what a call stands for. Unknown names were recorded already, so their values do not matter."""
        if function is IGNORED:
            return IGNORED
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise BadPickle("it calls something other than a function")
        path = function.path
        if path in TENSOR_NAMES:
            return tensor_ref(path, arguments)
        if path in PARAMETER_NAMES:
            return arguments[0] if arguments else IGNORED
        if path == SUBCLASS_NAME:
            inner, _, own, _ = arguments
            if inner == function:
                raise BadPickle("it calls a function by itself")
            return self._call(inner, own)
        if path in OTHER_TENSORS:
            return OtherTensor(OTHER_TENSORS[path])
        if path in DICT_NAMES:
            result: dict[Any, Any] = {}
            if arguments and isinstance(arguments[0], (dict, list)):  # a Counter; an OrderedDict of Python 2
                given = arguments[0]
                self._fill(result, given.items() if isinstance(given, dict) else given)
            return result
        if path == "torch.Size" and len(arguments) == 1:
            return arguments[0]
        return IGNORED

    def _build(self) -> None:
        self.stack.pop()  # attributes, which plain values do not have
        if not self.stack:
            raise IndexError("attributes without an object")

    def _storage(self) -> None:
        reference = self.stack.pop()
        if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
            raise BadPickle("it refers to something other than a storage")
        _, kind, key, _, count = reference[:5]
        if len(reference) == 6 and reference[5] is not None:
            raise BadPickle("it refers to a part of a storage, as only very old files do")
        if not isinstance(kind, Name) or not isinstance(key, str) or type(count) is not int or count < 0:
            raise BadPickle("it describes a storage incorrectly")
        dtype = STORAGE_NAMES.get(kind.path)
        if dtype is None:  # quantized, or a name that is refused
            self.stack.append(IGNORED)
            return
        storage = StorageRef(key, dtype, count)
        if self.storages.setdefault(key, storage) != storage:
            raise BadPickle("it describes a storage in two ways")
        self.stack.append(storage)


def tensor_ref(path: str, arguments: tuple[Any, ...]) -> Any:
    """Return the `TensorRef` that a call of one of `TENSOR_NAMES` stands for, or IGNORED if its storage is."""
    storage, offset, size, stride = arguments[:4]
    if storage is IGNORED:
        return IGNORED
    if not isinstance(storage, StorageRef):
        raise BadPickle("it has a tensor without a storage")
    dtype = storage.dtype
    if path.endswith("_v3"):
        dtype = str(getattr(arguments[6], "path", arguments[6])).removeprefix("torch.")
        if dtype not in DTYPES:
            raise BadPickle("it has a tensor without a dtype")
    for numbers in (size, stride, (offset,)):
        if type(numbers) is not tuple or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise BadPickle("it has a tensor of an impossible shape")
    if len(size) != len(stride) or len(size) > MAX_AXES:
        raise BadPickle("it has a tensor of an impossible shape")
    return TensorRef(storage, dtype, offset, size, stride)


_PUSHES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING")
_OPCODES: dict[str, Callable[[RestrictedUnpickler, Any], None]] = {
    "PROTO": lambda unpickler, _: None,
    **dict.fromkeys(_PUSHES, lambda unpickler, value: unpickler._push(value)),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda unpickler, key: unpickler._push(unpickler.memo[key])),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda unpickler, key: unpickler._memoize(key)),
    "NONE": lambda unpickler, _: unpickler._push(None),
    "NEWTRUE": lambda unpickler, _: unpickler._push(True),
    "NEWFALSE": lambda unpickler, _: unpickler._push(False),
    "EMPTY_TUPLE": lambda unpickler, _: unpickler._push(()),
    "EMPTY_LIST": lambda unpickler, _: unpickler._push([]),
    "EMPTY_DICT": lambda unpickler, _: unpickler._push({}),
    "EMPTY_SET": lambda unpickler, _: unpickler._push(IGNORED),
    "GLOBAL": lambda unpickler, path: unpickler._push(unpickler._name(path)),
    "MARK": lambda unpickler, _: unpickler._mark(),
    "TUPLE": lambda unpickler, _: unpickler._push(tuple(unpickler._since_mark())),
    "TUPLE1": lambda unpickler, _: unpickler._push(tuple(unpickler._last(1))),
    "TUPLE2": lambda unpickler, _: unpickler._push(tuple(unpickler._last(2))),
    "TUPLE3": lambda unpickler, _: unpickler._push(tuple(unpickler._last(3))),
    "APPEND": lambda unpickler, _: unpickler._extend(unpickler._last(1)),
    "APPENDS": lambda unpickler, _: unpickler._extend(unpickler._since_mark()),
    "SETITEM": lambda unpickler, _: unpickler._set_items(unpickler._last(2)),
    "SETITEMS": lambda unpickler, _: unpickler._set_items(unpickler._since_mark()),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda unpickler, _: unpickler._push(unpickler._call(*unpickler._last(2)))),
    "BUILD": lambda unpickler, _: unpickler._build(),
    "BINPERSID": lambda unpickler, _: unpickler._storage(),
    "STOP": lambda unpickler, _: unpickler._stop(),
}
