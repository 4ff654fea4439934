"""Unpickling that cannot act: a small machine that builds plain values, and calls and imports nothing at all.

Python's unpickler runs what a file names, and `torch.load(weights_only=True)` still calls its own list of functions
with whatever arguments a file gives them: it can be made to crash (a key of a million nested tuples), to hang or to
fill the memory. What a checkpoint needs is little. So here a name stays a name, a tensor says where its bytes
lie, and whatever else real files hold beside weights, such as the class of a callback that Lightning 1.x used as a key,
numpy scalars and omegaconf settings, is one `OPAQUE` thing. All of it is limited: steps, keys, sizes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

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

MAX_STEPS = 4_000_000  # a v1 training's checkpoint takes 200,000
MAX_TUPLE_KEYS = 10_000  # hashes of tuples and of huge integers can be made to collide, those of text cannot
MAX_INTEGER_KEY = 2**60
MAX_AXES = 16


class UnsafePickle(ValueError):
    """A file asks for names that are not on the list; `names` says which."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


class BadPickle(ValueError):
    """A pickle that is damaged, or that no checkpoint would be; the message says why, in a few words."""


@dataclass(frozen=True, slots=True)
class Name:
    """A dotted path that a file names. Nothing is ever looked up by it."""

    path: str


class _Opaque:
    def __repr__(self) -> str:
        return "OPAQUE"


OPAQUE = _Opaque()  # something beside weights, whatever it is


