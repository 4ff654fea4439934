"""Unpickling without trust: stand-ins for the few harmless names that real checkpoints ask for.

`torch.load(weights_only=True)` refuses every global that it does not know. The training frameworks of 2022 stored more
than tensors: Lightning 1.x used the class of a callback as a dictionary key and kept numpy scalars, some trainers kept
their omegaconf settings. None of it is needed to draw a picture, so each such name is answered by a class that ignores
whatever it is given. The real objects are never imported, hence the installed numpy and Lightning do not matter.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

INERT_NAMES = (
    # Lightning 1.x and 2.x: callback states are keyed by the callback's class
    *(
        f"{package}.callbacks.{name}"
        for package in ("pytorch_lightning", "lightning.pytorch")
        for name in (
            "model_checkpoint.ModelCheckpoint",
            "early_stopping.EarlyStopping",
            "lr_monitor.LearningRateMonitor",
        )
    ),
    # numpy 1.x and 2.x: the best score of ModelCheckpoint, learning rates, random states
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.ndarray",
    "numpy.dtype",
    *(
        f"numpy.dtypes.{name}DType"
        for name in ("Bool", "Int32", "Int64", "UInt8", "UInt32", "UInt64", "Float16", "Float32", "Float64")
    ),
    # hyper_parameters kept as omegaconf containers
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.Metadata",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Node",
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "Boolean", "Float", "Integer", "String", "ValueNode")),
    "typing.Any",
    "typing.Dict",
    "typing.List",
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.object",
    "builtins.str",
    "builtins.tuple",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    # textual inversion embeddings: admitted so that they can be recognised and named
    "torch.nn.modules.container.ParameterDict",
)
DICT_NAMES = (
    "collections.defaultdict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.fabric.utilities.data.AttributeDict",
)


class Inert:
    """Stands where a file has some other object: accepts any arguments and state, keeps and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class PlainDict:
    """Stands for kinds of dict: an empty dict, which the file then fills with its items."""

    def __new__(cls, *args: Any) -> dict:
        return {}


# (stand-in, full name) for `torch.serialization.safe_globals`; one class a name, for some are dictionary keys.
STAND_INS: list[tuple[Callable, str]] = [
    *((type(name.rpartition(".")[2], (Inert,), {}), name) for name in INERT_NAMES),
    *((type(name.rpartition(".")[2], (PlainDict,), {}), name) for name in DICT_NAMES),
]


class UnsafePickle(Exception):
    """A file asks for globals that are not on the list; `names` says which."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


def load_pickle(path: Path, *, mmap: bool) -> Any:
    """What `torch.save` wrote to `path`, tensors on the CPU; memory-mapped (private pages) if `mmap`.

    Raises UnsafePickle if the file asks for names that are not known to be harmless; nothing of them has run then.
    Damaged files raise whatever the unpickler stumbles over.
    """
    with torch.serialization.safe_globals(STAND_INS):
        try:
            if mmap and path.suffix != ".safetensors":  # torch would believe that name
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            names = re.findall(r"GLOBAL ([\w.]+)", str(error))
            if not names:
                raise
            raise UnsafePickle(sorted({*names[:1], *_unsafe_names(path)})) from error


def _unsafe_names(path: Path) -> set[str]:
    """All names of a zip checkpoint that are not admitted. The older layout has no such listing: empty."""
    try:
        return {name.removeprefix("builtins.") for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)}
    except (ValueError, EOFError, pickle.UnpicklingError):
        return set()
