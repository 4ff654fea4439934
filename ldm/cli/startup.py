"""Set up the process of a script: quick imports, memory that stays with it, a sentence at SIGBUS.

`ldm.cli.run` calls `prepare` when the process is the script's own. A program that imports `ldm` is left alone.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def prepare() -> None:
    """Set up this process for a script. Nothing heavy is imported."""
    defer_imports()
    retain_freed_memory()
    install_sigbus_handler()


# ------------------------------------------------------------------------------------------------------ quick imports

# `import pytorch_lightning` takes twice as long as `import torch`. Most of that is other packages, which it and
# torchmetrics import for a few names: the compiler, to ask whether a model is compiled, transformers for text scores,
# matplotlib for plots, scipy to add a name to it. These are imported when they are first used.
DEFERRED = ("torch._dynamo", "transformers", "torchmetrics.utilities.plot", "scipy.signal")


def defer_imports() -> None:
    """Make the first `import pytorch_lightning` import the packages of `DEFERRED` only when they are used."""
    if "pytorch_lightning" not in sys.modules:
        sys.meta_path.insert(0, _LightningFinder())


class _LightningFinder(importlib.abc.MetaPathFinder):
    """Finds pytorch_lightning once, with a loader that defers imports, and leaves `sys.meta_path`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Wrap the loader of pytorch_lightning; other modules are not found here."""
        if fullname != "pytorch_lightning":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeferringLoader(spec.loader)
        return spec


class _DeferringLoader(importlib.abc.Loader):
    """Executes a module while placeholders stand for the packages of `DEFERRED`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the real loader does."""
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, once more without placeholders if a release needs more than names."""
        import torch  # noqa: F401  # first: it needs the real modules

        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        try:
            with _placeholders():
                self.loader.exec_module(module)
        except Exception:
            for name in [name for name in sys.modules if name.startswith("pytorch_lightning.")]:
                del sys.modules[name]
            self.loader.exec_module(module)


@contextmanager
def _placeholders() -> Iterator[None]:
    """Placeholder modules in `sys.modules`, as far as the real ones are not imported; removed at the end."""
    sys.modules.update({name: _PlaceholderModule(name) for name in DEFERRED if name not in sys.modules})
    try:
        yield
    finally:
        for name in DEFERRED:
            if isinstance(sys.modules.get(name), _PlaceholderModule):
                del sys.modules[name]


class _PlaceholderModule(ModuleType):
    """A module whose attributes are placeholder classes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if (self.__name__, name) == ("torch._dynamo", "disable"):
            return _disable
        return _Placeholder(name, (), {"__module__": self.__name__})


class _Placeholder(type):
    """A class that stands for another: using it imports the module, `isinstance` with it does not."""

    def __instancecheck__(cls, instance: object) -> bool:
        module = sys.modules.get(cls.__module__)  # nothing is an instance of a class that was never imported
        return module is not None and isinstance(instance, getattr(module, cls.__name__))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return _resolve(cls)(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # `typing` asks every class for these
            raise AttributeError(name)
        return getattr(_resolve(cls), name)

    def __setattr__(cls, name: str, value: Any) -> None:
        setattr(_resolve(cls), name, value)


def _resolve(placeholder: _Placeholder) -> Any:
    if isinstance(sys.modules.get(placeholder.__module__), _PlaceholderModule):
        del sys.modules[placeholder.__module__]
    return getattr(importlib.import_module(placeholder.__module__), placeholder.__name__)


def _disable(function: Callable[..., Any], recursive: bool = True, reason: str | None = None) -> Callable[..., Any]:
    """Defer `@torch.compiler.disable`, which Lightning applies while it is imported, to the first call."""
    import torch

    return torch._disable_dynamo(function, recursive)


# ------------------------------------------------------------------------------------------------------------- memory

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
_LARGEST_BLOCK = 2**25  # bytes; the most that glibc accepts
_RETAINED = 2**30  # bytes at the end of the heap


def retain_freed_memory() -> bool:
    """Keep freed blocks of up to 32 MB for reuse. Returns whether the allocator supports it.

    glibc returns large blocks to the system at once, and activations are such blocks: the system would clear every
    page again before each layer writes it. Larger blocks, as in a first stage, still go back: the holes that they
    leave would be as large.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_TRIM_THRESHOLD, _RETAINED))


# ------------------------------------------------------------------------------------------------------------- SIGBUS

SIGBUS_EXIT_CODE = 1
_handlers: list[Any] = []  # the system only has the function's address, so a reference must stay
_reported: list[int] = []


def install_sigbus_handler() -> None:
    """End this process with one sentence when a memory-mapped file is cut short under it.

    SIGBUS is raised by the instruction that touches the missing page, and returning from a handler runs it again.
    Python's own handlers run after the instruction, that is never, so this installs a C callback that exits. Taking
    Python's lock in a signal handler is safe here: the signal comes from numerical kernels and copies, which hold no
    lock that Python needs.
    """
    if not hasattr(signal, "SIGBUS") or faulthandler.is_enabled():
        return
    try:
        install: Any = ctypes.CDLL(None).signal
    except (OSError, AttributeError):
        return
    callback = ctypes.CFUNCTYPE(None, ctypes.c_int)
    try:
        handler = callback(_exit_at_sigbus)
    except MemoryError:  # the system forbids writable code
        return
    _handlers.append(handler)
    install.argtypes, install.restype = (ctypes.c_int, callback), ctypes.c_void_p
    install(signal.SIGBUS, handler)


def _exit_at_sigbus(number: int) -> None:
    if _reported:  # several threads arrive at once
        time.sleep(60)
    _reported.append(number)
    try:
        os.write(2, f"\nerror: {_sigbus_message()}\n".encode(errors="backslashreplace"))
    finally:
        os._exit(SIGBUS_EXIT_CODE)


def _sigbus_message() -> str:
    storages = sys.modules.get("ldm.checkpoint.formats.storages")  # not imported: no file was mapped by ldm
    shrunk = storages.shrunk() if storages else []
    if shrunk:
        return (
            f"{shrunk[0]} was cut short while it was in use: put new files in place by renaming them, not by writing "
            "over others, and run again"
        )
    return "a file that was mapped into memory could not be read: its disk failed, or shared memory (/dev/shm) is full"