@dataclass(frozen=True, slots=True)
class Stored:
    """A run of bytes elsewhere in the file: its key there, the dtype that its class has, and the number of elements."""

    key: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.count * int(getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor whose elements are part of a `Stored`: offset, size and stride count elements of `dtype`."""

    storage: Stored
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OtherTensor:
    """A tensor that is no plain array: sparse, quantized, without values ..."""

    kind: str


def read_pickle(
    file: BinaryIO | bytes | Any, storages: dict[str, Stored] | None = None, machine: Machine | None = None
) -> Any:
    """The value that one pickle describes, made of dict, list, tuple, text, numbers and the classes above.

    Of a stream, nothing after the pickle is read. storages: gets all storages that it mentions, by their keys. machine:
    one that makes other values of it, and has its own place for storages.

    Raises UnsafePickle, with all of them, if it asks for names that are not known to be harmless, and BadPickle if it
    is damaged, too large, or uses what `torch.save` does not.
    """
    machine = machine or Machine({} if storages is None else storages)
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if step == MAX_STEPS:
                raise BadPickle("it holds too many things for a checkpoint")
            machine.step(opcode.name, argument)
    except BadPickle:
        raise
    except (LookupError, TypeError, AttributeError) as error:
        raise BadPickle("it refers to what is not there") from error
    except (ValueError, ArithmeticError) as error:  # of pickletools
        raise BadPickle(" ".join(ascii(str(error))[1:-1].split())[:120]) from error
    if machine.unknown:
        raise UnsafePickle(sorted(machine.unknown))
    return machine.result


class Machine:
    """A pickle's stack and memo. Values are plain, so that no step runs code of a file's choice."""

    known = KNOWN_NAMES

    def __init__(self, storages: dict[str, Stored]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.unknown: set[str] = set()
        self.keys = self.tuple_keys = 0
        self.result: Any = None

    def step(self, opcode: str, argument: Any) -> None:
        """One instruction, with what it is given; BadPickle for one that `torch.save` does not use."""
        if opcode in _PUSHES:
            self.stack.append(argument)
        elif opcode in _MAKES:
            self.stack.append(_MAKES[opcode]())
        elif opcode in _GETS:
            self.stack.append(self.memo[argument])
        elif opcode in _PUTS:
            self.memo[argument] = self.stack[-1]
        elif opcode in _STEPS:
            _STEPS[opcode](self)
        elif opcode == "GLOBAL":
            self.stack.append(self._name(argument))
        elif opcode != "PROTO":
            raise BadPickle(f"it uses the instruction {opcode}")

    def _name(self, argument: str) -> Any:
        path = argument.replace(" ", ".")
        if path.startswith("__builtin__."):  # as Python 2 called it, which the protocol of torch goes by
            plain = path.removeprefix("__builtin__.")
            path = "builtins." + {"long": "int", "unicode": "str"}.get(plain, plain)
        if path not in self.known:
            self.unknown.add(ascii(path.removeprefix("builtins."))[1:-1][:80])
        return Name(path)

    def _mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _tuple(self) -> None:
        items = self._since_mark()
        self.stack.append(tuple(items))

    def _last(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("a tuple of more than there is")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _append(self) -> None:
        item = self.stack.pop()
        self._extend([item])

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif target is not OPAQUE:
            raise BadPickle("it appends to what is no list")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            self._fill(target, zip(items[::2], items[1::2], strict=True))
        elif target is not OPAQUE:
            raise BadPickle("it sets items of what is no dictionary")

    def _fill(self, target: dict[Any, Any], items: Any) -> None:
        for key, value in items:
            self._check_key(key)
            target[key] = value

    def _check_key(self, key: Any) -> None:
        """Only keys that are hashed and compared in no time. Nested tuples could take for ever, or the whole stack."""
        self.keys += 1
        if self.keys > MAX_STEPS:
            raise BadPickle("it holds too many things for a checkpoint")
        if type(key) is tuple and len(key) <= MAX_AXES and self.tuple_keys < MAX_TUPLE_KEYS:
            self.tuple_keys += 1
            parts: tuple[Any, ...] = key
        else:
            parts = (key,)
        for part in parts:
            if isinstance(part, int) and abs(part) > MAX_INTEGER_KEY:
                raise BadPickle("it has a huge number for a key")
            if part is not None and part is not OPAQUE and not isinstance(part, (str, int, float, Name)):
                raise BadPickle(f"it has a key of type {type(part).__name__}")

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.stack.append(self._made(function, arguments))

    def _made(self, function: Any, arguments: Any) -> Any:
        """What a call stands for. An unknown name is noted already, so that its value does not matter."""
        if function is OPAQUE:
            return OPAQUE
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise BadPickle("it calls what is no function")
        path = function.path
        if path in TENSOR_NAMES:
            return stored_tensor(path, arguments)
        if path in PARAMETER_NAMES:
            return arguments[0] if arguments else OPAQUE
        if path == SUBCLASS_NAME:
            inner, _, own, _ = arguments
            if inner == function:
                raise BadPickle("it calls a function by itself")
            return self._made(inner, own)
        if path in OTHER_TENSORS:
            return OtherTensor(OTHER_TENSORS[path])
        if path in DICT_NAMES:
            made: dict[Any, Any] = {}
            if arguments and isinstance(arguments[0], (dict, list)):  # a Counter; an OrderedDict of Python 2
                given = arguments[0]
                self._fill(made, given.items() if isinstance(given, dict) else given)
            return made
        if path == "torch.Size" and len(arguments) == 1:
            return arguments[0]
        return OPAQUE

    def _build(self) -> None:
        self.stack.pop()  # attributes, of things that are plain here
        if not self.stack:
            raise IndexError("attributes of nothing")

    def _storage(self) -> None:
        known = self.stack.pop()
        if not isinstance(known, tuple) or len(known) not in (5, 6) or known[0] != "storage":
            raise BadPickle("it refers to what is no storage")
        _, kind, key, _, count = known[:5]
        if len(known) == 6 and known[5] is not None:
            raise BadPickle("it refers to a part of a storage, as only very old files do")
        if not isinstance(kind, Name) or not isinstance(key, str) or type(count) is not int or count < 0:
            raise BadPickle("it describes a storage wrongly")
        dtype = STORAGE_NAMES.get(kind.path)
        if dtype is None:  # quantized, or of a name that is refused
            self.stack.append(OPAQUE)
            return
        stored = Stored(key, dtype, count)
        if self.storages.setdefault(key, stored) != stored:
            raise BadPickle("it describes a storage in two ways")
        self.stack.append(stored)

    def _stop(self) -> None:
        self.result = self.stack.pop()


def stored_tensor(path: str, arguments: tuple[Any, ...]) -> Any:
    """The `StoredTensor` that a call of one of `TENSOR_NAMES` stands for; OPAQUE for one that is refused already."""
    storage, offset, size, stride = arguments[:4]
    if storage is OPAQUE:  # of a class that was refused already, or that is quantized
        return OPAQUE
    if not isinstance(storage, Stored):
        raise BadPickle("it has a tensor without a storage")
    dtype = storage.dtype
    if path.endswith("_v3"):
        dtype = str(getattr(arguments[6], "path", arguments[6])).removeprefix("torch.")
        if dtype not in DTYPES:
            raise BadPickle("it has a tensor of no dtype")
    for numbers in (size, stride, (offset,)):
        if type(numbers) is not tuple or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise BadPickle("it has a tensor of an impossible shape")
    if len(size) != len(stride) or len(size) > MAX_AXES:
        raise BadPickle("it has a tensor of an impossible shape")
    return StoredTensor(storage, dtype, offset, size, stride)


_PUSHES = frozenset(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING"))
_MAKES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": lambda: OPAQUE,
}
_GETS = frozenset(("BINGET", "LONG_BINGET"))
_PUTS = frozenset(("BINPUT", "LONG_BINPUT"))
_STEPS = {
    "MARK": Machine._mark,
    "TUPLE": Machine._tuple,
    "TUPLE1": lambda machine: machine._last(1),
    "TUPLE2": lambda machine: machine._last(2),
    "TUPLE3": lambda machine: machine._last(3),
    "APPEND": Machine._append,
    "APPENDS": lambda machine: machine._extend(machine._since_mark()),
    "SETITEM": Machine._set_item,
    "SETITEMS": lambda machine: machine._set_items(machine._since_mark()),
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._reduce,
    "BUILD": lambda machine: machine._build(),
    "BINPERSID": Machine._storage,
    "STOP": Machine._stop,
}
