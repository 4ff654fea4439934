"""Attach behavior to modules from outside, and detach it without a trace.

Acceleration, adapters and perturbed-attention guidance change what single modules compute. All of them do so through
`Override`: an object that stands in for one method of one module instance. Classes, parameters and state dicts stay as
they are, and hooks run as before, because `module(x)` still goes through `nn.Module.__call__`.

    handle = Handle("name", [MyOverride(part).attach() for part in parts])
    ...
    handle.remove()                      # or: with handle: ...

Overrides of one method form a chain: each calls `original`, the one below it, and the last one the method of the class.
A method that somebody else set on the instance is part of the chain and is called, never skipped.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from enum import IntEnum
from types import TracebackType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_CALL = nn.Module.__call__
_LOCK = threading.RLock()  # chains may be changed by several threads that use one model


class Priority(IntEnum):
    """Order of overrides of one method: a higher one wraps a lower one, whichever was attached first."""

    KERNEL = 0  # exact kernels, and adapters
    INT8 = 10
    CONTEXT_CACHE = 20
    TOKEN_MERGING = 30
    IDENTITY_ATTENTION = 40
    FEATURE_CACHE = 50
    COMPILE = 60


class Override:
    """Replacement for one method (`forward` by default) of one module; subclasses implement `__call__`.

    Class attributes:
        priority: its place in the chain, see `Priority`.
        exact: whether it computes what the method computes, so that a fused kernel of the parent may replace both.
        thread_local: whether it applies only in the thread that made it (see `is_active`), so that several threads can
            use one model at a time.

    Copies (`copy.deepcopy`) and pickles of the module get an override of their own that refers to the copy. It keeps
    the attributes named in `state` and gets the others from `reset`; with `thread_local` it is no longer active.
    """

    priority: int = Priority.KERNEL
    exact = False
    thread_local = False
    state: tuple[str, ...] = ()

    def __init__(self, module: nn.Module, attribute: str = "forward") -> None:
        self._module: Callable[[], Any] = weakref.ref(module)  # no cycle: a model is freed as soon as it is dropped
        self.attribute = attribute
        self.previous: Callable[..., Any] | None = None  # None: the method of the class
        self._thread: int | None = threading.get_ident()
        self.reset()

    def reset(self) -> None:
        """Set attributes that copies and pickles start anew."""

    def is_active(self) -> bool:
        """Whether this override is for the calling thread."""
        return not self.thread_local or self._thread == threading.get_ident()

    @property
    def module(self) -> Any:  # an nn.Module
        """The module that this is attached to."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this override no longer exists")
        return module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """Call what this override stands in for."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        module = self._module()
        return getattr(type(module), self.attribute)(module, *args, **kwargs)

    def attach(self) -> Override:
        """Put this override on its module, below those of a higher priority."""
        with _LOCK:
            methods = self.module.__dict__
            top = methods.get(self.attribute)
            if not (isinstance(top, Override) and top.priority > self.priority):
                self.previous = top
                methods[self.attribute] = self
                return self
            while isinstance(top.previous, Override) and top.previous.priority > self.priority:
                top = top.previous
            self.previous, top.previous = top.previous, self
            return self

    def remove(self) -> None:
        """Take this override off its module.

        Where a foreign function has wrapped it since, it cannot be taken out of the chain: it then passes every call
        on, so that the foreign function works as if this override had never been there.
        """
        with _LOCK:
            module = self._module()
            methods = {} if module is None else module.__dict__
            top = methods.get(self.attribute)
            if top is self and self.previous is None:
                del methods[self.attribute]
            elif top is self:
                methods[self.attribute] = self.previous
            while isinstance(top, Override) and top is not self:
                if top.previous is self:
                    top.previous = self.previous
                    return
                top = top.previous
            if top is not self:
                self.__class__ = _Removed  # which has the same attributes

    def __getstate__(self) -> dict[str, Any]:
        return {
            "module": self._module(),
            "attribute": self.attribute,
            "previous": self.previous,
            "state": {name: getattr(self, name) for name in self.state},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._module = weakref.ref(state["module"])
        self.attribute, self.previous, self._thread = state["attribute"], state["previous"], None
        self.__dict__.update(state["state"])
        self.reset()


class _Removed(Override):
    """A removed override that a foreign function still calls."""


class Handle:
    """What `attach` functions return: removes what they attached. Also a context manager.

    Args:
        name: what is attached, for people to read.
        overrides: attached overrides.
        on_remove: called once after they are removed.
    """

    def __init__(
        self, name: str, overrides: Iterable[Override] = (), on_remove: Callable[[], None] | None = None
    ) -> None:
        self.name = name
        self.overrides = list(overrides)
        self._on_remove = on_remove
        self._model: weakref.ref[nn.Module] | None = None

    def list_on(self, model: Any) -> Handle:
        """Add this handle to the list `model.acceleration` for as long as it is attached."""
        model.acceleration = [*getattr(model, "acceleration", ()), self]
        self._model = weakref.ref(model)
        return self

    def remove(self) -> None:
        """Restore what was there before; a second call does nothing."""
        for override in reversed(self.overrides):
            override.remove()
        self.overrides = []
        on_remove, self._on_remove = self._on_remove, None
        if on_remove is not None:
            on_remove()
        model: Any = None if self._model is None else self._model()
        if model is not None:
            model.acceleration = [other for other in getattr(model, "acceleration", ()) if other is not self]

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_model": None if self._model is None else self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state.pop("_model")
        self.__dict__.update(state, _model=None if model is None else weakref.ref(model))

    def __repr__(self) -> str:
        return f"Handle({self.name!r})"


def override_chain(module: nn.Module, attribute: str = "forward") -> list[Override] | None:
    """The overrides of a method from the outermost to the innermost; None if a foreign function is among them."""
    found: list[Override] = []
    method = module.__dict__.get(attribute)
    while method is not None:
        if not isinstance(method, Override):
            return None
        if not isinstance(method, _Removed):
            found.append(method)
        method = method.previous
    return found


def own_method(cls: type, name: str = "forward") -> Any:
    """The method that a class defines in its own source file, or None if it has been replaced from elsewhere."""
    method = vars(cls).get(name)
    code, module = getattr(method, "__code__", None), sys.modules.get(cls.__module__)
    return method if code is not None and module is not None and code.co_filename == module.__file__ else None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs hooks, its own or global ones, code that `module.compile` made, or a replaced
    `nn.Module.__call__`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or type(module).__call__ is not _CALL
        or torch_module._has_any_global_hook()
    )
