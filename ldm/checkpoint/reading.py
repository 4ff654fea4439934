"""From a file to tensors under published names, or to one sentence that says why not."""

from __future__ import annotations

import logging
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.checkpoint.pickles import UnsafePickle, load_pickle

logger = logging.getLogger(__name__)

# Where a state dict may lie inside a pickled dictionary; they nest ("module" inside "state_dict").
STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
MAX_SAFETENSORS_HEADER = 100_000_000  # the format's own limit, bytes

# Text towers saved without their outermost module: by early fine-tuning tools and by transformers >= 5.6.
_BARE_TEXT_TOWER = re.compile(r"^(cond_stage_model\.transformer\.)(embeddings|encoder|final_layer_norm)\.")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one sentence for the person who named the file."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file under their published names, and what else it says of itself.

    Tensors may be memory-mapped: the file must not be changed in place while they live.
    """

    path: Path
    state: dict[str, Tensor]
    global_step: int | None = None
    epoch: int | None = None
    shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", {key: tuple(value.shape) for key, value in self.state.items()})


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a `.ckpt` (`.pt`, `.pth`, `.bin`) or `.safetensors` file; its content decides which, not its name.

    Pickled files are read with `weights_only=True` alone: nothing in them is ever run. Uncompressed zip files
    and safetensors are memory-mapped, so that reading takes a moment whatever the size.

    Raises FileNotFoundError if there is no such file, CheckpointError if it holds no usable weights.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"there is no checkpoint at {path}: put the file there, or name yours with --ckpt path/to/it.ckpt"
        )
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: a checkpoint is one file, such as model.ckpt or model.safetensors")
    kind = _kind_of_file(path)
    extra: Mapping[str, Any]
    if kind == "safetensors":
        state, extra = _read_safetensors(path)
    else:
        state, extra = _read_pickle(path, zipped=kind == "zip")
    _check_tensors(path, state)
    return Checkpoint(path, published_names(state), _counter(extra, "global_step"), _counter(extra, "epoch"))


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names that the original v1 files use, whoever wrote it.

    A text tower without `text_model.` gets it; a `module.` before every key goes; `position_ids` go, for they hold
    nothing but 0 ... 76, some merged files carry them rounded to other numbers, and the model has its own.
    """
    wrapped = all(key.startswith("module.") for key in state)
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("module.") if wrapped else key
        name = _BARE_TEXT_TOWER.sub(r"\1text_model.\2.", name)
        if not name.endswith("embeddings.position_ids"):
            named.setdefault(name, value)
    return named


def _counter(extra: Mapping[str, Any], key: str) -> int | None:
    value = extra.get(key)
    if isinstance(value, str) and value.isdigit():  # safetensors metadata is text
        return int(value)
    return value if type(value) is int else None


# --- what kind of file ----------------------------------------------------------------------------


def _kind_of_file(path: Path) -> str:
    """The layout by the first bytes, "zip", "pickle" or "safetensors"; CheckpointError for everything else."""
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes): download or copy it again")
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if head[8:9] == b"{" and (length := int.from_bytes(head[:8], "little")) <= MAX_SAFETENSORS_HEADER:
        if length + 8 > size:
            raise _cut_short(path, f"its header alone takes {length + 8} bytes")
        return "safetensors"
    raise CheckpointError(f"{path} is {_stranger(head, size)}")


def _stranger(head: bytes, size: int) -> str:
    """What a file that is no checkpoint is, and the way out."""
    text = head.decode("utf-8", errors="ignore").strip()
    printable = bool(text) and all(c.isprintable() or c.isspace() for c in text)
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the checkpoint: run `git lfs pull` in its folder, or download the file itself"
    if head.lstrip()[:1] == b"<" and printable:
        return "a web page, not a checkpoint (the download may need a login first): download the file itself"
    if not head.strip(b"\0"):
        return "filled with zeros, as an interrupted download leaves it: download or copy it again"
    if head.startswith(b"GGUF"):
        return "a GGUF file of another program: a .ckpt or .safetensors is needed"
    if printable and text[0] in "{[" and size > 9:
        return "a JSON text, not a checkpoint: name the .ckpt or .safetensors that belongs to it"
    if printable and size > 9:
        return f"a text file, not a checkpoint; it begins with {text[:40]!r}"
    return f"neither a .ckpt nor a .safetensors file, or cut short ({size} bytes): download or copy it again"


def _cut_short(path: Path, why: str) -> CheckpointError:
    size = path.stat().st_size
    return CheckpointError(f"{path} is cut short or damaged ({size} bytes; {why}): download or copy it again")


# --- the formats ----------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise _cut_short(path, str(error)) from error


def _read_pickle(path: Path, *, zipped: bool) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    mmap = zipped and _can_map(path)
    try:
        data = load_pickle(path, mmap=mmap)
    except UnsafePickle as error:
        raise CheckpointError(
            f"{path} is refused because it asks for more than weights ({', '.join(error.names)}): "
            "save it again as .safetensors, or as a plain state dict, with the program that made it"
        ) from error
    except MemoryError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or pickled in a way that cannot be read safely ({_reason(error)}): "
            "download it again, or save it as .safetensors with the program that made it"
        ) from error
    except Exception as error:  # an unpickler that reads garbage can raise anything
        raise _cut_short(path, f"{type(error).__name__}: {_reason(error)}") from error
    return _find_state(path, data)


def _reason(error: Exception) -> str:
    """The telling part of an unpickler's message, on one line."""
    text = " ".join(str(error).partition("WeightsUnpickler error:")[2].split("\n\n")[0].split())
    return (text or " ".join(str(error).split()) or "it ends too early")[:160]


def _can_map(path: Path) -> bool:
    """Whether a zip checkpoint is whole (CheckpointError if not) and its tensors lie in it uncompressed.

    A checkpoint packed again by a zip program is compressed; mapped, its bytes would be taken for weights.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError) as error:
        raise _cut_short(path, "its zip directory cannot be read") from error
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript program, not a checkpoint: a state dict is needed")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a zip archive of something else: unpack it and name the checkpoint inside")
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _find_state(path: Path, data: Any) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The state dict in what was unpickled, at whatever depth, and the dictionary that surrounds it."""
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a dictionary of weights")
    state = data
    for _ in range(len(STATE_KEYS)):
        inner = next((state[key] for key in STATE_KEYS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = inner
    tensors = {
        key: value.detach() for key, value in state.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    if not tensors:
        raise CheckpointError(f"{path} {_without_weights(data)}")
    return tensors, data


def _without_weights(data: Mapping[Any, Any]) -> str:
    if "string_to_param" in data:
        return "is a textual inversion embedding, an addition to a model: name the model's own checkpoint"
    if data and all(isinstance(key, int) for key in data):
        return "is a hypernetwork, an addition to a model: name the model's own checkpoint"
    entries = ", ".join(str(key) for key in list(data)[:5]) or "none"
    return f"holds no weights (its entries: {entries})"


def _check_tensors(path: Path, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            kind = "empty (meta)" if value.is_meta else "sparse or quantized"
            raise CheckpointError(f"{path} cannot be used: its tensor {key} is {kind}, and plain tensors are needed")
    if not state:
        raise CheckpointError(f"{path} holds no weights")
